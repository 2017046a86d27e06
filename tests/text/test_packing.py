"""The corpus folder and the order in which it is read: nothing lost, nothing twice, nothing across a border."""

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.corpus.documents import Document
from glasshouse.errors import InputError
from glasshouse.files import atomic_folder, write_manifest
from glasshouse.text.packing import (
    TRAIN,
    VALIDATION,
    Corpus,
    Shard,
    Split,
    batch,
    open_corpus,
    pack_rows,
    permute,
    take_rows,
    windows_per_epoch,
)
from glasshouse.text.shards import (
    CorpusWriter,
    Spool,
    choose_threshold,
    divide_at_end,
    divide_by_hash,
    hash_fraction,
    write_corpus,
)
from glasshouse.text.tokenizer import Tokenizer, train_tokenizer

WORDS = ["the", "cat", "sat", "on", "mat", "你好", "dog", "ran", "away\n"]


def make_documents(count: int, seed: int = 0) -> list[Document]:
    draw = random.Random(seed)
    return [
        Document(
            f"id{number}",
            " ".join(draw.choices(WORDS, k=draw.randrange(3, 90))),
            f"s{number % 3}",
            "CC0",
            "en",
            {},
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return make_documents(300)


@pytest.fixture(scope="module")
def tokenizer(documents: list[Document]) -> Tokenizer:
    return train_tokenizer((one.text for one in documents), 270)


@pytest.fixture(scope="module")
def folder(documents: list[Document], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "corpus"
    with atomic_folder(path) as temporary:
        write_corpus(temporary, documents, tokenizer, 0.1, shard_tokens=3000)
    return path


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Corpus:
    return open_corpus(folder)


def test_every_document_is_on_one_side_with_its_text_tokens_and_origin(
    corpus: Corpus, documents: list[Document], tokenizer: Tokenizer
):
    originals = {one.id: one for one in documents}
    for name in (TRAIN, VALIDATION):
        split = corpus.split(name)
        assert split.documents > 0
        assert len(split.shards) > 1 or name == VALIDATION
        for number in range(split.documents):
            original = originals.pop(split.metadata(number)["id"])
            ids, size = split.document(number)
            assert split.text(number) == original.text
            assert tokenizer.decode(ids[:-1]) == original.text
            assert ids[-1] == corpus.end_of_document
            assert size == len(original.text.encode())
            assert split.metadata(number) == {"id": original.id, "source": original.source} | {
                "licence": "CC0",
                "language": "en",
            }
    assert not originals


def test_totals_add_up(corpus: Corpus, documents: list[Document]):
    sides = [corpus.split(name) for name in (TRAIN, VALIDATION)]
    assert sum(side.documents for side in sides) == len(documents)
    assert sum(side.bytes for side in sides) == sum(len(one.text.encode()) for one in documents)
    for side in sides:
        assert side.tokens == sum(len(side.document(number)[0]) for number in range(side.documents))
    counted = corpus.facts["languages"]["en"]
    assert {name: counted[name]["tokens"] for name in counted} == {side.name: side.tokens for side in sides}
    assert corpus.facts["sources"] == {"s0": 100, "s1": 100, "s2": 100}


def test_document_numbers_out_of_range(corpus: Corpus):
    split = corpus.split(TRAIN)
    for number in (-1, split.documents):
        with pytest.raises(IndexError):
            split.document(number)


def test_the_same_documents_give_the_same_bytes(
    folder: Path, documents: list[Document], tokenizer: Tokenizer, tmp_path: Path
):
    with atomic_folder(tmp_path / "again") as temporary:
        write_corpus(temporary, documents, tokenizer, 0.1, shard_tokens=3000)
    assert (tmp_path / "again" / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_take_two_bytes_while_they_fit(tmp_path: Path, vocab_size: int, dtype: type):
    writer = CorpusWriter(tmp_path, vocab_size, vocab_size - 1)
    ids = np.array([0, vocab_size - 2], dtype=np.uint32)
    for side in (TRAIN, VALIDATION):
        writer.add_all([(side, Document("a", "xy", "", "", "", {}), ids)])
    writer.finish()
    write_manifest(tmp_path)
    tokens = open_corpus(tmp_path).split(TRAIN).document(0)[0]
    assert tokens.dtype == dtype
    assert tokens.tolist() == [0, vocab_size - 2, vocab_size - 1]


# ----------------------------------------------------------------------------------------------------- two sides


def test_equal_texts_are_never_on_both_sides():
    documents = make_documents(40) * 3
    threshold = choose_threshold((one.text for one in documents), 0.3)
    sides: dict[str, set[str]] = {}
    for side, document in divide_by_hash(documents, threshold):
        sides.setdefault(document.text, set()).add(side)
    assert all(len(found) == 1 for found in sides.values())
    assert set.union(*sides.values()) == {TRAIN, VALIDATION}


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_both_sides_have_a_document_whatever_the_share(fraction: float, count: int):
    documents = make_documents(count)
    threshold = choose_threshold((one.text for one in documents), fraction)
    assert {side for side, _ in divide_by_hash(documents, threshold)} == {TRAIN, VALIDATION}


def test_the_share_is_met_where_there_are_many_documents():
    documents = make_documents(4000)
    threshold = choose_threshold((one.text for one in documents), 0.1)
    held_out = sum(side == VALIDATION for side, _ in divide_by_hash(documents, threshold))
    assert 320 < held_out < 480
    assert 0 <= hash_fraction("") < 1


@pytest.mark.parametrize("texts", [[], ["only one"], ["same", "same"]])
def test_one_text_cannot_be_divided_by_hash(texts: list[str]):
    with pytest.raises(InputError, match="fewer than two different documents"):
        choose_threshold(texts, 0.1)


@given(st.lists(st.text(min_size=2, max_size=60), min_size=1, max_size=6), st.floats(0.02, 0.98))
@settings(deadline=None)
def test_dividing_at_the_end_keeps_all_text_in_order(texts: list[str], fraction: float):
    documents = [Document(str(number), text, "", "", "", {}) for number, text in enumerate(texts)]
    total = sum(len(text.encode()) for text in texts)
    divided = list(divide_at_end(documents, total, fraction))
    assert "".join(document.text for _, document in divided) == "".join(texts)
    sides = [side for side, _ in divided]
    assert sides == sorted(sides)  # train, then validation
    assert all(document.text for _, document in divided)


def test_dividing_at_the_end_cuts_between_lines():
    lines = [f"line {number}\n" for number in range(100)]
    document = Document("book", "".join(lines), "", "", "en", {})
    (_, first), (_, last) = divide_at_end([document], len(document.text), 0.1)
    assert first.text.endswith("\n")
    assert last.text.startswith("line 9")
    assert (first.id, last.id, last.language) == ("book", "book#held-out", "en")


def test_the_spool_gives_back_what_it_was_given(tmp_path: Path):
    spool = Spool(tmp_path / "spool")
    given = [*make_documents(5), Document("odd", 'a\u2028"\\\n\x85b', "s", "l", "", {})]
    spool.fill([*given, Document("blank", " \n", "", "", "", {})])
    assert list(spool) == list(spool) == given
    assert (spool.documents, spool.bytes) == (6, sum(len(one.text.encode()) for one in given))


# --------------------------------------------------------------------------------------------------------- order


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 50))
@settings(deadline=None, max_examples=60)
def test_the_permutation_uses_every_number_once(size: int, seed: int, epoch: int):
    assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


def test_the_permutation_differs_by_seed_and_epoch_and_looks_random():
    size = 10_000
    orders = [permute(np.arange(size), size, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for number, first in enumerate(orders):
        for second in [np.arange(size), *orders[:number]]:
            assert (first == second).sum() < 12  # one in 10,000 places agrees by chance
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert abs(np.corrcoef(orders[0][:-1], orders[0][1:])[0, 1]) < 0.05


def test_the_permutation_needs_no_memory_for_large_ranges():
    numbers = permute(np.arange(1000), 2**45 + 7, 0, 0)
    assert len(set(numbers.tolist())) == 1000
    assert numbers.min() >= 0
    assert numbers.max() < 2**45 + 7
    assert np.array_equal(numbers[500:], permute(np.arange(500, 1000), 2**45 + 7, 0, 0))


def test_an_epoch_uses_every_window_once():
    """A stream of 0, 1, 2, ... shows by its numbers which window a row is."""
    context, tokens = 32, 32 * 60 + 17
    shard = Shard(Path("none"), np.arange(tokens, dtype=np.uint16), np.array([[0, tokens]]))
    split = Split(TRAIN, [shard], 2**16, tokens)
    windows = windows_per_epoch(split, context)
    starts = []
    for epoch in range(3):
        rows = [batch(split, epoch * windows + step, 1, context, 7).tokens[0] for step in range(windows)]
        assert all(np.array_equal(row, (row[0] + np.arange(context)) % tokens) for row in rows)
        first = sorted(int(row[0]) for row in rows)
        gaps = [(after - before) % tokens for before, after in zip(first, first[1:] + first[:1], strict=True)]
        assert len(first) == windows == 60
        assert sorted(gaps) == [context] * 59 + [context + 17]  # side by side, and 17 tokens left out
        starts.append([int(row[0]) for row in rows])
    assert len({start % context for epoch in starts for start in epoch}) > 1
    assert starts[0] != starts[1] != starts[2]


def test_batches_are_pure_and_do_not_depend_on_how_rows_are_grouped(corpus: Corpus):
    split, context = corpus.split(TRAIN), 50
    rows = (
        windows_per_epoch(split, context) * 3 // 2 // 12 * 12
    )  # two epochs, so that one begins inside a batch
    whole = batch(split, 0, rows, context, 3)
    for group in (1, 4, 12):
        parts = [batch(split, step, group, context, 3) for step in range(rows // group)]
        for name in ("tokens", "labels", "positions", "documents"):
            assert np.array_equal(
                np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name)
            )
    third = take_rows(batch(split, 5, 12, context, 3), 4, 8)
    assert np.array_equal(third.tokens, whole.tokens[64:68])
    assert not np.array_equal(batch(split, 0, 12, context, 4).tokens, whole.tokens[:12])


def test_labels_positions_and_documents():
    end = 9
    packed = pack_rows(np.array([[1, 2, end, 3, 4, 5, end, end, 6]]), end)
    assert packed.tokens.tolist() == [[1, 2, 9, 3, 4, 5, 9, 9]]
    assert packed.labels.tolist() == [[2, 9, 3, 4, 5, 9, 9, 6]]
    assert packed.positions.tolist() == [[0, 1, 0, 1, 2, 3, 0, 0]]
    assert packed.documents.tolist() == [[0, 0, 1, 1, 1, 1, 2, 3]]
    assert (packed.tokens.dtype, packed.labels.dtype, packed.positions.dtype) == (np.int64,) * 3
    assert packed.documents.dtype == np.int32
    assert packed.tokens.flags.c_contiguous


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40))
def test_rows_agree_with_a_plain_loop(stream: list[int]):
    packed = pack_rows(np.array([stream]), 0)
    position = document = 0
    for column, (token, following) in enumerate(pairwise(stream)):
        position, document = (0, document + 1) if token == 0 else (position + (column > 0), document)
        assert packed.positions[0, column] == position
        assert packed.documents[0, column] == document
        assert packed.labels[0, column] == following


def test_reading_goes_round_and_across_shards(corpus: Corpus):
    split = corpus.split(TRAIN)
    whole = np.concatenate([shard.tokens for shard in split.shards])
    assert np.array_equal(split.read(0, split.tokens), whole)
    assert np.array_equal(split.read(split.tokens - 5, 12), np.concatenate([whole[-5:], whole[:7]]))
    assert np.array_equal(split.read(2990, 3100), whole[2990:6090])


def test_a_split_shorter_than_a_row_says_how_much_text_is_needed(corpus: Corpus):
    split = corpus.split(VALIDATION)
    assert batch(split, 0, 2, split.tokens, 0).tokens.shape == (2, split.tokens)
    with pytest.raises(InputError, match=r"fewer than one row.*give at least [\d.,]+ kB of validation text"):
        batch(split, 0, 1, split.tokens + 1, 0)
    with pytest.raises(InputError, match="fewer than one row"):
        windows_per_epoch(Split("train", [], 0, 0), 8)


# ----------------------------------------------------------------------------------------------------- bad folders


def test_no_corpus(tmp_path: Path):
    with pytest.raises(InputError, match="no corpus here"):
        open_corpus(tmp_path)


@pytest.mark.parametrize("name", ["train-00000.tokens", "train-00000.documents", "validation-00000.text"])
def test_an_altered_file_is_refused_by_name(folder: Path, tmp_path: Path, name: str):
    copy = Path(shutil.copytree(folder, tmp_path / "corpus"))
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        open_corpus(copy)


def forge(copy: Path, how: str) -> str:
    """Damage a corpus folder and give it a manifest that fits; returns the file to be named."""
    facts = json.loads((copy / "corpus.json").read_text())
    if how == "ids out of range":
        facts["vocab_size"] = 100
    elif how == "another format":
        facts["format"] = 2
    elif how == "longer than it is":
        facts["splits"]["train"]["shards"][0]["tokens"] += 1
    elif how == "unordered borders":
        borders = np.fromfile(copy / "train-00000.documents", dtype="<i8").reshape(-1, 2)
        borders[[1, 2]] = borders[[2, 1]]
        borders.tofile(copy / "train-00000.documents")
    elif how == "moved border":
        borders = np.fromfile(copy / "train-00000.documents", dtype="<i8").reshape(-1, 2)
        borders[1, 0] -= 1
        borders.tofile(copy / "train-00000.documents")
    else:
        with open(copy / "train-00000.text", "ab") as file:
            file.write(b"more")
    (copy / "corpus.json").write_text(json.dumps(facts))
    write_manifest(copy)
    return "corpus.json" if how == "another format" else "train-00000"


@pytest.mark.parametrize(
    "how",
    [
        "ids out of range",
        "another format",
        "longer than it is",
        "unordered borders",
        "moved border",
        "longer text",
    ],
)
def test_a_corpus_that_contradicts_itself_is_refused_by_name(folder: Path, tmp_path: Path, how: str):
    copy = Path(shutil.copytree(folder, tmp_path / "corpus"))
    name = forge(copy, how)
    with pytest.raises(InputError, match=name):
        open_corpus(copy)
