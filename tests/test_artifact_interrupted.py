"""A save that is cut short leaves the old model whole, and opening a large one takes no more memory than it must."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glasshouse import artifact as artifact_module
from glasshouse.artifact import open_artifact, save_artifact
from glasshouse.errors import InputError
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.text.tokenizer import Tokenizer, train_tokenizer

CONFIG = DecoderConfig(280, 24, 2, 4, 2, 6, 40, 32)
WIDE = DecoderConfig(280, 24, 2, 4, 2, 6, 24_000, 32)
TEXT = ["the cat sat on the mat. "] * 50


def random_model(config: DecoderConfig, seed: int = 0) -> Decoder:
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(TEXT), 270)


@pytest.fixture
def model_folder(tokenizer, tmp_path) -> Path:
    save_artifact(tmp_path / "model", random_model(CONFIG), tokenizer)
    return tmp_path / "model"


def assert_refused(call, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def same(first: Decoder, second: Decoder) -> bool:
    theirs = second.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in first.state_dict().items())


def test_what_cannot_be_saved_leaves_nothing(tokenizer, tmp_path):
    odd = Decoder(DecoderConfig(280, 24, 2, 4, 2, 6, 40, 32, norm="layer"))
    assert_refused(lambda: save_artifact(tmp_path / "model", odd, tokenizer), "no family on disk")
    double = random_model(CONFIG).double()
    assert_refused(lambda: save_artifact(tmp_path / "model", double, tokenizer), "float64")
    assert list(tmp_path.iterdir()) == []


def is_one_of(folder: Path, *models: Decoder) -> bool:
    opened = open_artifact(folder)
    return opened.verified and any(same(opened.model, model) for model in models)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_leaves_the_old_model(small_disk, tokenizer, monkeypatch):
    old, large = random_model(CONFIG), random_model(WIDE)
    save_artifact(small_disk / "model", old, tokenizer)
    before = sorted(small_disk.rglob("*"))
    assert_refused(lambda: save_artifact(small_disk / "model", large, tokenizer), "not enough disk", "free")
    monkeypatch.setattr(
        artifact_module, "require_free", lambda path, needed: None
    )  # another process was faster
    assert_refused(
        lambda: save_artifact(small_disk / "model", large, tokenizer), "cannot write", "No space left"
    )
    assert is_one_of(small_disk / "model", old)
    assert sorted(small_disk.rglob("*")) == before


def test_a_disk_that_fills_at_any_point_leaves_the_old_model(small_disk, tokenizer, monkeypatch):
    monkeypatch.setattr(artifact_module, "require_free", lambda path, needed: None)
    old, new = random_model(CONFIG), random_model(CONFIG, seed=1)
    save_artifact(small_disk / "model", old, tokenizer)
    space = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    outcomes = set()
    for free in range(0, 100_000, 4096):
        (small_disk / "ballast").write_bytes(b"\0" * (space - free))
        try:
            save_artifact(small_disk / "model", new, tokenizer)
            outcomes.add("saved")
        except InputError as error:
            outcomes.add("refused")
            assert "No space left" in str(error)  # noqa: PT017
            assert is_one_of(small_disk / "model", old)
        assert is_one_of(small_disk / "model", old, new)
        assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "model"]
        (small_disk / "ballast").unlink()
        save_artifact(small_disk / "model", old, tokenizer)
    assert outcomes == {"saved", "refused"}


def test_a_limit_on_file_size_leaves_the_old_model(model_folder, tokenizer):
    """The same without root: the kernel refuses to let a file grow beyond a limit, as it does on a full disk."""
    wide = random_model(WIDE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        assert_refused(lambda: save_artifact(model_folder, wide, tokenizer), "cannot write", "too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert is_one_of(model_folder, random_model(CONFIG))
    assert [path.name for path in model_folder.parent.iterdir()] == ["model"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from glasshouse.artifact import open_artifact, save_artifact
from glasshouse.models.decoder import Decoder, DecoderConfig

torch.set_num_threads(1)
folder, trials = Path(sys.argv[1]), int(sys.argv[2])
opened = open_artifact(folder)
models = [opened.model, Decoder(opened.config)]
states = [model.state_dict() for model in models]
tally = [0, 0, 0]
for trial in range(trials):
    child = os.fork()
    if child == 0:
        turn = trial
        while True:
            turn += 1
            save_artifact(folder, models[turn % 2], opened.tokenizer)
    time.sleep(random.Random(trial).uniform(0, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tally[2] += any(path.name != folder.name for path in folder.parent.iterdir())
    found = open_artifact(folder)
    assert found.verified
    state = found.model.state_dict()
    which = [all(torch.equal(state[name], other[name]) for name in other) for other in states]
    assert any(which), trial
    tally[which.index(True)] += 1
save_artifact(folder, models[1], opened.tokenizer)  # clears what the killed ones left behind
assert [path.name for path in folder.parent.iterdir()] == [folder.name], list(folder.parent.iterdir())
print(*tally)
"""


