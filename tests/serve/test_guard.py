"""The door: who may come in and what they may bring; a fault inside lets nothing out."""

import asyncio
import base64
import hmac
import io
from typing import Any

import httpx2
import pytest
from tests.serve.conftest import Live

from glasshouse.serve.guard import Guard, Limits
from glasshouse.serve.metrics import Log, Metrics
from glasshouse.serve.models import House

KEY = "correct horse battery".replace(" ", "-")


def door(app: Any = None, key: str = "", names: tuple[str, ...] = (), phase: Any = "ready", **limits: Any):
    """A door before a tiny application, and its log."""

    async def echo(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"in:" + body})

    house, output = House({}), io.StringIO()
    house.phase = phase
    return Guard(app or echo, house, Metrics(dict), Log(output), Limits(**limits), key, names), output


def send(
    guard: Guard, path: str = "/v1/x", method: str = "GET", url: str = "http://localhost:8000", **options: Any
):
    """One request through the door."""

    async def ask() -> httpx2.Response:
        transport = httpx2.ASGITransport(guard, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url=url) as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:99", "127.0.0.1:8000", "[::1]:8000", "192.168.1.5", "LOCALHOST"]
)
def test_own_names_and_addresses_in_numbers_are_answered(host: str):
    guard, _ = door()
    assert send(guard, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "[evil]"],
)
@pytest.mark.parametrize("path", ["/", "/health", "/v1/chat/completions"])
def test_a_name_that_was_made_to_point_here_is_refused(host: str, path: str):
    guard, _ = door()
    answer = send(guard, path, headers={"host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "unknown_host"


def test_names_that_are_allowed():
    guard, _ = door(names=("models.example.org",))
    assert send(guard, headers={"host": "models.example.org"}).status_code == 200
    assert (
        send(guard, headers={"host": "localhost", "origin": "https://models.example.org"}).status_code == 200
    )


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://localhost:3000",
        "https://localhost",
        "file://",
        "http://localhost:8000.evil.example",
    ],
)
def test_pages_of_other_sites_are_refused(origin: str):
    guard, _ = door()
    for method in ("GET", "POST", "DELETE", "OPTIONS"):
        answer = send(guard, method=method, headers={"origin": origin, "host": "localhost:8000"})
        assert answer.status_code == 403, (origin, method)
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_the_servers_own_page_is_answered():
    guard, _ = door()
    own = {"origin": "http://localhost:8000", "host": "localhost:8000"}
    assert send(guard, method="POST", headers=own, content=b"x").text == "in:x"


def basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"me:{key}".encode()).decode()


@pytest.mark.parametrize(
    "shown",
    [
        "",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer",
        "Bearer ",
        KEY,
        f"Token {KEY}",
        basic("no"),
        "Basic !!",
        "Bearer \xff",
    ],
)
@pytest.mark.parametrize(
    "path", ["/", "/metrics", "/v1/models", "/openapi.json", "/nowhere", "/v1/chat/completions"]
)
def test_without_the_key_nothing_is_said(path: str, shown: str):
    guard, _ = door(key=KEY)
    headers = {b"authorization": shown.encode("latin-1")} if shown else {}
    answer = send(guard, path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == (
        "Bearer" if path.startswith("/v1") else 'Basic realm="glasshouse"'
    )
    assert send(guard, path, params={"key": KEY, "api_key": KEY}).status_code == 401


def test_with_the_key_everything_is_open_and_health_always():
    guard, _ = door(key=KEY)
    for shown in (f"Bearer {KEY}", f"bearer {KEY}", basic(KEY)):
        assert send(guard, headers={"authorization": shown}).status_code == 200
    assert send(guard, "/health").status_code == 200
    assert send(guard, "/ready").status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch):
    """Digests of one length go into hmac.compare_digest, whatever was sent."""
    seen: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def watch(left: bytes, right: bytes) -> bool:
        seen.append((len(left), len(right)))
        return real(left, right)

    monkeypatch.setattr(hmac, "compare_digest", watch)
    guard, _ = door(key=KEY)
    for shown in ("", "Bearer x", f"Bearer {KEY}", "Basic !!"):
        send(guard, headers={"authorization": shown})
    assert seen == [(32, 32)] * 4


