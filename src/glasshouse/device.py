"""Where and how a stage computes: device, number format, seed, threads and rank, in one small frozen value; and what
memory it holds.

There are no globals to set and none to read: whoever computes is handed a `Device`. Knows nothing of models.
"""

import ctypes
import os
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from glasshouse.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Device:
    """Device, number format, seed, threads and rank of one process.

    Args:
        kind: "cpu", "cuda" or "mps".
        dtype: what matrices are multiplied in: "float32" or "bfloat16".
        seed: the seed from which every random choice of the stage is derived.
        threads: CPU threads that PyTorch may use.
        rank: number of this process, from 0.
        world_size: number of processes.
    """

    kind: str
    dtype: str
    seed: int
    threads: int
    rank: int = 0
    world_size: int = 1

    @property
    def torch_device(self) -> torch.device:
        """The torch device: on CUDA the one of this process."""
        return (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            if self.kind == "cuda"
            else torch.device(self.kind)
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """The torch number format of parameters and activations."""
        return DTYPES[self.dtype]


def open_device(device: str = "auto", dtype: str = "auto", seed: int = 0, threads: int = 0) -> Device:
    """Choose the device and set the process up for it.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "mps".
        dtype: "auto" (bfloat16 where the machine multiplies it fast), "float32" or "bfloat16".
        seed: seed of the stage.
        threads: CPU threads; 0 takes every core this process may use.

    Raises:
        InputError: the device or format is unknown or not there.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = next(name for name in ("cuda", "mps", "cpu") if available[name]) if device == "auto" else device
    if kind not in available:
        raise InputError(f"unknown device {device!r}", "--device", "use auto, cpu, cuda or mps")
    if not available[kind]:
        raise InputError(
            f"no {kind} device on this machine",
            "--device",
            "use --device cpu, or install a PyTorch built for it",
        )
    if dtype == "auto":
        dtype = "bfloat16" if _multiplies_bfloat16(kind) else "float32"
    if dtype not in DTYPES:
        raise InputError(f"unknown number format {dtype!r}", "--dtype", "use auto, float32 or bfloat16")
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    if kind == "cpu":
        _keep_large_buffers()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Device(kind, dtype, seed, threads, rank, world_size)


def _multiplies_bfloat16(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_bf16_supported()
    return kind == "cpu" and torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportAttributeAccessIssue]


def _keep_large_buffers() -> None:
    """Make glibc keep freed activations instead of giving them back to the kernel after every step: the page faults
    of fetching them again cost about 10 % of a training step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        return  # not glibc: its allocator decides by itself


def process_memory() -> int:
    """Bytes that this process holds in RAM now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def forget_peak_memory(device: Device) -> None:
    """Let `peak_memory` count from now on; where the system cannot, it goes on counting from the process's start."""
    if device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of resident memory


def peak_memory(device: Device) -> int:
    """Most bytes held since `forget_peak_memory`: of the GPU where there is one, else of this process's RAM."""
    if device.kind == "cuda":
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
