"""The server as a process: sockets of clients who are slow, long or hostile, signals, ports, models that are torn."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.serve.conftest import GREETING, Live, running

from glasshouse.cli import main
from glasshouse.errors import InputError
from glasshouse.serve.guard import Limits
from glasshouse.serve.models import name_model
from glasshouse.serve.server import ServeConfig, is_loopback, require_key, serve, take_port
from glasshouse.text.tokenizer import open_tokenizer

HEAD = b"Host: localhost\r\n"
JSON = b"Content-Type: application/json\r\n"
TEXT = "/v1/completions"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The verb sets the process's threads; the tests after it go on with theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def strict(model_folder: Path) -> Iterator[Live]:
    """A server with little patience."""
    limits = Limits(body_bytes=100_000, body_seconds=0.4, header_seconds=0.4, linger_seconds=0.4)
    with running(model_folder, limits=limits) as server:
        yield server


def connect(live: Live) -> socket.socket:
    host, port = live.url.removeprefix("http://").split(":")
    found = socket.create_connection((host, int(port)), timeout=30)
    found.settimeout(30)
    return found


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    return data


def say(live: Live, *parts: bytes, half_close: bool = False) -> bytes:
    """Send some bytes; everything that comes back until the connection ends."""
    with connect(live) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def status(answer: bytes) -> int:
    return int(answer.split(b" ")[1]) if answer else 0


def error(answer: bytes) -> dict[str, Any]:
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]


# ---- slow, long, hostile


def test_three_hundred_half_open_headers(strict: Live):
    """While they hang the server answers others; then every one of them is sent away."""
    half = [connect(strict) for _ in range(300)]
    for connection in half:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: local")
    assert strict.ask(TEXT, prompt="Hi", max_tokens=2)["choices"]
    dripping = threading.Event()

    def drip() -> None:
        while not dripping.wait(0.05):
            for connection in half[:50]:
                with contextlib.suppress(OSError):
                    connection.send(b"x")

    dripper = threading.Thread(target=drip)
    dripper.start()
    answers = [read_all(connection) for connection in half]
    dripping.set()
    dripper.join()
    assert all(status(answer) in (408, 0) for answer in answers)
    assert sum(status(answer) == 408 for answer in answers) >= 250
    for connection in half:
        connection.close()
    assert strict.client.get("/health").status_code == 200


def test_a_silent_connection_is_closed(strict: Live):
    assert status(say(strict)) == 408


def test_a_slow_body(strict: Live):
    start = b"POST /v1/completions HTTP/1.1\r\n" + HEAD + JSON + b"Content-Length: 100\r\n\r\n{"
    answer = say(strict, start)
    assert status(answer) == 408
    assert error(answer)["code"] == "slow_body"


def test_long_headers(strict: Live):
    assert status(say(strict, b"GET / HTTP/1.1\r\n" + HEAD + b"X: " + b"a" * 300_000 + b"\r\n\r\n")) == 431
    assert status(say(strict, b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n" + HEAD + b"\r\n")) in (431, 400)
    assert status(say(strict, b"GET / HTTP/1.1\r\n" + HEAD + b"X: 1\r\n" * 9000 + b"\r\n")) == 431


def test_long_bodies(strict: Live):
    start = b"POST /v1/completions HTTP/1.1\r\n" + HEAD + JSON
    answer = say(strict, start + b"Content-Length: 1000000000\r\n\r\n", b"x" * 1000)
    assert status(answer) == 413
    assert error(answer)["code"] == "body_too_large"
    chunks = [b"2710\r\n" + b"x" * 10_000 + b"\r\n"] * 30
    assert status(say(strict, start + b"Transfer-Encoding: chunked\r\n\r\n", *chunks)) == 413
    refused = strict.client.post(TEXT, content=b"x" * 90_000_0, headers={"content-type": "application/json"})
    assert refused.status_code == 413


BODY = b'{"model": "chat", "prompt": "a", "max_tokens": 1}'


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /tokenize HTTP/1.1\r\n" + HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /tokenize HTTP/1.1\r\n" + HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\nGET /metrics HTTP/1.1\r\n" + HEAD + b"\r\n",
        b"POST /tokenize HTTP/1.1\r\n" + HEAD + b"Content-Length: +5\r\n\r\nabcde",
        b"POST /tokenize HTTP/1.1\r\n" + HEAD + b"Content-Length: -5\r\n\r\nabcde",
        b"POST /tokenize HTTP/1.1\r\n" + HEAD + b"Content-Length : 5\r\n\r\nabcde",
        b"POST /tokenize HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + HEAD + b"X: a\x00b\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Content-Length: 50\r\n\r\n{\"mo",
    ],
)  # fmt: skip
def test_what_is_no_clean_http_is_refused(strict: Live, request_bytes: bytes):
    """Conflicting lengths, smuggled second requests, half a request: refused, and the connection ends."""
    answer = say(strict, request_bytes, half_close=True)
    assert status(answer) in (400, 501), answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"glasshouse_" not in answer


def test_two_requests_on_one_connection(strict: Live):
    one = (
        b"POST /v1/completions HTTP/1.1\r\n" + HEAD + JSON + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    )
    last = b"GET /health HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n"
    answer = say(strict, one + last)
    assert answer.count(b"HTTP/1.1 200") == 2


def test_more_connections_than_allowed(model_folder: Path):
    with running(model_folder, limits=Limits(connections=3)) as server:
        server.client.get("/health")
        held = [connect(server) for _ in range(2)]
        assert status(say(server, b"GET /health HTTP/1.1\r\n" + HEAD + b"\r\n")) == 503
        for connection in held:
            connection.close()


# ---- signals


@contextlib.contextmanager
def process(folder: Path, *words: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The verb as a process of its own, once it is ready; and its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [
        sys.executable,
        "-m",
        "glasshouse",
        "serve",
        f"chat={folder}",
        "--port",
        "0",
        "--threads",
        "1",
        *words,
    ]
    running_one = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert running_one.stdout is not None
        lines = []
        while not (found := re.search(r"^(http://\S+) : the page", lines[-1] if lines else "")):
            lines.append(running_one.stdout.readline())
            assert lines[-1], running_one.stderr.read() if running_one.stderr else ""
        url = found[1]
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(url + "/ready", trust_env=False).status_code == 200:
                    break
            assert time.monotonic() < end
            time.sleep(0.02)
        yield running_one, url
    finally:
        running_one.kill()
        running_one.communicate()


def endless(folder: Path, count: int) -> dict[str, Any]:
    """Answers that go on until they have a thousand tokens each."""
    ends = dict.fromkeys(map(str, open_tokenizer(folder).special.values()), -100)
    fixed = {"model": "chat", "prompt": "Once", "stream": True, "max_tokens": 1000, "seed": 1}
    return {**fixed, "logit_bias": ends, "n": count}


def start_stream(
    url: str, body: dict[str, Any], headers: dict[str, str] | None = None
) -> tuple[threading.Thread, list[str], threading.Event]:
    """Read a stream in a thread: its lines, and an event that says it has begun."""
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with (
            httpx2.Client(timeout=120, trust_env=False) as client,
            client.stream("POST", url + TEXT, json=body, headers=headers) as answer,
        ):
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(60)
    return thread, lines, begun


def test_a_signal_lets_answers_finish_refuses_new_ones_and_ends(model_folder: Path):
    with process(model_folder, "--drain_seconds", "60") as (server, url):
        thread, lines, _ = start_stream(url, endless(model_folder, 8))
        server.send_signal(signal.SIGTERM)
        models = url + "/v1/models"
        while (refused := httpx2.get(models, trust_env=False)).status_code == 200:
            pass
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert httpx2.get(url + "/health", trust_env=False).status_code == 200
        assert httpx2.get(url + "/ready", trust_env=False).status_code == 503
        thread.join()
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.wait(30) == 0


def test_the_verb_says_how_to_talk_to_it_and_ends_what_takes_too_long(model_folder: Path):
    """The printed curl line, sent as printed, is answered; a long answer ends with an error event."""
    words = ("--names", "a.example", "--drain_seconds", "0.2")
    shown = {"authorization": "Bearer a-long-secret"}
    with process(model_folder, *words, GLASSHOUSE_KEY="a-long-secret") as (server, url):
        assert httpx2.get(url + "/v1/models", trust_env=False).status_code == 401
        assert server.stdout is not None
        [command] = [line for line in (server.stdout.readline(), server.stdout.readline()) if "curl" in line]
        assert "a-long-secret" not in command
        content = shlex.split(command)[-1]
        sent = {**shown, "content-type": "application/json", "host": "a.example"}
        answer = httpx2.post(shlex.split(command)[1], content=content, headers=sent, trust_env=False)
        assert answer.status_code == 200
        body = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
        greeting = httpx2.post(url + "/v1/chat/completions", json=body, headers=shown, trust_env=False).json()
        assert greeting["choices"][0]["message"]["content"] == GREETING
        thread, lines, _ = start_stream(url, endless(model_folder, 16), shown)
        server.send_signal(signal.SIGTERM)
        thread.join()
        last = json.loads([line for line in lines if line.startswith("data: ")][-1][6:])
        assert last["error"]["code"] == "stopped"
        assert server.wait(30) == 0


# ---- before the port opens


def test_a_port_in_use_is_one_line(model_folder: Path, capsys: pytest.CaptureFixture[str]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(model_folder), "--port", str(port)]) == 2
    text = capsys.readouterr().err
    assert f"the port is in use (127.0.0.1:{port})" in text
    assert text.count("\n") == 1


def torn(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place)
    weights = place / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    return place


def unknown(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place)
    (place / "manifest.json").unlink()
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(
        json.dumps(config | {"model_type": "mamba", "architectures": ["Mamba"]})
    )
    return place


@pytest.mark.parametrize("spoil", [torn, unknown])
def test_a_model_that_cannot_be_served_is_refused_by_name_before_the_port_opens(
    spoil: Any,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    listened = []
    monkeypatch.setattr(socket.socket, "listen", lambda *values: listened.append(values))
    place = spoil(model_folder, tmp_path / "spoilt")
    assert main(["serve", str(model_folder), str(place), "--port", "0"]) == 2
    text = capsys.readouterr().err
    assert str(place) in text
    assert text.count("\n") == 1
    assert not listened


def test_words_of_the_command_line(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("GLASSHOUSE_KEY", raising=False)
    for words, message in (
        ([], "MODEL is missing"),
        (["nowhere"], "no such model"),
        ([str(model_folder), "--host", "0.0.0.0"], "no key"),
        ([str(model_folder), "--host", "0.0.0.0", "--key", "short"], "guess"),
        ([str(model_folder), "--key", "a b"], "header"),
        ([str(model_folder), "--port", "99999"], "port is 99999"),
        ([str(model_folder), "--drain_seconds", "-1"], "drain_seconds is -1"),
        ([str(model_folder), "--prot", "1"], "did you mean --port"),
        ([str(model_folder), str(model_folder)], "two models are called served"),
        ([str(model_folder), "--host", "192.0.2.1", "--key", "long-enough-key"], "cannot listen"),
        ([str(model_folder), "--max_batch", "0", "--port", "0"], "max_batch is 0"),
    ):
        assert main(["serve", *words]) == 2, words
        assert message in capsys.readouterr().err.replace("served0", "served")


def test_addresses_that_only_this_machine_reaches():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(
        map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org", "localhost.evil.example"))
    )
    require_key("127.0.0.1", "")
    require_key("0.0.0.0", "long-enough-key")
    with pytest.raises(InputError, match="no key"):
        require_key("::", "")


def test_names_of_models():
    assert name_model("runs/base") == ("base", "runs/base")
    assert name_model("runs/base/") == ("base", "runs/base/")
    assert name_model("runs/base/model") == ("base", "runs/base/model")
    assert name_model("small=runs/base") == ("small", "runs/base")
    assert name_model("runs/a=b") == ("a=b", "runs/a=b")
    assert name_model("hub:owner/name@main") == ("owner/name", "hub:owner/name@main")


def test_a_model_whose_weights_are_no_numbers_is_said(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """It opens, but cannot write: the server ends with the reason instead of answering nothing."""
    place = tmp_path / "broken"
    shutil.copytree(model_folder, place)
    (place / "manifest.json").unlink()
    weights = load_file(place / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    assert main(["serve", str(place), "--port", "0", "--threads", "1"]) == 2
    assert "not finite" in capsys.readouterr().err


def test_the_port_is_taken_before_models_are_opened(tmp_path: Path):
    with take_port("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        listener.listen()
        with pytest.raises(InputError, match="in use"):
            serve([str(tmp_path / "nowhere")], ServeConfig(port=port))
