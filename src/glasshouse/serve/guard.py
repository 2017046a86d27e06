"""The door: who may come in, what they may bring, how long they may take; and one log line for everyone who came.

ASGI middleware around the whole application, before any of its code runs: Host and Origin (a page of somebody else's
must not reach a server on this machine, not even by a name that it lets point here), the key, the size and the time of
the body, and whether the house is ready. Knows bytes and headers; nothing of models or of what a request asks for.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import secrets
import traceback
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from glasshouse.serve.metrics import Line, Log, Metrics
from glasshouse.serve.models import House
from glasshouse.serve.openai import TYPES, ApiError, to_json

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/health", "/ready")
"""Need no key, and answer while the house is loading or draining."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
SAFE_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Limits:
    """What one request may be.

    Args:
        body_bytes: longest body.
        body_seconds: longest time for a body to arrive.
        header_bytes: longest header, all lines together.
        header_lines: most lines of a header.
        header_seconds: longest time for a header to arrive.
        request_seconds: longest time for everything, the answer's way to the client included.
        linger_seconds: how long what is left of a refused body is still read, so that the refusal is not lost with the
            connection.
        connections: most connections at once.
    """

    body_bytes: int = 8 * 2**20
    body_seconds: float = 30.0
    header_bytes: int = 32 * 2**10
    header_lines: int = 100
    header_seconds: float = 10.0
    request_seconds: float = 600.0
    linger_seconds: float = 2.0
    connections: int = 1024


