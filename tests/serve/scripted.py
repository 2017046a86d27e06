"""A server that says what a test wrote for it: prepared pieces of text, a gate in the midst of a stream, a death."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from glasshouse.serve.app import MEDIA_TYPES, PAGE
from glasshouse.serve.guard import SAFE_HEADERS

LAYERS, HEADS = 3, 2


@dataclass
class Scripted:
    """What the server will do, and what it was asked.

    Args:
        answers: the pieces of the next answers, each given once; the last one is given for ever.
        holds: pieces to wait before until the gate is opened; it closes again behind each.
        die_after: cut the connection after this piece.
        key: what /v1 asks for, if anything.
        models: facts of the models.
    """

    answers: list[list[str]] = field(default_factory=lambda: [["Hello", " there", "."]])
    holds: tuple[int, ...] = ()
    die_after: int | None = None
    key: str = ""
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "one"}, {"id": "two"}])
    gate: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    url: str = ""

    def asked(self, path: str) -> list[dict[str, Any]]:
        """The bodies that came to a path."""
        return [body for where, body in self.requests if where == path]

    def id_of(self, word: str) -> int:
        """The number of a word, which is a token here."""
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def read(self, body: dict[str, Any]) -> list[int]:
        """The token ids of a request's text."""
        given = body.get("prompt", body.get("token_ids"))
        if isinstance(given, list):
            return given
        text = (
            given if given is not None else "".join(f"<{m['role']}>{m['content']}" for m in body["messages"])
        )
        return [self.id_of("<start>"), *(self.id_of(word) for word in re.findall(r"\s*<?\w+>?|\s*\W", text))]

    # ---- what it answers

    def explanation(self, body: dict[str, Any]) -> dict[str, Any]:
        """Odds that depend on nothing but the place in the text."""
        ids = self.read(body)
        others = [{"id": self.id_of(word), "text": word, "special": False} for word in (" dog", " sun")]
        tokens: list[dict[str, Any]] = []
        for place, number in enumerate(ids):
            chance = None if place == 0 else 0.9 if place % 2 else 0.05
            own = {"id": number, "text": self.words[number], "special": place == 0}
            shown = [{**own, "probability": chance}, *({**other, "probability": 0.02} for other in others)]
            odds = {"probability": chance, "rank": 1, "entropy": 1.0, "alternatives": shown if place else []}
            tokens.append(own | odds)
        answer: dict[str, Any] = {"tokens": tokens, "lens": None, "attention": None}
        if body.get("lens"):
            top = [{**other, "probability": 0.4} for other in others]
            answer["lens"] = [{"layer": layer, "top": top} for layer in range(LAYERS + 1)]
            answer["attention"] = [[[1 / len(ids)] * len(ids)] * HEADS] * LAYERS
        return answer

    async def stream(self, body: dict[str, Any], send: Any) -> None:
        """The pieces of the next answer as events."""
        pieces = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number, piece in enumerate([*pieces, ""]):
            if number in self.holds:
                while not self.gate.is_set():
                    await asyncio.sleep(0.005)
                self.gate.clear()
            if self.die_after == number:
                raise ConnectionError("the server dies, as the test wants it")
            last = number == len(pieces)
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if last else None}
            choice |= {"delta": {"content": piece}} if "messages" in body else {"text": piece}
            choice["token_ids"] = [] if last else [self.id_of(piece)]
            chunk = {"choices": [choice]} | ({} if number else {"prompt_token_ids": self.read(body)})
            await send({"type": "http.response.body", "body": b"data: %s\n\n" % json.dumps(chunk).encode(),
                        "more_body": True})  # fmt: skip
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, ASGI's way."""
        path, body = scope["path"], b""
        more = scope["method"] == "POST"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        asked = json.loads(body) if body else {}
        self.requests.append((path, asked))
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if path.startswith("/v1") and self.key and headers.get("authorization") != f"Bearer {self.key}":
            await reply(send, 401, {"error": {"message": "no key or a wrong one"}})
        elif path == "/v1/models":
            await reply(send, 200, {"data": self.models})
        elif path == "/v1/explain":
            await reply(send, 200, self.explanation(asked))
        elif path.endswith("completions"):
            await self.stream(asked, send)
        else:
            await send_file(send, path.strip("/") or "index.html")


async def reply(send: Any, status: int, value: Any) -> None:
    """JSON."""
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})


async def send_file(send: Any, name: str) -> None:
    """A file of the page, under the policy of the real server."""
    path = PAGE / name
    headers = {**SAFE_HEADERS, "content-type": MEDIA_TYPES.get(path.suffix, "text/plain")}
    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    await send({"type": "http.response.start", "status": 200 if path.is_file() else 404, "headers": raw})
    await send({"type": "http.response.body", "body": path.read_bytes() if path.is_file() else b""})


@contextmanager
def scripted() -> Iterator[Scripted]:
    """A scripted server on a loopback port."""
    script = Scripted()
    config = uvicorn.Config(script, port=0, log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        threading.Event().wait(0.005)
    script.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield script
    finally:
        script.holds = ()
        script.gate.set()
        server.should_exit = server.force_exit = True
        thread.join()
