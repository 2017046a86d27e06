"""Saved states: whole or passed over."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from glasshouse.errors import InputError
from glasshouse.training.checkpoint import load_state, save_state, saved_states

TENSORS = {"master.a": torch.arange(6.0).view(2, 3), "step.a": torch.tensor(3.0)}


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    save_state(tmp_path, 3, TENSORS, {"seconds": 1.5})
    tensors, facts, passed_over = load_state(tmp_path)
    assert facts == {"seconds": 1.5, "step": 3}
    assert passed_over == []
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in range(5):
        save_state(tmp_path, step, TENSORS, {})
    assert [path.name for path in saved_states(tmp_path)] == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove"])
def test_a_harmed_state_is_named_and_passed_over(tmp_path: Path, harm: str) -> None:
    save_state(tmp_path, 1, TENSORS, {})
    newest = save_state(tmp_path, 2, TENSORS, {}) / "state.safetensors"
    content = bytearray(newest.read_bytes())
    if harm == "flip":
        content[-3] ^= 1
    newest.write_bytes(b"" if harm == "empty" else content[:-5] if harm == "cut" else bytes(content))
    if harm == "remove":
        newest.unlink()
    _, facts, passed_over = load_state(tmp_path)
    assert facts["step"] == 1
    assert len(passed_over) == 1
    assert "state.safetensors" in passed_over[0]


def test_nothing_saved_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no saved state"):
        load_state(tmp_path)


SAVE_FOR_EVER = """
import sys, itertools, pathlib, torch
from glasshouse.training.checkpoint import save_state
for step in itertools.count(1):
    save_state(pathlib.Path(sys.argv[1]), step, {"master.a": torch.full((200_000,), float(step))}, {})
    print(step, flush=True)
"""


def test_killed_while_saving_the_newest_whole_state_is_found(tmp_path: Path) -> None:
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.013 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        done = [int(line) for line in process.stdout.read().split()]
        process.wait()
        process.stdout.close()
        tensors, facts, passed_over = load_state(tmp_path)
        assert passed_over == []
        assert facts["step"] >= max(done, default=1)
        assert torch.equal(tensors["master.a"], torch.full((200_000,), float(facts["step"])))
        assert not list(tmp_path.glob(".step-*")), "leftovers of an interrupted save must be cleared"


FILL_THE_DISK = """
import pathlib, resource, signal, sys, torch
from glasshouse.errors import InputError
from glasshouse.training.checkpoint import save_state
folder = pathlib.Path(sys.argv[1])
save_state(folder, 1, {"master.a": torch.ones(100_000)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
try:
    save_state(folder, 2, {"master.a": torch.zeros(100_000)}, {})
except InputError as error:
    print(error)
"""


def test_a_disk_that_fills_up_leaves_the_old_state_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "cannot write" in done.stdout
    assert done.stdout.count("\n") == 1
    tensors, facts, passed_over = load_state(tmp_path)
    assert facts["step"] == 1
    assert passed_over == []
    assert torch.equal(tensors["master.a"], torch.ones(100_000))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
