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


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """A test that runs a verb sets the threads of the whole process: the next one begins with one again."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
