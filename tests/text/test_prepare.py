"""The prepare stage: from files to a corpus, the same each time, whole or not at all, in memory that stays flat."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glasshouse import files
from glasshouse.config import parse_config
from glasshouse.corpus.documents import Document
from glasshouse.errors import InputError
from glasshouse.run import Run, create_run
from glasshouse.text.packing import TRAIN, VALIDATION, open_corpus
from glasshouse.text.prepare import PrepareConfig, bytes_per_token, choose_vocab_size, prepare, sample_texts
from glasshouse.text.tokenizer import Tokenizer, open_tokenizer, training_cost

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "house",
    "tree",
    "river",
    "runs",
    "sleeps",
    "over",
    "under",
    "near",
    "old",
]
WORDS += ["天气", "小猫", "很好", "。"]
RUN_PREPARE = """
import sys, json
from pathlib import Path
from glasshouse.run import create_run
from glasshouse.text.prepare import PrepareConfig, prepare
if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    settings["documents"] = tuple(settings["documents"])
    prepare(PrepareConfig(**settings), create_run(Path(sys.argv[1]), "prepare", {}, []))
"""


def write_documents(path: Path, count: int, seed: int = 0) -> Path:
    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join(draw.choices(WORDS, k=draw.randrange(20, 60))) + f" {draw.randrange(10**9)}.\n"
            file.write(json.dumps({"id": f"n{number}", "text": text * 2, "language": "en"}) + "\n")
    return path


def make(tmp_path: Path, name: str, **settings: Any) -> Run:
    run = create_run(tmp_path / name, "prepare", {}, [])
    prepare(PrepareConfig(**{"workers": 1, "near_duplicates": "none", **settings}), run)
    return run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("source") / "documents.jsonl", 400)


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("runs"), "corpus", documents=(str(source),), vocab_size=320)


def test_a_finished_run_holds_a_corpus_and_says_what_is_in_it(run: Run):
    corpus, facts = open_corpus(run.corpus_path), run.read()
    assert facts["status"] == "finished"
    assert facts["digest"] == corpus.digest
    assert facts["vocab_size"] == corpus.vocab_size == 320
    for name in (TRAIN, VALIDATION):
        split = corpus.split(name)
        assert (facts["tokens"][name], facts["documents"][name], facts["bytes"][name]) == (
            split.tokens,
            split.documents,
            split.bytes,
        )
    assert sum(facts["documents"].values()) == 400
    assert not list(run.path.glob(".work*"))
    assert {path.name for path in run.corpus_path.iterdir()} == {
        *(
            f"{side}-00000.{ending}"
            for side in (TRAIN, VALIDATION)
            for ending in ("tokens", "documents", "text")
        ),
        *(f"{side}-00000.jsonl.gz" for side in (TRAIN, VALIDATION)),
        *("corpus.json", "manifest.json", "waterfall.json", "tokenizer_report.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }


def test_the_tokens_are_what_the_saved_tokenizer_gives_for_the_text(run: Run):
    corpus, tokenizer = open_corpus(run.corpus_path), open_tokenizer(run.corpus_path)
    for name in (TRAIN, VALIDATION):
        split = corpus.split(name)
        for number in range(split.documents):
            ids, _ = split.document(number)
            assert ids.tolist() == [*tokenizer.encode(split.text(number)), tokenizer.end_of_document]


def test_reports(run: Run):
    corpus = open_corpus(run.corpus_path)
    waterfall = json.loads((run.corpus_path / "waterfall.json").read_text())
    assert waterfall["documents_in"] == waterfall["documents_out"] == waterfall["read"]["documents"] == 400
    assert waterfall["read"]["unaccounted_bytes"] == 0
    report = json.loads((run.corpus_path / "tokenizer_report.json").read_text())
    split = corpus.split(VALIDATION)
    expected = split.bytes / (split.tokens - split.documents)
    assert (
        report["languages"]["en"][VALIDATION]["bytes_per_token"]
        == report["bytes_per_token"][VALIDATION]
        == expected
    )
    assert report["encoder"] == "tiktoken"
    assert bytes_per_token({"bytes": 12, "tokens": 5, "documents": 1}) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_input_and_settings_give_the_same_digest(
    run: Run, source: Path, tmp_path: Path, workers: int
):
    again = make(tmp_path, "again", documents=(str(source),), vocab_size=320, workers=workers)
    assert again.digest() == run.digest()
    other = make(tmp_path, "other", documents=(str(source),), vocab_size=320, validation_fraction=0.2)
    assert other.digest() != run.digest()


def test_one_long_text_is_held_out_at_its_end(tmp_path: Path):
    text = "".join(f"line {number} of the only book there is\n" for number in range(2000))
    (tmp_path / "book.txt").write_text(text)
    corpus = open_corpus(
        make(tmp_path, "run", documents=(str(tmp_path / "book.txt"),), validation_fraction=0.1).corpus_path
    )
    train, held_out = corpus.split(TRAIN), corpus.split(VALIDATION)
    assert train.text(0) + held_out.text(0) == text.rstrip() or train.text(0) + held_out.text(0) == text
    assert held_out.text(0).startswith("line 1")
    assert 0.08 < held_out.bytes / (train.bytes + held_out.bytes) < 0.12


def test_the_vocabulary_is_chosen_by_the_amount_of_text(run: Run, source: Path, tmp_path: Path):
    sizes = [choose_vocab_size(size) for size in (0, 10**6, 10**7, 10**8, 10**9, 10**12)]
    assert sizes == [512, 2048, 8192, 16384, 65536, 65536]
    chosen = make(tmp_path, "chosen", documents=(str(source),)).read()["vocab_size"]
    assert chosen % 64 == 0
    assert 260 < chosen <= choose_vocab_size(source.stat().st_size)


def test_a_tokenizer_that_exists_is_used(run: Run, source: Path, tmp_path: Path):
    made = make(tmp_path, "run", documents=(str(source),), tokenizer=run.corpus_path)
    ours, theirs = made.corpus_path / "tokenizer.json", run.corpus_path / "tokenizer.json"
    assert ours.read_bytes() == theirs.read_bytes()


def test_an_encoder_that_differs_is_not_used(
    source: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def wrong(tokenizer: Tokenizer, texts: list[str], threads: int = 2) -> list[np.ndarray]:
        return [np.zeros(3, dtype=np.uint32) for _ in texts]

    monkeypatch.setattr(Tokenizer, "encode_batch_arrays", wrong)
    made = make(tmp_path, "run", documents=(str(source),), vocab_size=320)
    assert "encoding slowly" in capsys.readouterr().err
    assert json.loads((made.corpus_path / "tokenizer_report.json").read_text())["encoder"] == "tokenizers"
    name = "train-00000.tokens"
    assert (made.corpus_path / name).read_bytes() == (run.corpus_path / name).read_bytes()


def test_sampling_takes_training_text_only_and_stops_at_its_limit(source: Path, run: Run):
    corpus = open_corpus(run.corpus_path)
    documents = [(TRAIN if number % 2 else VALIDATION, number) for number in range(300)]
    split = corpus.split(TRAIN)

    def sided() -> Any:
        from glasshouse.corpus.documents import Document

        for side, number in documents:
            yield side, Document(str(number), split.text(number), "", "", "", {})

    everything = list(sample_texts(sided(), 1.0, 10**9, 0))
    assert everything == [split.text(number) for side, number in documents if side == TRAIN]
    half = list(sample_texts(sided(), 0.5, 10**9, 0))
    assert 40 < len(half) < 110
    assert set(half) < set(everything)
    assert half != list(sample_texts(sided(), 0.5, 10**9, 1))
    assert sum(len(text.encode()) for text in sample_texts(sided(), 1.0, 2000, 0)) < 3000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 30_000}, "larger than the text supports"),
        ({"vocab_size": 100}, "leaves no room"),
        ({"validation_fraction": 0.0}, "is no share"),
        ({"validation_fraction": 1.0}, "is no share"),
        ({"workers": -1}, "positive"),
        ({"personal_data": ("shoe_size",)}, "shoe_size"),
        ({"documents": ("no/such/file",)}, "no/such/file"),
        ({"tokenizer": Path("no/such/folder")}, "tokenizer.json"),
        ({"tokenizer": Path("x"), "vocab_size": 300}, "both a tokenizer"),
    ],
)
def test_bad_settings_are_refused_in_one_line_and_leave_nothing(
    source: Path, tmp_path: Path, settings: dict[str, Any], message: str
):
    with pytest.raises(InputError, match=message) as caught:
        make(tmp_path, "run", **{"documents": (str(source),), **settings})
    assert "\n" not in str(caught.value)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"run.json", "recipe.yaml", ".lock"}


def test_too_little_text(tmp_path: Path):
    (tmp_path / "short.txt").write_text("Only this.\n")
    with pytest.raises(InputError, match=r"too little text: .* left after cleaning"):
        make(tmp_path, "run", documents=(str(tmp_path / "short.txt"),))


def test_tasks_of_a_cluster_give_the_same_corpus(tmp_path: Path):
    """datatrove's local executor, two tasks over three files: the digest of the corpus, reading report included."""
    pytest.importorskip("datatrove")
    paths = [write_documents(tmp_path / f"part{number}.jsonl", 60, number) for number in range(3)]
    paths[2].write_text(
        paths[2].read_text("utf-8") + paths[0].read_text("utf-8")[:3000] + '{"text": ""}\n{"te'
    )
    settings = {"documents": tuple(map(str, paths)), "near_duplicates": "verified", "language": "sw"}
    plain = make(tmp_path, "plain", **settings)
    spread = make(tmp_path, "spread", **{**settings, "workers": 2}, executor="local", tasks=2)
    assert plain.read()["digest"] == spread.read()["digest"]
    report = json.loads((spread.corpus_path / "waterfall.json").read_text("utf-8"))
    assert report["documents_out"] < report["documents_in"]
    assert report["read"]["dropped_rows"]


