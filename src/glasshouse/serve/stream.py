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
        self._started = time.monotonic()
        self.seconds_to_first = 0.0
        self.count = 0

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
            left = self._started + self.house.request_seconds - time.monotonic()
            try:
                found = await asyncio.wait_for(self._queue.get(), max(left, 0.001))
            except TimeoutError:
                raise ApiError(504, "the answer took too long and was stopped", None, "timeout") from None
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
            self.seconds_to_first = moment - self._started
            self.metrics.first_token.labels(self._served.name).observe(self.seconds_to_first)
        else:
            self.metrics.token_time.labels(self._served.name).observe(moment - latest)
        self.metrics.tokens.labels(self._served.name, "written").inc()
        return moment


class EventStream(StreamingResponse):
    """Server-sent events of a job; the engine gets back what it holds however the sending ends.

    Args:
        events: the encoded events.
        job: closed at the end.
        line: the log's line of it.
    """

    def __init__(self, events: AsyncIterator[bytes], job: Job, line: Line):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(with_pings(events), media_type="text/event-stream", headers=headers)
        self._job, self._line = job, line

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it, ASGI's way."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._line.note(tokens=self._job.count)
            self._job.close()


async def with_pings(events: AsyncIterator[bytes], seconds: float = PING_SECONDS) -> AsyncIterator[bytes]:
    """The events, and a comment whenever none came for so long, so that nobody between takes the line for dead."""
    waiting: asyncio.Future[bytes] = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait({waiting}, timeout=seconds)
            if not done:
                yield PING
                continue
            try:
                event = waiting.result()
            except StopAsyncIteration:
                return
            waiting = asyncio.ensure_future(anext(events))
            yield event
    finally:
        waiting.cancel()


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
