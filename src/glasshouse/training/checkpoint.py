"""What a stopped run needs to go on exactly: weights and optimizer state, saved whole or not at all.

    state/step-00001200/state.safetensors  state.json  manifest.json

Every save is a new folder, so a kill at any moment leaves the one before; a folder that does not verify is passed over
for the one before it. The position in the data and the random numbers are functions of the step, so they are not here.
Knows tensors by name, not what they mean.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from glasshouse.errors import InputError
from glasshouse.files import (
    atomic_folder,
    read_json,
    recover_folder,
    require_free,
    verify_manifest,
    write_json,
)

KEPT = 2


def save_state(folder: Path, step: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> Path:
    """Save the state after `step` steps, then drop all but the newest two.

    Args:
        folder: the run's state folder.
        step: optimizer steps done.
        tensors: by name.
        facts: small JSON values to come back with them.

    Raises:
        InputError: the disk is full; what was saved before is still whole.
    """
    path = folder / f"step-{step:08d}"
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    require_free(folder, int(1.05 * sum(tensor.nbytes for tensor in contiguous.values())) + 2**20)
    with atomic_folder(path) as temporary:
        try:
            save_file(contiguous, temporary / "state.safetensors")
        except Exception as error:  # safetensors raises its own class for a full disk
            raise OSError(str(error)) from error
        write_json(temporary / "state.json", {**facts, "step": step})
    for old in saved_states(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def saved_states(folder: Path) -> list[Path]:
    """The saved states, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """The newest state that verifies: tensors, facts, and a line about each newer one that did not.

    Raises:
        InputError: there is none.
    """
    for leftover in folder.glob(".step-*"):
        recover_folder(folder / leftover.name[1:].split(".")[0])
    passed_over: list[str] = []
    for path in reversed(saved_states(folder)):
        try:
            verify_manifest(path)
            return load_file(path / "state.safetensors"), read_json(path / "state.json"), passed_over
        except InputError as error:
            passed_over.append(f"passed over {path.name}: {error}")
    why = f" ({'; '.join(passed_over)})" if passed_over else ""
    raise InputError(
        f"no saved state to go on from{why}", str(folder), "start the run again without --resume"
    )