def test_too_little_disk_is_said_first(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 2 * source.stat().st_size)
    with pytest.raises(InputError, match="not enough disk"):
        make(tmp_path, "run", documents=(str(source),))
    monkeypatch.setattr(files, "free_bytes", lambda path: 3 * source.stat().st_size)
    make(tmp_path, "enough", documents=(str(source),))


def test_text_without_spaces_costs_more():
    english, chinese = "The cat runs over the old house. " * 20, "天气很好，小猫在老房子旁边跑来跑去。" * 20
    assert training_cost(english) == len(english)
    assert training_cost(chinese) == 6 * len(chinese.encode())
    documents = [(TRAIN, Document(str(n), chinese, "", "", "", {})) for n in range(100)]
    taken = sum(len(text.encode()) for text in sample_texts(documents, 1.0, 60_000, 0))
    assert 10_000 <= taken < 10_000 + len(chinese.encode())


def test_settings_come_from_the_command_line(tmp_path: Path, source: Path):
    words = ["--documents", str(source), "b.txt", "--vocab_size", "512", "--validation_from", "end"]
    config = parse_config(PrepareConfig, words, "prepare")
    assert config == PrepareConfig((str(source), "b.txt"), vocab_size=512, validation_from="end")


def start(folder: Path, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    script = folder.parent / "prepare_here.py"
    script.write_text(RUN_PREPARE)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), json.dumps(settings)], stderr=subprocess.DEVNULL
    )


