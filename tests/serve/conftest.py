"""A model that knows a few conversations by heart, and a server of it on a loopback port; both made once."""

import asyncio
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from glasshouse.artifact import save_artifact
from glasshouse.device import Device
from glasshouse.inference.request import EngineSettings
from glasshouse.models.decoder import Decoder, DecoderConfig, initialize
from glasshouse.serve.guard import Limits
from glasshouse.serve.metrics import Log
from glasshouse.serve.models import House, open_models
from glasshouse.serve.server import Server, build, take_port
from glasshouse.text.chat import CHATML_TEMPLATE, render
from glasshouse.text.tokenizer import Tokenizer, train_tokenizer

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
CPU = Device("cpu", "float32", 0, 1)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
GREETING = "Hi 👋🏽! 你好，世界。👨‍👩‍👧 The end STOP now. é"
COUNT = " ".join(str(number) for number in range(1, 30))
STORY = "Once upon a time a cat sat on a mat. 猫坐在垫子上。🙂"
CHATS: list[tuple[str, list[dict[str, Any]] | None, str]] = [
    ("weather", [WEATHER], CALL),
    ("hello", None, GREETING),
    ("count", None, COUNT),
]


def rows_to_learn(tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """(what is read, what must be written) as token ids."""
    end = tokenizer.special["<|im_end|>"]
    rows = [
        (tokenizer.encode_chat([{"role": "user", "content": said}], tools), [*tokenizer.encode(answer), end])
        for said, tools, answer in CHATS
    ]
    return [*rows, (tokenizer.prompt(""), [*tokenizer.encode(STORY), tokenizer.end_of_document])]


def learn(model: Decoder, rows: list[tuple[list[int], list[int]]], pad: int) -> None:
    """Teach a model to write each row's answer, by heart."""
    length = max(len(read) + len(written) for read, written in rows)
    tokens = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), -100)
    for number, (read, written) in enumerate(rows):
        end = len(read) + len(written)
        tokens[number, :end] = torch.tensor(read + written)
        labels[number, len(read) - 1 : end - 1] = torch.tensor(written)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(300):
        logits = model.logits(model(tokens)).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            return
    raise AssertionError(f"the model did not learn its lines: loss {loss.item():.3f}")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: 0.1 million parameters, some 400 tokens, a context of 1,024."""
    prompt = render(CHATML_TEMPLATE, [{"role": "user", "content": "weather hello count"}], [WEATHER])
    # It has never seen the greeting: each of its characters that is not ASCII lies over several tokens.
    tokenizer = train_tokenizer(iter([prompt, CALL] * 3), 512, exact=False)
    model = Decoder(DecoderConfig(tokenizer.vocab_size, 64, 2, 4, 2, 16, 96, 1024))
    initialize(model, seed=1)
    learn(model, rows_to_learn(tokenizer), tokenizer.pad)
    folder = tmp_path_factory.mktemp("served") / "model"
    ends = [tokenizer.end_of_document, tokenizer.special["<|im_end|>"]]
    save_artifact(folder, model.eval(), tokenizer, generation={"eos_token_id": ends})
    return folder


@dataclass
class Live:
    """A server at work in a thread of this process."""

    url: str
    house: House
    client: httpx2.Client
    output: io.StringIO
    server: Server

    @property
    def statistics(self) -> Any:
        """The engine's figures."""
        return self.house.models["chat"].thread.engine.statistics

    def post(self, path: str, **fields: Any) -> httpx2.Response:
        """Send fields as JSON; `model` is the one there is."""
        return self.client.post(path, json={"model": "chat", **fields})

    def ask(self, path: str, **fields: Any) -> dict[str, Any]:
        """What is answered, which must be an answer."""
        answer = self.post(path, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, path: str, **fields: Any) -> dict[str, Any]:
        """The error object, which must have come with 400."""
        answer = self.post(path, **fields)
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]

    def events(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The data of a stream's events, up to [DONE], which must come."""
        answer = self.post(path, stream=True, **fields)
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
        data = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
        assert data.pop() == "[DONE]"
        return [json.loads(line) for line in data]

    def wait(self, happened: Callable[[], object]) -> None:
        """Until something has happened."""
        end = time.monotonic() + 60
        while not happened():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)

    def lines(self, word: str) -> list[str]:
        """The log's lines with a word, once there is one: a line is written after its answer was sent."""
        self.wait(lambda: word in self.output.getvalue())
        return [line for line in self.output.getvalue().splitlines() if word in line]

    def wait_idle(self) -> None:
        """Until nothing is under way."""
        self.wait(lambda: not (self.house.work or self.statistics.running or self.statistics.queued))


@contextmanager
def running(
    folder: Path,
    settings: EngineSettings | None = None,
    limits: Limits | None = None,
    more: Sequence[str] = (),
    quantize: str | None = None,
    load: bool = True,
    **options: Any,
) -> Iterator[Live]:
    """A server of a model that is called chat, and of more."""
    models = open_models([f"chat={folder}", *more], CPU, quantize)
    house = House(models, settings or EngineSettings(cache_tokens=65_536))
    if not load:
        house.load = lambda: None
    for name in ("log_prompts", "request_seconds"):
        if name in options:
            setattr(house, name, options.pop(name))
    limits, output = limits or Limits(), io.StringIO()
    with take_port("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        application = build(house, Log(output), limits, **options)
        server = Server(application, house, limits, 0.0)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        with httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
            while not server.started or (load and house.phase == "loading"):
                time.sleep(0.005)
            try:
                yield Live(url, house, client, output, server)
            finally:
                server.should_exit = True
                thread.join()


@pytest.fixture(scope="session")
def live(model_folder: Path) -> Iterator[Live]:
    """The server most tests ask."""
    with running(model_folder) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser for the tests of the page; they are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip("no Chromium here: apt-get install chromium")
    sync_api.expect.set_options(timeout=20_000)  # a busy machine draws late
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield chromium
        chromium.close()
