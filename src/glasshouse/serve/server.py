"""The server as a process: what the verb `serve` does, and uvicorn with limits.

The port is taken first and opened last, so that a port in use and a torn model are both said at once and no client ever
reaches a server that cannot answer. Knows sockets, signals and uvicorn; nothing of requests.
"""

import asyncio
import contextlib
import errno
import ipaddress
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from glasshouse.device import open_device
from glasshouse.errors import InputError
from glasshouse.inference.request import EngineSettings
from glasshouse.serve.app import create_app
from glasshouse.serve.guard import Application, Guard, Limits
from glasshouse.serve.metrics import Log, Metrics
from glasshouse.serve.models import House, open_models
from glasshouse.serve.openai import ApiError, to_json

KEY_VARIABLE = "GLASSHOUSE_KEY"
SHORTEST_KEY = 8


@dataclass(frozen=True)
class ServeConfig:
    """How models are served.

    Args:
        host: the address to listen on; any other than this machine's own loopback needs a key.
        port: the port; 0 takes a free one.
        key: what requests must show as `Authorization: Bearer KEY`; better given as the variable GLASSHOUSE_KEY.
        names: further host names by which clients reach this server, behind a proxy for example.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32 or bfloat16.
        quantize: int8 or int4 for weights of 8 or 4 bits; what they cost is measured and printed.
        threads: CPU threads; 0 for all cores.
        cache_tokens: tokens whose keys and values are kept, of all requests together; 0 to fit the memory.
        max_batch: most requests that are answered at once.
        max_queue: most requests that wait.
        request_seconds: longest time one request may take.
        drain_seconds: how long requests under way may go on when the server is told to stop.
        log_prompts: write the text of prompts into the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str = ""
    names: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str = "auto"
    quantize: Literal["int8", "int4"] | None = None
    threads: int = 0
    cache_tokens: int = 0
    max_batch: int = 64
    max_queue: int = 256
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"port is {self.port}", "--port", "give a number from 0 to 65535")
        for name in ("request_seconds", "drain_seconds"):
            if not 0 <= getattr(self, name) <= 86_400:
                raise InputError(f"{name} is {getattr(self, name)}", f"--{name}", "give 0 to 86400 seconds")


def serve(paths: Sequence[str], config: ServeConfig) -> int:
    """Serve models until told to stop.

    Args:
        paths: runs or model folders; NAME=PATH gives a name.
        config: how.

    Returns:
        The exit code: 0 when every request under way was finished.

    Raises:
        InputError: no key for an address that others reach, a port in use, or a model that cannot be served.
    """
    key = config.key or os.environ.get(KEY_VARIABLE, "")
    require_key(config.host, key)
    with take_port(config.host, config.port) as listener:
        device = open_device(config.device, config.dtype, threads=config.threads)
        settings = EngineSettings(config.cache_tokens, max_batch=config.max_batch, max_queue=config.max_queue)
        house = House(
            open_models(paths, device, config.quantize),
            settings,
            config.log_prompts,
            request_seconds=config.request_seconds,
        )
        limits = replace(Limits(), request_seconds=config.request_seconds + 30)
        names = (config.host, socket.gethostname(), *config.names)
        application = build(house, Log(), limits, key, names)
        print(welcome(house, listener, key), flush=True)
        server = Server(application, house, limits, config.drain_seconds)
        server.run(sockets=[listener])
    if server.fault is not None:
        raise server.fault
    return 0


def build(
    house: House, log: Log, limits: Limits | None = None, key: str = "", names: Sequence[str] = ()
) -> Application:
    """The whole application: the routes behind their door."""

    def statistics() -> dict[str, Any]:
        threads = {name: served.thread for name, served in house.models.items()}
        return {name: thread.engine.statistics for name, thread in threads.items() if thread is not None}

    metrics = Metrics(statistics)
    return Guard(create_app(house, metrics), house, metrics, log, limits or Limits(), key, names)


def require_key(host: str, key: str) -> None:
    """Refuse to let others in without a key.

    Raises:
        InputError: the address is reached from elsewhere and there is no key, or one that is quickly guessed.
    """
    if key and (not key.isascii() or not key.isprintable() or " " in key):
        raise InputError("the key has characters that no header may hold", "--key", "use letters and digits")
    if is_loopback(host):
        return
    if not key:
        raise InputError(
            f"{host} is reached by others and there is no key", "--host",
            f"set {KEY_VARIABLE} to a long random word, or listen on 127.0.0.1",
        )  # fmt: skip
    if len(key) < SHORTEST_KEY:
        raise InputError(
            "the key is short enough to guess", "--key", f"give {SHORTEST_KEY} characters or more"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def take_port(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not listening yet.

    Raises:
        InputError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = (
            "the port is in use"
            if error.errno == errno.EADDRINUSE
            else f"cannot listen: {error.strerror or error}"
        )
        fix = (
            "stop what uses it, or give another --port"
            if error.errno == errno.EADDRINUSE
            else "give another --host or --port"
        )
        raise InputError(reason, f"{host}:{port}", fix) from None
    return listener


def welcome(house: House, listener: socket.socket, key: str) -> str:
    """What is served, where, and how to talk to it."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else "127.0.0.1" if host in ("0.0.0.0", "::") else host
    address, lines = f"http://{shown}:{port}", []
    for served in house.models.values():
        kind = f"writes at most {served.context_length:,} tokens" if served.writes else "embeds texts"
        lines.append(
            f"{served.name}: {served.parameters / 1e6:,.1f} million parameters, {kind}, from {served.artifact.path}"
        )
        lines += [f"  {served.note}"] if served.note else []
    first = next(iter(house.models.values()))
    chat = first.writes and first.artifact.tokenizer.chat_template
    body = {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Once"}
    path = "chat/completions" if chat else "completions"
    if not first.writes:
        path, body = "embeddings", {"input": "Hello"}
    data = to_json({"model": first.name, **body}).decode()
    shown_key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if key else ""
    curl = f"curl {address}/v1/{path} -H 'Content-Type: application/json'{shown_key} -d {shlex.quote(data)}"
    return "\n".join(
        [*lines, f"\n{address} : the page;  {address}/v1 : the API;  Ctrl-C stops it\n", curl, ""]
    )


class Server(uvicorn.Server):
    """uvicorn, with a house that is loaded when the port is open and drained before it closes.

    Args:
        application: what answers.
        house: loaded and closed here.
        limits: of connections and headers.
        drain_seconds: how long requests under way may go on after the first signal; a second ends them at once.
    """

    def __init__(self, application: Application, house: House, limits: Limits, drain_seconds: float):
        def protocol(*values: Any, **options: Any) -> asyncio.Protocol:
            return GuardedProtocol(limits, *values, **options)

        super().__init__(
            uvicorn.Config(
                application,
                http=protocol,  # pyright: ignore[reportArgumentType]  (called like the class it stands for)
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # the door writes the log: one line a request, escaped
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
                h11_max_incomplete_event_size=limits.header_bytes,
                proxy_headers=False,
            )
        )
        self.house, self.drain_seconds = house, drain_seconds
        self.fault: InputError | None = None
        self._hurry = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port; the models are loaded beside it."""
        await super().startup(sockets)
        self._loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        try:
            await asyncio.to_thread(self.house.load)
            print("ready", flush=True)
        except Exception as error:
            known = error if isinstance(error, InputError) else None
            self.fault = known or InputError(f"cannot load: {type(error).__name__}: {error}", "", "")
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is under way, refuse what is new, then close the port."""
        self.house.phase = "draining"
        deadline = asyncio.get_running_loop().time() + self.drain_seconds
        while self.house.work and asyncio.get_running_loop().time() < deadline and not self._hurry.is_set():
            await asyncio.sleep(0.05)
        error = ApiError(503, "the server stopped before the answer was finished", None, "stopped")
        self.house.fail_work(error)
        await super().shutdown(sockets)
        await asyncio.to_thread(self.house.close)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C stop the server, each in order; a second one does not wait any longer."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def stop() -> None:
            if self.should_exit:
                self._hurry.set()
            self.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which drops who sends a header too slowly, too long or not at all.

    Args:
        limits: of connections and headers.
        values: as uvicorn gives them.
        options: as uvicorn gives them.
    """

    def __init__(self, limits: Limits, *values: Any, **options: Any):
        super().__init__(*values, **options)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A client came."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._send_error(ApiError(503, "too many connections", None, "too_many_connections", 2))
            return
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """It left."""
        self._forget_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """It sent something."""
        if self._timer is None and self.conn.their_state is h11.IDLE:
            self._await_header()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_timer()
        if self.conn.their_state is not h11.SEND_BODY and self._linger is not None:
            self._linger.cancel()

    def eof_received(self) -> None:
        """It will send nothing more: in the midst of a request that is an error."""
        unread = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if unread or self.conn.their_state is h11.SEND_BODY:
            self.send_400_response("The request was not finished.")

    def on_response_complete(self) -> None:
        """The answer is out; whoever is still sending gets a moment to read it."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._linger = self.loop.call_later(self._limits.linger_seconds, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, with the status that says what is wrong with it."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        text = "the header is too large" if status == 431 else msg.rstrip(".").lower()
        self._send_error(ApiError(status, text, None, "bad_http"))

    def _await_header(self) -> None:
        self._forget_timer()
        self._timer = self.loop.call_later(self._limits.header_seconds, self._drop_slow)

    def _drop_slow(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self._send_error(ApiError(408, "the header did not arrive in time", None, "slow_header"))

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _send_error(self, error: ApiError) -> None:
        """An error object, and the end of the connection."""
        self._forget_timer()
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = to_json(error.body)
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
            }
            raw = [(name.encode(), value.encode()) for name, value in {**headers, **error.headers}.items()]
            reason = STATUS_PHRASES[error.status]
            for event in (
                h11.Response(status_code=error.status, headers=raw, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