@pytest.mark.parametrize(("phase", "status"), [("loading", 503), ("draining", 503), ("ready", 200)])
def test_before_and_after(phase: str, status: int):
    guard, _ = door(phase=phase)
    answer = send(guard, method="POST", content=b"x")
    assert answer.status_code == status
    if status == 503:
        assert answer.json()["error"]["code"] == phase
        assert int(answer.headers["retry-after"]) > 0
    assert send(guard, "/health").status_code == 200


def raw(guard: Guard, headers: list[tuple[bytes, bytes]], messages: Any) -> tuple[int, list[Any]]:
    """One POST whose body comes as given; the status and what was sent."""
    sent: list[Any] = []

    async def receive() -> Any:
        for message in messages:
            if isinstance(message, float):
                await asyncio.sleep(message)
            else:
                return message
        raise AssertionError("read on after the end")

    async def gather(message: Any) -> None:
        sent.append(message)

    messages = iter(messages)
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/x",
        "client": ("1.2.3.4", 5),
        "asgi": {"version": "3.0"},
    }
    asyncio.run(guard({**scope, "headers": [(b"host", b"localhost"), *headers]}, receive, gather))
    return (sent[0]["status"] if sent else 0), sent


def chunk(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def endless():
    while True:
        yield chunk(b"x" * 1000)


def test_bodies_have_a_size_and_a_time():
    guard, _ = door(body_bytes=10_000, body_seconds=0.05)
    length = (b"content-length", b"10001")
    assert raw(guard, [length], [])[0] == 413
    for value in (b"1000000000", b"9" * 100, b"-1", b"0x10", b"1e3", "٣".encode()):
        assert raw(guard, [(b"content-length", value)], [])[0] == 413
    assert raw(guard, [(b"transfer-encoding", b"chunked")], endless())[0] == 413
    assert raw(guard, [(b"content-length", b"9")], [chunk(b"x"), 10.0])[0] == 408
    both = [(b"transfer-encoding", b"chunked"), (b"content-length", b"4")]
    assert raw(guard, both, [])[0] == 400
    assert raw(guard, [(b"content-length", b"4")] * 2, [])[0] == 400
    assert (
        raw(guard, [(b"content-length", b"4")], [chunk(b"ab"), chunk(b"cd", False)])[1][1]["body"]
        == b"in:abcd"
    )
    assert raw(guard, [(b"content-length", b"4")], [{"type": "http.disconnect"}]) == (0, [])


def test_headers_have_a_size():
    guard, _ = door(header_bytes=1000, header_lines=20)
    assert send(guard, headers={"x-long": "x" * 1000}).status_code == 431
    assert send(guard, headers={f"x-{number}": "1" for number in range(30)}).status_code == 431
    assert send(guard, headers={"x-long": "x" * 500}).status_code == 200


def test_a_request_has_a_time():
    async def sleep(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    guard, output = door(sleep, request_seconds=0.05)
    assert send(guard).status_code == 504
    assert " 504 " in output.getvalue()


def test_a_fault_inside_says_nothing_and_logs_where():
    async def fail(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("secret\n\x1b[31m")

    guard, output = door(fail)
    answer = send(guard)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    [line] = output.getvalue().splitlines()
    assert "ValueError: secret" in line
    assert "test_guard.py" in line
    assert "\x1b" not in line


def test_one_line_per_request_whatever_is_asked():
    guard, output = door()
    paths = ["/a%0Ab", "/%1b[2J", "/%e2%80%ae", '/"quote"', "/a b", "/%7f"]
    for path in paths:
        send(guard, path)
    lines = output.getvalue().splitlines()
    assert len(lines) == len(paths) == output.getvalue().count("\n")
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert all(" 127.0.0.1 GET " in line and " 200 " in line and " req_" in line for line in lines)


def test_answers_carry_the_headers_that_browsers_obey():
    guard, _ = door(key=KEY)
    for answer in (send(guard), send(guard, headers={"authorization": f"Bearer {KEY}"})):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/page/index.html",
        "//etc/passwd",
        "/index.html%00.js",
        "/.git/config",
        "/__init__.py",
        "/v1/models/../../x",
        "/v1/models/%2e%2e%2fetc%2fpasswd",
    ],
)
def test_no_path_leads_out_of_the_page(live: Live, path: str):
    answer = live.client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
    assert "root:" not in answer.text


def test_the_error_object_is_everywhere(live: Live):
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/health", 405),
        ("GET", "/v1/nowhere/x", 404),
        ("POST", "/v1/models", 405),
    ):
        answer = live.client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["content-type"] == "application/json"
    assert live.client.get("/v1/completions").headers["allow"] == "POST"