class Guard:
    """The middleware.

    Args:
        app: the application behind the door.
        house: says whether it is loading, ready or draining.
        metrics: counts requests and errors.
        log: gets a line per request.
        limits: what a request may be.
        key: what a request must show; empty for none.
        names: host names the server answers to, besides addresses in numbers and this machine's own names.
    """

    def __init__(
        self,
        app: Application,
        house: House,
        metrics: Metrics,
        log: Log,
        limits: Limits,
        key: str = "",
        names: Iterable[str] = (),
    ):
        self._app, self._house, self._metrics, self._log, self._limits = app, house, metrics, log, limits
        self._key = _digest(key.encode()) if key else None
        self._names = frozenset(name.lower() for name in (*LOCAL_NAMES, *names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        line = _line(scope)
        scope.setdefault("state", {})["line"] = line
        answer = _Answer(send, line.request)
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                headers = _headers(scope)
                self._admit(scope, headers)
                body = await self._read_body(headers, receive)
                await self._app(scope, _replay(body, receive), answer.send)
        except TimeoutError:
            await self._refuse(answer, line, ApiError(504, "the request took too long", None, "timeout"))
        except ApiError as error:
            await self._refuse(answer, line, error)
        except asyncio.CancelledError:
            answer.status = answer.status or 503
            raise
        except Exception as error:  # a fault of ours: the client gets an error object, the log says where
            line.note(error=describe_fault(error))
            message = "an error inside the server; its log says more"
            await self._refuse(answer, line, ApiError(500, message, None, "internal_error"))
        finally:
            self._finish(scope, line, answer)

    def _admit(self, scope: Scope, headers: dict[str, str]) -> None:
        """Everything that can be said before the body is read."""
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self._limits.header_bytes or len(scope["headers"]) > self._limits.header_lines:
            raise ApiError(431, "the header is too large", None, "header_too_large")
        if "content-length" in headers and "transfer-encoding" in headers:
            raise ApiError(
                400, "content-length and transfer-encoding contradict each other", None, "bad_framing"
            )
        self._check_host(headers)
        path = scope["path"]
        if path in OPEN_PATHS:
            return
        if self._key is not None and not _shows(headers.get("authorization", ""), self._key):
            raise ApiError(
                401, "no key or a wrong one: send Authorization: Bearer KEY", None, "invalid_api_key"
            )
        if self._house.phase != "ready":
            raise ApiError(503, f"the server is {self._house.phase}", None, self._house.phase, retry_after=5)

    def _check_host(self, headers: dict[str, str]) -> None:
        host = _host_name(headers.get("host", ""))
        if host not in self._names and not _is_address(host):
            message = f"this server does not answer to {host[:100]!r}: allow it with --names {host[:100]}"
            raise ApiError(403, message, None, "unknown_host")
        origin = headers.get("origin")
        if origin is not None:
            place = origin.partition("://")[2].lower()
            if place != headers["host"].lower() and _host_name(place) not in self._names - set(LOCAL_NAMES):
                raise ApiError(403, "requests from pages of other sites are refused", None, "foreign_origin")

    async def _read_body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body, within its limits of size and time."""
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return b""
        most = self._limits.body_bytes
        too_large = ApiError(413, f"the body is longer than {most:,} bytes", None, "body_too_large")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or len(length) > 19 or int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(499, "the client left", None, "client_gone")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", None, "slow_body") from None

    async def _refuse(self, answer: "_Answer", line: Line, error: ApiError) -> None:
        """Answer with an error object; where an answer has begun, only the connection can be cut."""
        line.note(code=error.code or "")
        if answer.status:
            if not answer.complete:
                raise ConnectionResetError("the answer was cut short")
            return
        if error.status == 499:
            answer.status = 499
            return
        body = to_json(error.body)
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        if error.status == 401:
            # A browser that opens the page asks for the key when it reads "Basic"; a program is told "Bearer".
            basic = not line.path.startswith("/v1")
            headers["www-authenticate"] = 'Basic realm="glasshouse"' if basic else "Bearer"
        if error.code in (
            "bad_framing",
            "header_too_large",
        ):  # nobody knows where the next request would begin
            headers["connection"] = "close"
        raw = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        with suppress(OSError):
            await answer.send({"type": "http.response.start", "status": error.status, "headers": raw})
            await answer.send({"type": "http.response.body", "body": body})

    def _finish(self, scope: Scope, line: Line, answer: "_Answer") -> None:
        status = answer.status
        if not answer.complete and status != 499:
            line.note(cut="yes")
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self._metrics.requests.labels(path, str(status)).inc()
        if status >= 400:
            self._metrics.errors.labels(path, TYPES.get(status, "server_error")).inc()
        self._log.write(line, status)


class _Answer:
    """What goes out: remembers the status and adds the headers every answer has."""

    def __init__(self, send: Send, request: str):
        self._send, self._request, self.status, self.complete = send, request, 0, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            added = {**SAFE_HEADERS, "x-request-id": self._request}
            present = {bytes(name).lower() for name, _ in message.get("headers", [])}
            more = [(n.encode(), v.encode()) for n, v in added.items() if n.encode() not in present]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete = True
        await self._send(message)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first and then what comes."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        if first:
            return first.pop()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return message

    return replay


def _line(scope: Scope) -> Line:
    client = scope.get("client")
    path = scope.get("path", "")
    return Line(f"req_{secrets.token_hex(8)}", str(client[0]) if client else "-", scope["method"], path)


def _headers(scope: Scope) -> dict[str, str]:
    """The header by lower-case name; a name that comes twice counts the first time only where it must be single."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in found and key in ("host", "origin", "authorization", "content-length", "content-type"):
            raise ApiError(400, f"the header has {key} twice", None, "bad_framing")
        found[key] = value.decode("latin-1")
    return found


def _host_name(host: str) -> str:
    """A Host header's name without the port: "localhost:8000" is localhost, "[::1]:8000" is ::1."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower() if host.count(":") == 1 else host.lower()


def _is_address(host: str) -> bool:
    """Whether a host is an address in numbers: no name was looked up, so none can have been made to point here."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _shows(authorization: str, key: bytes) -> bool:
    """Whether a header shows the key, in a time that does not depend on how much of it is right."""
    kind, _, value = authorization.partition(" ")
    given = value.strip().encode("latin-1", "replace")
    if kind.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).partition(b":")[2]
        except ValueError:
            given = b""
    return hmac.compare_digest(_digest(given), key) and kind.lower() in ("bearer", "basic")


def describe_fault(error: BaseException) -> str:
    """A fault in a few words: its kind, what it says, and the place in the code; whoever logs it escapes it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {str(error)[:300]}{place}"
