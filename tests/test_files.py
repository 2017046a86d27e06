"""Files that are whole or absent: atomic writes, folder replacement under kills, manifests that see every change."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glasshouse import files
from glasshouse.errors import InputError
from glasshouse.files import (
    atomic_folder,
    finite,
    free_bytes,
    read_json,
    recover_folder,
    require_free,
    sha256_bytes,
    sha256_file,
    verify_manifest,
    write_atomic,
    write_json,
)


def make(folder: Path, **contents: str) -> None:
    with atomic_folder(folder) as temporary:
        for name, content in contents.items():
            (temporary / name).write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != files.MANIFEST}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_refused(call, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


# ---- single files


def test_write_atomic_replaces(tmp_path):
    path = tmp_path / "a file.txt"
    write_atomic(path, "old")
    write_atomic(path, "nëw")
    assert path.read_text("utf-8") == "nëw"
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a file.txt"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    assert_refused(lambda: write_atomic(path, "new"), "No space left", str(path))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_write_into_a_missing_folder_is_refused(tmp_path):
    assert_refused(lambda: write_atomic(tmp_path / "none" / "file", "x"), "cannot write")


def test_sums(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256_bytes(b"abc") == expected == sha256_file(tmp_path / "x")


def test_free_space(tmp_path):
    assert free_bytes(tmp_path / "not" / "there" / "yet") > 0
    require_free(tmp_path, 1)
    assert_refused(lambda: require_free(tmp_path, 2**70), "not enough disk", str(tmp_path))


def test_json_round_trip_and_non_finite_numbers(tmp_path):
    value = {"a": [1, 2.5, None, True, "猫"], "b": {"c": []}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    write_json(tmp_path / "x.json", {"loss": math.nan, "deep": [(math.inf, -math.inf)], 3: 1.0})
    assert read_json(tmp_path / "x.json") == {"loss": None, "deep": [[None, None]], "3": 1.0}
    assert finite([math.nan, 1.0]) == [None, 1.0]


@pytest.mark.parametrize(
    "content", [b"", b'{"a": 1', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_torn_json_is_refused_by_name(content, tmp_path):
    (tmp_path / "torn.json").write_bytes(content)
    assert_refused(lambda: read_json(tmp_path / "torn.json"), "not valid JSON", "torn.json")


def test_unreadable_json_is_refused_by_name(tmp_path):
    assert_refused(lambda: read_json(tmp_path / "none.json"), "not found", "none.json")
    assert_refused(lambda: read_json(tmp_path), "cannot read", str(tmp_path))


# ---- folders


def test_atomic_folder_replaces_the_whole_folder(tmp_path):
    make(tmp_path / "model", a="1", b="2")
    make(tmp_path / "model", a="3")
    assert contents(tmp_path / "model") == {"a": "3"}
    assert names(tmp_path) == ["model"]
    verify_manifest(tmp_path / "model")


def test_atomic_folder_replaces_without_the_kernels_exchange(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    make(tmp_path / "model", a="1", b="2")
    make(tmp_path / "model", a="3")
    assert contents(tmp_path / "model") == {"a": "3"}
    assert names(tmp_path) == ["model"]


def test_atomic_folder_makes_parents(tmp_path):
    make(tmp_path / "deep" / "er" / "model", a="1")
    assert contents(tmp_path / "deep" / "er" / "model") == {"a": "1"}


@pytest.mark.parametrize("error", [ValueError("bug"), KeyboardInterrupt(), InputError("bad")])
def test_an_error_inside_leaves_the_old_folder(error, tmp_path):
    make(tmp_path / "model", a="1")

    def write_half() -> None:
        with atomic_folder(tmp_path / "model") as temporary:
            (temporary / "a").write_text("2")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert contents(tmp_path / "model") == {"a": "1"}
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("failing", ["write_manifest", "_flush_folder", "_replace_folder"])
def test_a_failure_at_each_step_leaves_the_old_folder(failing, tmp_path, monkeypatch):
    make(tmp_path / "model", a="1")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, failing, fail)
    assert_refused(lambda: make(tmp_path / "model", a="2"), "No space left", "model")
    assert contents(tmp_path / "model") == {"a": "1"}
    assert names(tmp_path) == ["model"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    assert_refused(lambda: make(tmp_path / "file" / "model", a="1"), "cannot write")


def test_recover_brings_the_old_folder_back(tmp_path):
    make(tmp_path / "model", a="1")
    (tmp_path / "model").rename(tmp_path / ".model.old")  # killed between the two renames
    (tmp_path / ".model.abcd1234.tmp").mkdir()
    recover_folder(tmp_path / "model")
    assert contents(tmp_path / "model") == {"a": "1"}
    assert names(tmp_path) == ["model"]


def test_recover_keeps_the_new_folder_and_strangers(tmp_path):
    make(tmp_path / "model", a="new")
    make(tmp_path / ".model.old", a="old")  # killed after the second rename
    (tmp_path / ".model.best.abcd1234.tmp").mkdir()  # another writer's
    recover_folder(tmp_path / "model")
    assert contents(tmp_path / "model") == {"a": "new"}
    assert names(tmp_path) == [".model.best.abcd1234.tmp", "model"]
    recover_folder(tmp_path / "never there")


def test_recover_takes_names_literally(tmp_path):
    (tmp_path / ".[ab].abcd1234.tmp").mkdir()
    (tmp_path / ".a.abcd1234.tmp").mkdir()
    recover_folder(tmp_path / "[ab]")
    assert names(tmp_path) == [".a.abcd1234.tmp"]


WRITER = """
import sys
from pathlib import Path
from glasshouse.files import atomic_folder
number = 0
while True:
    number += 1
    with atomic_folder(Path(sys.argv[1])) as temporary:
        for name in "abc":
            (temporary / name).write_text(str(number) * 2000)
    print(number, flush=True)
