"""From the engine's thread to the event loop: the tokens of one HTTP request, as they come, and their way out.

A job holds the engine's tickets of one request and gives them back however it ends: finished, failed, cancelled by a
client who left, out of time, or ended because the server stops. Knows engines and sockets' disconnects; nothing of
what the tokens mean.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import StreamingResponse

from glasshouse.inference.request import Event, Request, Token
from glasshouse.serve.metrics import Line, Metrics
from glasshouse.serve.models import House, Served
from glasshouse.serve.openai import PING, ApiError
from glasshouse.text.tokenizer import Tokenizer

PING_SECONDS = 15.0
Result = TypeVar("Result")


class Piece(NamedTuple):
    """One token of one of a job's requests, by its number; `prompt` holds the prompt's own odds, once."""

    number: int
    token: Token
    prompt: tuple[Token, ...] = ()


class Job:
    """The engine requests that answer one HTTP request.

    Made and used on the event loop; `submit` must be called before `pieces`, `close` at the end, always.

    Args:
        house: whose work this is.
        served: the model.
        requests: what to write.
        metrics: counts tokens and times.
    """

    def __init__(self, house: House, served: Served, requests: Sequence[Request], metrics: Metrics):
        self.house, self.metrics, self._served, self._requests = house, metrics, served, requests
        self._thread = served.require_writer()
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()
        self._tickets: dict[int, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._started = time.monotonic()
        self.count = 0
        self._first_token = metrics.first_token.labels(served.name)
        self._token_time = metrics.token_time.labels(served.name)
        self._written = metrics.tokens.labels(served.name, "written")

    @property
    def model(self) -> str:
        """The model's name."""
        return self._served.name

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._served.artifact.tokenizer

    def submit(self) -> None:
        """Put every request into the engine's queue, or none.

        Raises:
            QueueFull: too many wait.
            InputError: one can never run.
        """
        try:
            for index, request in enumerate(self._requests):
                self._tickets[index] = self._thread.submit(request, self._listener(index))
        except BaseException:
            self.close()
            raise
        self.house.work.add(self)
        late = ApiError(504, "the answer took too long and was stopped", None, "timeout")
        self._timer = self._loop.call_later(self.house.request_seconds, self.fail, late)

    def _listener(self, index: int) -> Any:
        def hear(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is there any more
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return hear

    def fail(self, error: Exception) -> None:
        """End it: whoever reads the pieces gets the error next."""
        self._queue.put_nowait(error)

    def close(self) -> None:
        """Give the engine back what is not finished. May be called twice."""
        self.house.work.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        tickets, self._tickets = self._tickets, {}
        for ticket in tickets.values():
            self._thread.cancel(ticket)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The tokens of all requests, as they come.

        Raises:
            ApiError: the request took too long, or the server stops.
            Exception: what went wrong with one of the requests.
        """
        latest = self._started
        while self._tickets:
            found = await self._queue.get()
            if isinstance(found, Exception):
                raise found
            index, event = found
            if event.is_last:
                self._tickets.pop(index, None)
            if event.token is None:
                raise event.error or RuntimeError("failed without an error")
            latest = self._measure(latest)
            yield Piece(index, event.token, event.prompt)

    def _measure(self, latest: float) -> float:
        """Count a token; returns when."""
        moment = time.monotonic()
        self.count += 1
        if self.count == 1:
            self._first_token.observe(moment - self._started)
        else:
            self._token_time.observe(moment - latest)
        self._written.inc()
        return moment


class EventStream(StreamingResponse):
    """Server-sent events of a job; the engine gets back what it holds however the sending ends.

    A comment is sent whenever no event came for a while, so that nobody between takes the line for dead.

    Args:
        events: the encoded events.
        job: closed at the end.
        line: the log's line of it.
        ping_seconds: how long a silence may be.
    """

    def __init__(
        self, events: AsyncIterator[bytes], job: Job, line: Line, ping_seconds: float = PING_SECONDS
    ):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._job, self._line, self._ping_seconds = job, line, ping_seconds
        self._latest = time.monotonic()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it, ASGI's way."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._line.note(tokens=self._job.count)
            self._job.close()

    async def stream_response(self, send: Any) -> None:
        """Send the events, and a comment into each long silence between them."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pings = asyncio.ensure_future(self._ping(send))
        try:
            async for event in self.body_iterator:
                self._latest = time.monotonic()
                await send({"type": "http.response.body", "body": event, "more_body": True})
        finally:
            pings.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Any) -> None:
        while True:
            silence = time.monotonic() - self._latest
            if silence >= self._ping_seconds:
                self._latest = time.monotonic()
                await send({"type": "http.response.body", "body": PING, "more_body": True})
            else:
                await asyncio.sleep(self._ping_seconds - silence)


async def unless_gone(request: HttpRequest, work: Awaitable[Result]) -> Result:
    """Do some work for a client who waits for it; cancel it when the client leaves.

    Raises:
        ApiError: 499, which nobody reads: the client is gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client left", None, "client_gone")
    finally:
        gone.cancel()
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _disconnect(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
