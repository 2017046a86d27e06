"""Programs that must not get out: to the network, to files, to more processes, time, memory or output than they may have."""

import os
from pathlib import Path

import pytest

from glasshouse.errors import InputError
from glasshouse.tasks import sandbox
from glasshouse.tasks.sandbox import OUTPUT_BYTES, SandboxLimits, SandboxResult, run_python

LIMITS = SandboxLimits(seconds=1, memory=2**28)


def run(code: str) -> SandboxResult:
    if not sandbox.is_available():
        pytest.skip("this machine lets no program be shut in")
    return run_python(code, LIMITS)


def test_a_plain_program_passes() -> None:
    code = "import collections, json, re\nopen('note', 'w').write('x')\nprint(json.dumps({'sum': sum(range(10))}))"
    assert run(code) == SandboxResult("passed", '{"sum": 45}\n')


def test_a_program_that_fails_says_why() -> None:
    result = run("def double(x):\n    return x + x\nassert double(2) == 5, 'five'")
    assert result.status == "failed"
    assert "AssertionError: five" in result.output


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', 22), 1); print('OUT')",
        "import socket; socket.create_connection(('1.1.1.1', 53), 1); print('OUT')",
        "import socket; socket.getaddrinfo('example.com', 80); print('OUT')",
        "import os; os.fork(); print('OUT')",
        "import threading; threading.Thread(target=print, args=('OUT',)).start()",
        "import subprocess; subprocess.run(['true']); print('OUT')",
        "import os; os.posix_spawn('/bin/true', ['true'], {}); print('OUT')",
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0\nprint('OUT')",
        "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/task', b'tmpfs', 0, None) == 0\nprint('OUT')",
        "open('/etc/passwd').read(); print('OUT')",
        "open('/usr/lib/mark', 'w'); print('OUT')",
        "import os; os.chroot('/task'); print('OUT')",
        "bytearray(10 * 2**30); print('OUT')",
        "open('big', 'wb').write(bytes(2**22)); print('OUT')",
    ],
)
def test_what_a_program_may_not_do_fails(code: str) -> None:
    result = run(code)
    assert result.status == "failed"
    assert "OUT\n" not in result.output


def test_a_fork_bomb_makes_nothing() -> None:
    result = run(
        "import os\nwhile True:\n    try:\n        os.fork()\n        print('OUT')\n    except OSError: pass"
    )
    assert result.status in ("failed", "killed")
    assert "OUT" not in result.output


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(1000)"])
def test_what_does_not_end_is_ended(code: str) -> None:
    assert run(code).status in ("failed", "killed")


def test_huge_output_is_cut() -> None:
    result = run("while True: print('x' * 1000)")
    assert result.status == "killed"
    assert len(result.output) == OUTPUT_BYTES


def test_nothing_of_ours_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, variable, handle or process of the one who runs it."""
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setenv("SECRET", "secret")
    handle = os.open(tmp_path / "secret", os.O_RDONLY)
    os.set_inheritable(handle, True)
    code = f"""import os
assert not os.path.exists({str(tmp_path)!r})
assert not dict(os.environ) and not os.listdir('.')
assert set(os.listdir('/proc/self/fd')) <= {{'0', '1', '2', '3'}}
assert sum(name.isdigit() for name in os.listdir('/proc')) <= 2
assert b'SECRET' not in open('/proc/self/environ', 'rb').read()
assert b'SECRET' not in open('/proc/1/environ', 'rb').read()
"""
    try:
        assert run(code) == SandboxResult("passed", "")
    finally:
        os.close(handle)


def test_where_it_cannot_be_shut_in_it_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "is_available", lambda: False)
    with pytest.raises(InputError, match="cannot be shut in"):
        run_python("print(1)")
