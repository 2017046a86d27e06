"""The models that are served, by name, and the house that holds them: its phase, its work under way, its threads.

A house is loading until every engine has answered once, then ready, then draining. Knows artifacts and engines;
nothing of HTTP.
"""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from glasshouse.artifact import RUN_FILE, Artifact, open_artifact
from glasshouse.device import Device
from glasshouse.errors import InputError
from glasshouse.files import read_json
from glasshouse.inference.engine import Engine, EngineThread
from glasshouse.inference.quantization import quantize_artifact, settle
from glasshouse.inference.request import EngineSettings, Request
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.models.decoder import Decoder
from glasshouse.serve.openai import ApiError

TEXT_THREADS = 4
"""Threads that tokenize, render templates, compile schemas and embed, so that the event loop never does."""
MOST_WAITING = 256
"""Requests that such a thread works on or that wait for one."""

Result = TypeVar("Result")


class Work(Protocol):
    """What is under way for one request and can be ended from outside."""

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        ...


@dataclass
class Served:
    """One model.

    Args:
        name: what requests call it.
        artifact: the opened model.
        created: seconds since 1970, when it was opened.
        thread: its engine at work; None while loading, and for a model that writes no text.
        parameters: how many numbers it has learned.
        instructed: whether it may have been taught to answer.
        note: what the person who starts the server should know of it.
    """

    name: str
    artifact: Artifact
    created: int
    thread: EngineThread | None = None
    parameters: int = 0
    instructed: bool = True
    note: str = ""

    @property
    def writes(self) -> bool:
        """Whether it can continue a text."""
        return isinstance(self.artifact.model, Decoder)

    @property
    def context_length(self) -> int:
        """Most tokens it reads."""
        return self.artifact.config.context_length

    def description(self) -> dict[str, Any]:
        """What /v1/models says of it."""
        facts = {"id": self.name, "object": "model", "created": self.created, "owned_by": "glasshouse"}
        can = {"generate": self.writes, "chat": self.writes and bool(self.artifact.tokenizer.chat_template)}
        can["instructed"] = self.instructed
        return {**facts, "max_model_len": self.context_length, "capabilities": {**can, "embed": True}}

    def require_writer(self) -> EngineThread:
        """The engine, or the refusal of a model that writes no text.

        Raises:
            ApiError: it is an encoder, or not loaded yet.
        """
        if not self.writes:
            message = f"{self.name} reads text and writes none: use it with /v1/embeddings"
            raise ApiError(400, message, "model", "model_writes_no_text")
        if self.thread is None:
            raise ApiError(503, f"{self.name} is loading", None, "loading", retry_after=2)
        return self.thread


@dataclass
class House:
    """Everything a running server holds.

    Args:
        models: by name, in the order given.
        settings: of each engine.
        log_prompts: whether the log may hold text of requests.
        request_seconds: longest time one request may take.
    """

    models: dict[str, Served]
    settings: EngineSettings = field(default_factory=EngineSettings)
    log_prompts: bool = False
    request_seconds: float = 600.0
    phase: Literal["loading", "ready", "draining"] = "loading"
    work: set[Work] = field(default_factory=set)
    waiting: int = 0
    pool: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
    )

    def find(self, name: str | None) -> Served:
        """The model of a name; the only one where none is named.

        Raises:
            ApiError: there is none (404), or several and none is named (400).
        """
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name is None:
            raise ApiError(400, "several models are served: name one", "model", "missing_model")
        if name not in self.models:
            known = ", ".join(self.models)
            message = f"no model {name[:100]!r} is served here; there is {known}"
            raise ApiError(404, message, "model", "model_not_found")
        return self.models[name]

    async def in_thread(self, function: Callable[..., Result], *values: Any) -> Result:
        """Call a function that takes a while, off the event loop.

        Raises:
            ApiError: too many wait for the same.
        """
        if self.waiting >= MOST_WAITING:
            raise ApiError(429, "too many requests wait: try again later", None, "queue_full", retry_after=2)
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, function, *values)
        finally:
            self.waiting -= 1

    def load(self) -> None:
        """Start every engine and let it write a token, so that the first client waits for nothing.

        Raises:
            InputError: a model cannot write (its weights are no numbers).
        """
        for served in self.models.values():
            model = served.artifact.model
            if isinstance(model, Decoder) and served.thread is None:
                engine = Engine(model, served.artifact.tokenizer, self.settings)
                engine.complete([Request((), GenerationConfig(temperature=0, max_new_tokens=1))])
                served.thread = EngineThread(engine)
                served.thread.start()
        if self.phase == "loading":
            self.phase = "ready"

    def fail_work(self, error: Exception) -> None:
        """End all that is under way."""
        for work in list(self.work):
            work.fail(error)

    def close(self) -> None:
        """Stop the engines and the threads."""
        for served in self.models.values():
            if served.thread is not None:
                served.thread.stop()
        self.pool.shutdown(wait=False, cancel_futures=True)


def open_models(paths: Sequence[str], device: Device, kind: str | None = None) -> dict[str, Served]:
    """Open the models to serve, each verified against its manifest.

    Args:
        paths: runs, model folders, folders in Hugging Face layout, or "hub:OWNER/NAME"; NAME=PATH gives a name.
        device: where, and in what number format.
        kind: "int8" or "int4" to quantize each; None for the weights as they are.

    Raises:
        InputError: one is torn, altered, of an unknown family or not there; or two have the same name.
    """
    models: dict[str, Served] = {}
    for word in paths:
        name, path = name_model(word)
        if name in models:
            raise InputError(
                f"two models are called {name}", path, f"write another name before one: other={path}"
            )
        artifact = open_artifact(path, dtype=device.compute_dtype, device=device.torch_device)
        note, count = "", sum(parameter.numel() for parameter in artifact.model.parameters())
        if kind is not None:
            artifact, note = quantize_artifact(artifact, kind)
        settle(artifact.model)
        taught = is_instructed(artifact)
        models[name] = Served(name, artifact, int(time.time()), None, count, taught, note)
    return models


def is_instructed(artifact: Artifact) -> bool:
    """Whether a model may have been taught to answer: not where its run says that it was pretrained and no more."""
    facts = artifact.path.parent / RUN_FILE
    return not facts.is_file() or read_json(facts).get("stage") != "pretrain"


def name_model(word: str) -> tuple[str, str]:
    """The name and the path of a model on the command line: `runs/base` is "base", `small=runs/base` is "small"."""
    name, equals, path = word.partition("=")
    if equals and name and path and "/" not in name:
        return name, path
    if word.startswith("hub:"):
        return word.removeprefix("hub:").partition("@")[0], word
    parts = Path(word).expanduser().absolute().parts
    place = Path(*parts[:-1]) if parts[-1] == "model" and len(parts) > 2 else Path(*parts)
    return place.name or "model", word


def random_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(63)
