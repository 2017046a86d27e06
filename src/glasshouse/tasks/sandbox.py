"""Running Python that nobody has read: in a process of its own, without network, with little time, memory and disk.

What holds it, on Linux: namespaces of its own (user, network, processes, mounts) in which every folder but an empty one
and the interpreter's own is out of sight or cannot be written, limits of the kernel on CPU time, memory and files, a
filter that lets it start no process, no inherited handles or environment, and the end of its whole group of processes after a wall-clock time. Where
namespaces are not to be had, it refuses. It is a fence against accidents and tricks of generated code, not against
somebody who holds a fault of the kernel.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from glasshouse.errors import InputError

OUTPUT_BYTES = 64 * 2**10
"""Most of a program's output that is kept; one that writes more is ended."""

INSIDE = r"""
set -e
root=$1 code=$2 python=$3; shift 3
mount -t tmpfs -o size=16m,mode=755 none "$root"
for folder in "$@"; do
  mkdir -p "$root$folder"
  mount --bind "$folder" "$root$folder"
  mount -o remount,bind,ro,nosuid "$root$folder"
done
mkdir -p "$root/task" "$root/proc" "$root/dev"
mount -t proc none "$root/proc"
for device in null zero urandom; do : > "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
cp "$code" "$root/program.py"
mount -o remount,ro,bind "$root/proc"
cd "$root"
exec chroot "$root" "$python" -I -S -c "$GLASSHOUSE_LIMITS"
"""
"""Makes the room that the program sees: the interpreter, an empty /task, and nothing else."""

LIMITS = r"""
import os, resource as r, sys
seconds, memory = {seconds}, {memory}
r.setrlimit(r.RLIMIT_CPU, (seconds, seconds + 1))
r.setrlimit(r.RLIMIT_AS, (memory, memory))
r.setrlimit(r.RLIMIT_FSIZE, (2**20, 2**20))
r.setrlimit(r.RLIMIT_NOFILE, (32, 32))
r.setrlimit(r.RLIMIT_CORE, (0, 0))
code = open('/program.py', encoding='utf-8').read()
os.environ.clear()
os.chdir('/task')
import ctypes
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
for number in range(64):
    libc.prctl(24, number, 0, 0, 0)
header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
if libc.capset(header, nothing):
    sys.exit('capabilities stay')
calls = {{'x86_64': (0xC000003E, 56, 57, 58, 272, 308, 435), 'aarch64': (0xC00000B7, 220, 97, 268, 435)}}
arch, *refused = calls[os.uname().machine]
ops = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
ops += [(0x35, len(refused) + 1, 0, 0x40000000)]
ops += [(0x15, len(refused) - place, 0, number) for place, number in enumerate(refused)]
ops += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]
import struct
text = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *op) for op in ops))
program = ctypes.create_string_buffer(struct.pack('HxxxxxxP', len(ops), ctypes.addressof(text)))
if libc.prctl(22, 2, ctypes.byref(program), 0, 0):
    sys.exit('no filter of calls')
del libc, ctypes, header, nothing, calls, ops, text, program, struct
exec(compile(code, 'program.py', 'exec'), {{'__name__': '__main__'}})
"""
"""Runs inside, before the program: limits, every right of the new namespaces given up for good, and a filter of the
kernel's calls (seccomp) that refuses to make a process, a thread or a namespace: the kernel's own limit on processes
does not bind root."""


@dataclass(frozen=True)
class SandboxLimits:
    """What a program may use.

    Args:
        seconds: of CPU time; it may take twice as long by the clock.
        memory: bytes of address space.
    """

    seconds: int = 5
    memory: int = 2**29


@dataclass(frozen=True)
class SandboxResult:
    """How a program ended.

    Args:
        status: "passed" (it came to its end), "failed" (an error, or a limit it ran into), "killed" (time or output).
        output: what it wrote, errors too, at most `OUTPUT_BYTES`.
    """

    status: str
    output: str


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Whether this machine lets a program be shut in."""
    tools = all(shutil.which(name) for name in ("unshare", "mount", "chroot"))
    return sys.platform == "linux" and tools and _run("print(6 * 7)", SandboxLimits()).output == "42\n"


def run_python(code: str, limits: SandboxLimits | None = None) -> SandboxResult:
    """Run a program that nobody has read.

    Args:
        code: Python; the standard library is there, nothing else.
        limits: what it may use.

    Raises:
        InputError: this machine cannot shut it in; it was not run.
    """
    if not is_available():
        raise InputError(
            "written code cannot be shut in here",
            "the sandbox",
            "use Linux with util-linux and user namespaces allowed",
        )
    return _run(code, limits or SandboxLimits())


def _run(code: str, limits: SandboxLimits) -> SandboxResult:
    numbers = {"seconds": limits.seconds, "memory": limits.memory}
    with tempfile.TemporaryDirectory() as folder:
        program, root = Path(folder, "program.py"), Path(folder, "root")
        program.write_text(code, encoding="utf-8", errors="replace")
        root.mkdir()
        python = str(Path(sys.executable).resolve())
        words = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount", "--ipc",
                 "--uts", "sh", "-c", INSIDE, "sh", str(root), str(program), python, *_folders()]  # fmt: skip
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder,
            env={"PATH": os.environ.get("PATH", os.defpath), "GLASSHOUSE_LIMITS": LIMITS.format(**numbers)},
            close_fds=True, start_new_session=True,
        )  # fmt: skip
        return _watch(process, 2.0 * limits.seconds)


def _folders() -> Sequence[str]:
    """What the interpreter needs: its own folders and the system's libraries."""
    wanted = [Path(sys.base_prefix).resolve(), *map(Path, ("/usr", "/lib", "/lib64", "/bin"))]
    there = [path for path in wanted if path.is_dir()]
    return [str(path) for path in there if not any(other in path.parents for other in there)]


def _watch(process: subprocess.Popen[bytes], seconds: float) -> SandboxResult:
    """Gather a program's output; end its whole group when its time is up or it writes too much."""
    killed = threading.Event()

    def end() -> None:
        killed.set()
        _kill(process)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        assert process.stdout is not None
        output = _read(process.stdout)
        if len(output) > OUTPUT_BYTES:
            end()
        process.wait()
    finally:
        timer.cancel()
        _kill(process)
        process.communicate()
    text = output[:OUTPUT_BYTES].decode("utf-8", "replace")
    if killed.is_set():
        return SandboxResult("killed", text)
    return SandboxResult("passed" if process.returncode == 0 else "failed", text)


def _read(stream: IO[bytes]) -> bytes:
    output = b""
    while len(output) <= OUTPUT_BYTES and (piece := stream.read1(2**14)):  # pyright: ignore[reportAttributeAccessIssue]
        output += piece
    return output


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
