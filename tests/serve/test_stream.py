"""Clients who leave, queues that are full, faults in one request: nobody else notices, and nothing is left behind."""

import asyncio
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from tests.serve.conftest import COUNT, GREETING, Live, running

from glasshouse.inference.request import EngineSettings, Request
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.serve import app, completions
from glasshouse.serve.metrics import Line, Metrics
from glasshouse.serve.models import MOST_WAITING
from glasshouse.serve.openai import PING
from glasshouse.serve.stream import EventStream, Job

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
LONG = {"prompt": "Once", "max_tokens": 1000, "temperature": 2, "logit_bias": {}, "stream": True}


def endless(live: Live) -> dict[str, Any]:
    """A request whose answer goes on until the context is full."""
    tokenizer = live.house.models["chat"].artifact.tokenizer
    ends = {str(token): -100 for token in tokenizer.special.values()}
    return {**LONG, "model": "chat", "logit_bias": ends}


async def abandon(client: httpx2.AsyncClient, body: dict[str, Any], leave: bool) -> int:
    """Read a stream to its end, or leave after the second event; returns how many events were read."""
    count = 0
    async with client.stream("POST", TEXT, json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            count += line.startswith("data: ")
            if leave and count == 2:
                break
    return count


async def storm(live: Live, streams: int, tokens: int) -> None:
    """Many streams at once, of which every other client leaves."""
    limits = httpx2.Limits(max_connections=streams)
    async with httpx2.AsyncClient(base_url=live.url, timeout=120, limits=limits, trust_env=False) as client:
        bodies = [{**endless(live), "max_tokens": tokens, "seed": number} for number in range(streams)]
        counts = await asyncio.gather(
            *(abandon(client, b, number % 2 == 0) for number, b in enumerate(bodies))
        )
    assert all(count >= 2 for count in counts)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def memory() -> float:
    """Megabytes this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def storms(live: Live, rounds: int) -> None:
    connections = live.server.server_state.connections
    asyncio.run(storm(live, 100, 12))
    live.wait_idle()
    live.wait(lambda: len(connections) <= 40)  # those of the tests' own client stay
    files, held, before = open_files(), len(connections), memory()
    for _ in range(rounds):
        asyncio.run(storm(live, 100, 12))
        live.wait_idle()
        live.wait(lambda: len(connections) <= held)
        live.wait(lambda: open_files() <= files)
        assert live.statistics.cache_blocks_used == 0
        assert not live.house.work
        assert not live.house.models["chat"].thread._listeners
    assert memory() < before + 10  # a thousand abandoned answers; a leak of 10 kB each would show


def test_a_hundred_streams_with_half_the_clients_gone_leave_nothing(live: Live):
    storms(live, 2)


@pytest.mark.slow
def test_nor_in_ten_rounds(live: Live):
    storms(live, 10)


def test_a_client_who_leaves_costs_a_token_at_most(live: Live):
    """The engine's count when the job is closed, and when it has come to rest."""

    async def leave() -> tuple[int, int]:
        served = live.house.models["chat"]
        config = GenerationConfig(
            temperature=2.0, max_new_tokens=900, logit_bias={served.artifact.tokenizer.end_of_document: -100}
        )
        job = Job(live.house, served, [Request((5,), config)], Metrics(dict))
        job.submit()
        async for _ in job.pieces():
            if job.count == 5:
                break
        job.close()
        before = live.statistics.tokens
        while live.statistics.running:
            await asyncio.sleep(0.001)
        return before, live.statistics.tokens

    live.wait_idle()
    before, after = asyncio.run(leave())
    assert after <= before + 1
    assert live.statistics.cache_blocks_used == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_who_hangs_up_frees_the_engine(live: Live, stream: bool):
    live.wait_idle()
    before = live.statistics.tokens
    body = {**endless(live), "stream": stream, "max_tokens": 1000}
    with httpx2.Client(base_url=live.url, timeout=0.3, trust_env=False) as client:
        if stream:
            with client.stream("POST", TEXT, json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                client.post(TEXT, json=body)
    live.wait_idle()
    assert 0 < live.statistics.tokens - before < 1000
    assert "tokens=" in live.lines("POST /v1/completions")[-1]


def test_a_full_queue_is_said_and_health_goes_on(model_folder: Path):
    settings = EngineSettings(cache_tokens=4096, max_batch=1, max_queue=1)
    with running(model_folder, settings) as server, ThreadPoolExecutor(8) as pool:
        body = endless(server)
        waiting = [pool.submit(server.client.post, TEXT, json={**body, "max_tokens": 400}) for _ in range(8)]
        answers = [one.result() for one in waiting]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert {answer.status_code for answer in answers} == {200, 429}
        for answer in refused:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        assert server.client.get("/health").status_code == 200
        # All answers of a request are taken, or none.
        many = server.post(TEXT, prompt="a", n=5, max_tokens=2)
        assert many.status_code == 429
        server.wait_idle()
        assert server.ask(TEXT, prompt="a", max_tokens=2)["choices"]


class Faulty:
    """A constraint that breaks at its third token."""

    def __init__(self, size: int):
        self._size, self._count = size, 0

    def fork(self) -> "Faulty":
        return Faulty(self._size)

    def allowed(self) -> torch.Tensor:
        self._count += 1
        if self._count == 3:
            raise RuntimeError("a fault with a secret")
        return torch.ones(self._size, dtype=torch.bool)

    def advance(self, token: int) -> None:
        pass


def test_a_fault_in_one_request_fails_it_alone(live: Live, monkeypatch: pytest.MonkeyPatch):
    size = live.house.models["chat"].artifact.tokenizer.vocab_size
    monkeypatch.setattr(completions, "compile_constraint", lambda *values: Faulty(size))
    asked = {"messages": HELLO, "temperature": 0}
    broken = {**asked, "response_format": {"type": "json_object"}}
    with ThreadPoolExecutor(3) as pool:
        beside = pool.submit(live.ask, CHAT, **asked)
        answer = pool.submit(live.post, CHAT, **broken).result()
        streamed = pool.submit(live.post, CHAT, **broken, stream=True).result()
        assert beside.result()["choices"][0]["message"]["content"] == GREETING
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert streamed.status_code == 200
    last = [line for line in streamed.text.split("\n") if line.startswith("data: ")][-1]
    assert json.loads(last[6:])["error"]["code"] == "internal_error"
    assert "secret" not in answer.text + streamed.text
    assert "a fault with a secret" in live.output.getvalue()
    figures = live.client.get("/metrics").text
    assert f'glasshouse_errors_total{{route="{CHAT}",type="server_error"}} 2.0' in figures
    response = live.post(
        "/v1/responses", input="hello", text={"format": {"type": "json_object"}}, stream=True
    )
    assert "event: response.failed" in response.text
    assert live.ask(CHAT, **asked)["choices"][0]["message"]["content"] == GREETING


def test_an_answer_has_a_time(model_folder: Path):
    with running(model_folder, request_seconds=0.2) as server:
        body = {**endless(server), "max_tokens": 1000, "n": 4}
        answer = server.client.post(TEXT, json={**body, "stream": False})
        assert answer.status_code == 504
        assert answer.json()["error"]["type"] == "timeout_error"
        text = server.client.post(TEXT, json=body).text
        assert '"error":{"message":"the answer took too long' in text
        assert "[DONE]" not in text
        server.wait_idle()


def test_prompts_are_logged_only_where_asked_and_stay_on_one_line(model_folder: Path):
    said = "secret\r\n\x1b[2J\u202e"
    with running(model_folder, log_prompts=True) as server:
        server.post(TEXT, prompt=said, max_tokens=1)
        [line] = server.lines("secret")
        assert line.isascii()
        assert line.isprintable()
        assert "prompt_tokens=" in line
        assert "model=chat" in line


def test_without_being_asked_no_prompt_is_logged(live: Live):
    live.post(TEXT, prompt="a very private word", max_tokens=1)
    live.post(
        CHAT, messages=[{"role": "user", "content": "a very private word"}], max_tokens=1, temperature="x"
    )
    assert "private" not in live.output.getvalue()


def test_a_silent_stream_is_kept_alive(live: Live):
    async def slow() -> Any:
        yield b"a"
        await asyncio.sleep(0.2)
        yield b"b"

    async def gather() -> list[bytes]:
        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        job = Job(live.house, live.house.models["chat"], [], Metrics(dict))
        await EventStream(slow(), job, Line("", "", "", ""), 0.05).stream_response(send)
        return [body for body in sent if body]

    found = asyncio.run(gather())
    assert [event for event in found if event != PING] == [b"a", b"b"]
    assert found.count(PING) >= 1
    assert found.index(b"b") > found.index(PING)


def test_events_come_while_the_answer_is_written(live: Live):
    """The first event is there before the last token is drawn."""
    body = {**endless(live), "max_tokens": 300}
    started = threading.Event()
    with live.client.stream("POST", TEXT, json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: ") and not started.is_set():
                started.set()
                assert live.statistics.running == 1
    live.wait_idle()


def test_a_long_count_beside_a_short_one(live: Live):
    """Both come out whole, whichever is read first."""
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(live.ask, CHAT, messages=[{"role": "user", "content": "count"}], temperature=0)
        two = pool.submit(live.ask, CHAT, messages=HELLO, temperature=0)
        assert one.result()["choices"][0]["message"]["content"] == COUNT
        assert two.result()["choices"][0]["message"]["content"] == GREETING


def test_a_slow_template_keeps_nobody_else_waiting(live: Live, monkeypatch: pytest.MonkeyPatch):
    """Templates, tokenizers and schemas run in threads of their own: health is answered while one is at work."""
    begun, answered = threading.Event(), threading.Event()
    real = app.plan_chat

    def slow(*values: Any) -> Any:
        begun.set()
        assert answered.wait(60)
        return real(*values)

    monkeypatch.setattr(app, "plan_chat", slow)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(live.ask, CHAT, messages=HELLO, temperature=0)
        assert begun.wait(60)
        assert live.client.get("/health").status_code == 200
        assert live.ask(TEXT, prompt="Once", max_tokens=2)["choices"]
        answered.set()
        assert waiting.result()["choices"][0]["message"]["content"] == GREETING


def test_too_many_at_the_tokenizer_are_told_to_come_back(live: Live, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live.house, "waiting", MOST_WAITING)
    answer = live.post("/tokenize", prompt="a")
    assert answer.status_code == 429
    assert "retry-after" in answer.headers
    monkeypatch.undo()
    assert live.ask("/tokenize", prompt="a")["count"] >= 1
