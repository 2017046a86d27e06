"""Processes: many as one (start, sum, agree, end), and how one is asked to stop. Started by torchrun; alone, the
functions that sum and agree change nothing.

Knows nothing of models: it moves numbers and gradients.
"""

import ctypes
import hashlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from glasshouse.device import Device
from glasshouse.errors import InputError

BUCKET = 2**22
"""Numbers summed in one message."""


@contextmanager
def process_group(device: Device) -> Iterator[None]:
    """Join the processes that torchrun started for as long as the block runs."""
    if device.world_size == 1:
        yield
        return
    _die_with_parent()
    dist.init_process_group("nccl" if device.kind == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _die_with_parent() -> None:
    """Ask the kernel to end this worker when its launcher dies, or a killed torchrun leaves workers writing."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return
    if os.getppid() == 1:
        raise InputError("the launcher is gone", "torchrun", "start the run again")


def sum_numbers(numbers: list[float]) -> list[float]:
    """The sum of each number over all processes, in float64."""
    if not dist.is_initialized():
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64)
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()
    dist.all_reduce(tensor)
    return tensor.tolist()


def sum_gradients(gradients: list[Tensor]) -> None:
    """Replace each gradient by its sum over all processes, in messages of bounded size."""
    if not dist.is_initialized():
        return
    bucket: list[Tensor] = []
    for gradient in gradients:
        bucket.append(gradient)
        if sum(tensor.numel() for tensor in bucket) >= BUCKET:
            _sum_bucket(bucket)
            bucket = []
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in bucket])
    dist.all_reduce(flat)
    for tensor, piece in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(piece.view_as(tensor))


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process: they all get the same answer."""
    return sum_numbers([float(flag)])[0] > 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def require_agreement(name: str, value: str) -> None:
    """Refuse to go on when the processes differ in a value, for example their configs.

    Raises:
        InputError: they differ.
    """
    if not dist.is_initialized():
        return
    digest = int(hashlib.sha256(value.encode()).hexdigest()[:12], 16)
    total = sum_numbers([float(digest)])[0]
    if any_process(total != float(digest) * dist.get_world_size()):
        raise InputError(
            f"the processes differ in {name}", "torchrun", "start every process with the same command"
        )


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a flag that training asks for between pieces of work; a second Ctrl-C ends at once.

    With several processes, all get the same answer as soon as one of them was signalled.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> "StopSignal":
        self.before = [
            (number, signal.signal(number, self._receive)) for number in (signal.SIGTERM, signal.SIGINT)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before:
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True

    def __call__(self) -> bool:
        """Whether to stop."""
        return any_process(self.received)