"""


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_any_moment_the_folder_is_old_or_new(exchange, tmp_path):
    program = WRITER
    if not exchange:
        program = (
            "import glasshouse.files\nglasshouse.files._exchange = lambda first, second: False\n" + WRITER
        )
    folder = tmp_path / "model"
    for trial in range(8):
        process = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()  # at least one is whole
        time.sleep(0.0013 * trial)
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        process.wait()
        if exchange:
            verify_manifest(folder)  # whole even before recovery
        recover_folder(folder)
        verify_manifest(folder)
        assert len(set(contents(folder).values())) == 1
        assert names(tmp_path) == ["model"]


# ---- manifests


@pytest.fixture
def folder(tmp_path) -> Path:
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "weights").write_bytes(bytes(range(256)) * 40)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "config").write_text("{}")
    return tmp_path / "model"


def test_manifest_lists_every_file(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"weights", "inner/config"}
    assert manifest["files"]["inner/config"] == {"bytes": 2, "sha256": sha256_bytes(b"{}")}
    digest = verify_manifest(folder)
    assert digest == sha256_file(folder / "manifest.json")
    assert verify_manifest(folder, digest) == digest
    assert_refused(lambda: verify_manifest(folder, "0" * 64), "manifest")


def test_every_flipped_bit_is_seen(folder):
    original = (folder / "weights").read_bytes()
    for position in (0, 1, 5000, len(original) - 1):
        for bit in (0, 7):
            altered = bytearray(original)
            altered[position] ^= 1 << bit
            (folder / "weights").write_bytes(altered)
            assert_refused(lambda: verify_manifest(folder), "checksum", "weights")
    (folder / "weights").write_bytes(original)
    verify_manifest(folder)


def test_truncated_grown_emptied(folder):
    original = (folder / "weights").read_bytes()
    for content in (original[:-1], original + b"\0", b""):
        (folder / "weights").write_bytes(content)
        assert_refused(lambda: verify_manifest(folder), "bytes where 10240", "weights")


def test_missing_added_and_linked(folder, tmp_path):
    (folder / "extra").write_text("x")
    assert_refused(lambda: verify_manifest(folder), "does not name", "extra")
    (folder / "extra").unlink()
    (folder / "linked").symlink_to("/etc", target_is_directory=True)
    assert_refused(lambda: verify_manifest(folder), "does not name", "linked")
    (folder / "linked").unlink()
    (folder / "inner" / "manifest.json").write_text("x")
    assert_refused(lambda: verify_manifest(folder), "does not name", "inner/manifest.json")
    (folder / "inner" / "manifest.json").unlink()
    (folder / "weights").rename(tmp_path / "elsewhere")
    assert_refused(lambda: verify_manifest(folder), "missing", "weights")
    (folder / "weights").symlink_to(tmp_path / "elsewhere")
    assert_refused(lambda: verify_manifest(folder), "link", "weights")
    (folder / "weights").unlink()
    os.mkfifo(folder / "weights")
    assert_refused(lambda: verify_manifest(folder), "weights")


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ([], "names no files"),
        ({}, "names no files"),
        ({"files": []}, "names no files"),
        ({"files": {"weights": None, "inner/config": 3}}, "weights"),
        ({"files": {"weights": {"bytes": "10240"}, "inner/config": {}}}, "weights"),
        ({"files": {"weights": {"bytes": 10240, "sha256": 3}, "inner/config": {}}}, "weights"),
        ({"files": {"../model/weights": {}, "inner/config": {}, "weights": {}}}, "missing"),
        ({"files": {"/etc/passwd": {}, "inner/config": {}, "weights": {}}}, "missing"),
        ({"files": {"a\0b": {}, "inner/config": {}, "weights": {}}}, "missing"),
        ({"files": {"x" * 5000: {}, "inner/config": {}, "weights": {}}}, "missing"),
    ],
)
def test_a_malformed_manifest_is_refused(folder, value, word):
    (folder / "manifest.json").write_text(json.dumps(value))
    assert_refused(lambda: verify_manifest(folder), word)


def test_a_manifest_that_is_no_file(folder, tmp_path, monkeypatch):
    (folder / "manifest.json").rename(tmp_path / "elsewhere")
    assert_refused(lambda: verify_manifest(folder), "not found", "manifest.json")
    (folder / "manifest.json").symlink_to(tmp_path / "elsewhere")
    assert_refused(lambda: verify_manifest(folder), "link", "manifest.json")
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_bytes(b"{" + b" " * 200)
    monkeypatch.setattr(files, "MANIFEST_BYTES_LIMIT", 100)
    assert_refused(lambda: verify_manifest(folder), "too large")


def test_a_lone_surrogate_survives_a_json_file(tmp_path: Path) -> None:
    value = {"name": "caf\udce9.txt", "text": "猫"}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