def test_a_killed_run_leaves_no_corpus_and_can_be_made_again(tmp_path: Path, source: Path, run: Run):
    folder = tmp_path / "run"
    settings = {"documents": [str(source)], "vocab_size": 320, "workers": 1, "near_duplicates": "none"}
    process = start(folder, settings)
    while (
        process.poll() is None
        and not list(folder.glob(".corpus.*/train*"))
        and not (folder / ".work").exists()
    ):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "corpus").exists()
    assert (folder / ".work").exists()
    again = Run(folder)
    prepare(PrepareConfig(**{**settings, "documents": (str(source),)}), again)
    assert again.digest() == run.digest()
    assert not list(folder.glob(".work")) + list(folder.glob(".corpus*"))


def peak_memory(folder: Path, settings: dict[str, Any]) -> int:
    """Peak bytes of the process that prepares, in a process of its own."""
    process = start(folder, settings)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(
                [peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))]
            )
        except OSError:
            break
        time.sleep(0.05)
    assert process.wait() == 0
    return peak * 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path):
    settings = {"vocab_size": 600, "workers": 1, "near_duplicates": "none", "tokenizer_sample": 10**7}
    peaks = []
    for megabytes in (40, 200):
        lines = write_documents(tmp_path / "part.jsonl", 4000, megabytes).read_text()
        path = tmp_path / f"{megabytes}.jsonl"
        with open(path, "w") as file:
            for number in range(megabytes * 10**6 // len(lines)):
                file.write(lines.replace('"text": "', f'"text": "part {number} '))
        peaks.append(peak_memory(tmp_path / f"run{megabytes}", {**settings, "documents": [str(path)]}))
    assert peaks[1] < 1.25 * peaks[0]
    assert peaks[1] < 10**9


def test_repeated_sources_weigh_more_in_training_and_nowhere_else(tmp_path: Path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("often", "once"):
        lines = [
            json.dumps({"text": f"The {name} cat number {n} sat on the mat and slept."}) for n in range(60)
        ]
        (texts / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = {}
    for name, repeat in (("plain", {}), ("weighted", {"*often*": 3})):
        config = PrepareConfig((str(texts),), near_duplicates="none", vocab_size=300, repeat=repeat)
        run = create_run(tmp_path / name, "prepare", {}, [])
        prepare(config, run)
        corpus = open_corpus(run.corpus_path)
        for side in (TRAIN, VALIDATION):
            split = corpus.split(side)
            found[name, side] = [split.text(number) for number in range(split.documents)]
    assert found["plain", VALIDATION] == found["weighted", VALIDATION]
    plain, weighted = Counter(found["plain", TRAIN]), Counter(found["weighted", TRAIN])
    assert weighted == Counter({text: 3 if "often" in text else 1 for text in plain})
    with pytest.raises(InputError, match="less than once"):
        prepare(
            PrepareConfig((str(texts),), repeat={"*": 0}), create_run(tmp_path / "none", "prepare", {}, [])
        )