def test_killed_while_saving_the_model_is_the_old_or_the_new(model_folder):
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(model_folder), "20"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    first, second, halfway = map(int, result.stdout.split())
    assert first + second == 20
    assert halfway > 3  # the kills did strike in the middle of a save


def test_a_folder_replaced_while_it_is_read_is_refused_in_one_line(model_folder, tokenizer, monkeypatch):
    real = artifact_module.verify_manifest

    def replaced_meanwhile(folder: Path, digest: str | None) -> str:
        shutil.rmtree(folder)
        return real(folder, digest)

    monkeypatch.setattr(artifact_module, "verify_manifest", replaced_meanwhile)
    assert_refused(lambda: open_artifact(model_folder), "manifest.json")
    save_artifact(model_folder, random_model(CONFIG), tokenizer)
    monkeypatch.setattr(artifact_module, "verify_manifest", lambda folder, digest: str(shutil.rmtree(folder)))
    assert_refused(lambda: open_artifact(model_folder), "cannot read", str(model_folder), "try again")


def test_saving_makes_the_folders_above(tokenizer, tmp_path):
    save_artifact(tmp_path / "a b" / "c" / "model", random_model(CONFIG), tokenizer)
    assert is_one_of(tmp_path / "a b" / "c" / "model", random_model(CONFIG))


# ---- memory

PEAK = """
import re, sys, torch
from glasshouse.artifact import open_artifact
torch.set_num_threads(1)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
open_artifact(sys.argv[1])  # imports and first-use costs
before = peak()
dtype = {"None": None, "bfloat16": torch.bfloat16, "float32": torch.float32}[sys.argv[3]]
artifact = open_artifact(sys.argv[2], dtype=dtype)
opened = peak() - before
for parameter in artifact.model.parameters():
    parameter.detach().view(torch.uint8).amax()  # touch every page
print(opened, peak() - before)
"""


def peaks_of_opening(small: Path, folder: Path, dtype: str) -> tuple[int, ...]:
    """Bytes of memory that opening took at most, and that opening and then using every weight took at most."""
    command = [sys.executable, "-c", PEAK, str(small), str(folder), dtype]
    return tuple(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_opening_never_holds_two_copies(model_folder, tokenizer, tmp_path):
    model = random_model(DecoderConfig(20_000, 768, 12, 12, 12, 64, 2048, 1024))
    size = sum(parameter.nbytes for parameter in model.parameters())
    largest = model.embedding.weight.nbytes
    assert size > 390e6
    save_artifact(tmp_path / "large", model, tokenizer)
    del model
    opened, used = peaks_of_opening(model_folder, tmp_path / "large", "None")
    print(f"{size / 1e6:.0f} MB: opening {opened / 1e6:.0f} MB, used {used / 1e6:.0f} MB")
    assert opened < size * 0.1
    assert size * 0.9 < used < size * 1.1
    opened, used = peaks_of_opening(model_folder, tmp_path / "large", "bfloat16")
    print(f"as bfloat16: opening {opened / 1e6:.0f} MB, used {used / 1e6:.0f} MB")
    assert size * 0.45 < used < size / 2 + 1.5 * largest
