"""Fixtures that every test may use."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The models of the tests are so small that a second thread costs more than it gives; two test processes do better.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The top folder of the project."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of real evaluation data beside the checkout, or the one that GLASSHOUSE_DATA names; skips without it."""
    folder = Path(os.environ.get("GLASSHOUSE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set GLASSHOUSE_DATA to run this test")
    return folder


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels() -> None:
    """The C++ kernels, where they can be compiled, are there before the first test: they would come in the middle."""
    from glasshouse.models import native

    command = native.build_command()
    if command and native.cpu_features() >= native.CPU_FEATURES:
        target = native.library_path(command)
        if not target.exists():
            native.build(target, command)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Every test begins with the same random numbers, and with one thread: a test that runs a verb sets the threads of
    the whole process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
