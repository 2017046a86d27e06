import pickle
import random
import secrets
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xxhash  # noqa: F401  datatrove's blocks hash with it

from glasshouse.corpus import deduplicate
from glasshouse.corpus.clean import clean_documents
from glasshouse.corpus.deduplicate import (
    EvaluationIndex,
    Shelf,
    Shingles,
    find_exact,
    find_pairs,
    gather_pairs,
    grams,
    join_pairs,
    read_units,
)
from glasshouse.corpus.documents import Document
from glasshouse.corpus.quality import CleanRules
from glasshouse.corpus.waterfall import Waterfall

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 3000)]


@pytest.fixture
def seed() -> int:
    """Fresh in every run; every assertion that uses it says which."""
    return secrets.randbelow(2**32)


class Writer:
    """Random texts of a language's kind, and copies with edits."""

    def __init__(self, seed: int, chinese: bool):
        self.random, self.glue = random.Random(seed), "" if chinese else " "
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(self.random.choices(letters, k=self.random.randint(2, 9))) for _ in range(4000)]
        self.words = HAN if chinese else words

    def units(self, count: int) -> list[str]:
        return self.random.choices(self.words, k=count)

    def edit(self, units: list[str], share: float) -> list[str]:
        """Replace, remove or insert `share` of the units, at random places."""
        edited = list(units)
        for _ in range(max(1, round(share * len(units)))):
            place = self.random.randrange(len(edited))
            kind = self.random.randrange(3)
            edited[place : place + (kind != 2)] = [] if kind == 1 else [self.random.choice(self.words)]
        return edited

    def with_similarity(self, units: list[str], low: float, high: float) -> list[str]:
        """A copy whose 5-grams have a Jaccard similarity in [low, high]: a stretch of it is new."""
        while True:
            share = self.random.random()
            start = self.random.randrange(len(units))
            size = round(share * len(units))
            fresh = units[:start] + self.units(size) + units[start + size :]
            if low <= jaccard(units, fresh) <= high:
                return fresh

    def write(self, units: list[str]) -> str:
        return self.glue.join(units)


def jaccard(left: list[str], right: list[str]) -> float:
    one, other = ({tuple(units[i : i + 5]) for i in range(len(units) - 4)} for units in (left, right))
    return len(one & other) / len(one | other)


def clean(texts: list[str], work: Path, **rules: object) -> list[int]:
    documents = (Document(str(number), text, "", "", "en", {}) for number, text in enumerate(texts))
    chosen = CleanRules(profile="none", **rules)  # type: ignore[arg-type]
    return [int(document.id) for document in clean_documents(documents, chosen, Waterfall(), work)]


@pytest.mark.parametrize("chinese", [False, True])
def test_planted_repeats(seed: int, chinese: bool, tmp_path: Path):
    writer = Writer(seed, chinese)
    originals = [writer.units(writer.random.randint(60, 300)) for _ in range(300)]
    texts = [writer.write(units) for units in originals]
    exact = ["  " + text.upper().replace(" ", "\n") for text in texts[:60]]
    near = [writer.write(writer.edit(units, 0.05)) for units in originals[60:160]]
    kept = clean([*texts, *exact, *near], tmp_path)
    dropped = set(range(300 + 60 + 100)) - set(kept)
    assert not dropped & set(range(300)), (
        f"seed {seed}: originals dropped"
    )  # the first of each is kept: precision 1
    assert set(range(300, 360)) <= dropped, f"seed {seed}: an exact repeat was kept"
    found = len(dropped & set(range(360, 460)))
    assert found >= 95, f"seed {seed}: {found} of 100 near repeats found"


@pytest.mark.parametrize("chinese", [False, True])
def test_similar_found_and_different_spared(seed: int, chinese: bool, tmp_path: Path):
    writer = Writer(seed, chinese)
    originals = [writer.units(100) for _ in range(400)]
    similar = [writer.with_similarity(units, 0.8, 0.9) for units in originals[:200]]
    different = [writer.with_similarity(units, 0.3, 0.5) for units in originals[200:]]
    kept = set(clean([writer.write(units) for units in [*originals, *similar, *different]], tmp_path))
    assert set(range(400)) <= kept
    assert len(kept & set(range(400, 600))) < 10, f"seed {seed}: too many with J >= 0.8 kept"
    assert len(set(range(600, 800)) - kept) < 10, f"seed {seed}: too many with J <= 0.5 dropped"


def test_published_scheme_has_the_published_curve(seed: int, tmp_path: Path):
    writer = Writer(seed, chinese=False)
    originals = [writer.units(100) for _ in range(300)]
    copies = [writer.with_similarity(units, 0.68, 0.76) for units in originals]
    texts = [writer.write(units) for units in originals + copies]
    dropped = 600 - len(clean(texts, tmp_path, near_duplicates="published"))
    similarities = [jaccard(a, b) for a, b in zip(originals, copies, strict=True)]
    expected = sum(1 - (1 - s**8) ** 14 for s in similarities)  # MinHash banding: 14 buckets of 8
    assert abs(dropped - expected) < 45, f"seed {seed}: {dropped} dropped, {expected:.0f} expected"


def test_published_agrees_with_datatrove(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same clusters as datatrove's blocks, where the probability leaves no doubt; given the same words."""
    minhash = pytest.importorskip("datatrove.pipeline.dedup.minhash")
    from datatrove.data import Document as Sample

    class Words:
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

    monkeypatch.setattr(minhash, "load_word_tokenizer", lambda language: Words())
    writer = Writer(seed, chinese=False)
    originals = [writer.units(150) for _ in range(40)]
    copies = [writer.with_similarity(units, 0.92, 1) for units in originals[:20]]
    copies += [writer.with_similarity(units, 0.0, 0.25) for units in originals[20:]]
    texts = [writer.write(units) for units in originals + copies]
    samples = [Sample(text, str(number)) for number, text in enumerate(texts)]
    folders = [str(tmp_path / name) for name in ("signatures", "buckets", "removals")]
    minhash.MinhashDedupSignature(folders[0]).run(samples)
    for bucket in range(14):
        minhash.MinhashDedupBuckets(folders[0], folders[1]).run(None, bucket, 14)
    minhash.MinhashDedupCluster(folders[1], folders[2]).run(None, 0, 1)
    theirs = [int(sample.id) for sample in minhash.MinhashDedupFilter(folders[2]).run(samples)]
    assert clean(texts, tmp_path / "ours", near_duplicates="published") == theirs, f"seed {seed}"
    assert len(theirs) == 60


def test_verified_keeps_what_only_a_chain_joins(tmp_path: Path):
    """B repeats A, and C repeats B but not A: C stays, for A is what is left of the two."""
    words = [f"word{number}" for number in range(400)]
    texts = [" ".join(words[start : start + 200]) for start in (0, 35, 70)]
    assert clean(texts, tmp_path, near_duplicate_similarity=0.6) == [0, 2]


def test_short_texts_are_compared_exactly(tmp_path: Path):
    texts = [
        "The cat sat on the big red mat.",
        "The cat sat on the big red bed.",
        "the cat sat on the big RED mat.",
    ]
    assert clean(texts, tmp_path) == [0, 1]


def test_switched_off(tmp_path: Path):
    text = " ".join(f"word{number}" for number in range(100))
    assert clean([text, text], tmp_path, exact_duplicates=False, near_duplicates="none") == [0, 1]
    assert clean([text, text], tmp_path, skip=("exact_duplicates", "near_duplicates")) == [0, 1]
    assert clean([text, text + " end"], tmp_path, near_duplicates="none") == [0, 1]
    assert clean([text, text], tmp_path, exact_duplicates=False) == [0]


def test_units_are_words_and_han_characters():
    texts = ["The CAT, don't!", "", "我爱 GPT2。你", "the cat don t"]
    units = read_units(texts)
    joined = "\n".join(texts)
    spans = [joined[a:b] for a, b in zip(units.first, units.last, strict=True)]
    assert spans == ["The", "CAT", "don", "t", "我", "爱", "GPT2", "你", "the", "cat", "don", "t"]
    assert units.starts.tolist() == [0, 4, 4, 8, 12]
    assert units.by_character.tolist() == [False] * 4 + [True, True, False, True] + [False] * 4
    assert np.array_equal(units.hashes[:4], units.hashes[8:])  # case and punctuation do not count
    assert len(set(units.hashes.tolist())) == 8


def test_long_texts_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch):
    texts = ["one two three " * 50, "我爱你" * 40 + "abc", "", "x" * 300, "end"]
    whole = read_units(texts)
    monkeypatch.setattr("glasshouse.corpus.deduplicate.PIECE", 23)
    pieces = read_units(texts)
    for name in ("hashes", "starts", "first", "last", "by_character"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name)), name


def test_grams_stay_within_a_text():
    units = read_units(["a b c", "d", "a b c d"])
    hashes, at = grams(units, 3)
    assert at.tolist() == [0, 4, 5]
    assert hashes[0] == hashes[1] != hashes[2]
    assert len(grams(read_units([""]), 3)[0]) == 0


def reference_pairs(keys: list[int], documents: list[int]) -> list[tuple[int, int]]:
    """What `find_pairs` promises, one document at a time."""
    first: dict[int, int] = {}
    before: dict[int, int] = {}
    pairs = set()
    for key, document in zip(keys, documents, strict=True):
        if key in first:
            pairs |= {(document, first[key]), (document, before[key])}
        first.setdefault(key, document)
        before[key] = document
    return sorted(pairs)


def halves(pairs: np.ndarray) -> list[tuple[int, int]]:
    later, earlier = (pairs >> np.uint64(32)).tolist(), (pairs & np.uint64(2**32 - 1)).tolist()
    return list(zip(later, earlier, strict=True))


@pytest.mark.parametrize("limit", [2**22, 3, 1])
def test_find_exact_and_pairs(seed: int, limit: int):
    keys = (
        np.array([[1, 2], [3, 4], [1, 2], [1, 5], [3, 4], [1, 2]], np.uint64).view(np.uint8).reshape(-1, 16)
    )
    assert find_exact(keys, limit).tolist() == [0, 1, 0, 3, 1, 0]
    assert find_exact(keys[:0], limit).tolist() == []
    some = np.array([7, 8, 7, 9, 7], np.uint64), np.array([10, 11, 12, 13, 14])
    assert halves(find_pairs(*some, limit)) == [(12, 10), (14, 10), (14, 12)]
    generator = random.Random(seed)
    drawn = [generator.randrange(40) for _ in range(100)]
    documents = sorted(generator.sample(range(1000), 100))
    found = find_pairs(np.array(drawn, np.uint64), np.array(documents), limit)
    assert halves(found) == reference_pairs(drawn, documents), f"seed {seed}"


@pytest.mark.parametrize("size", [1, 7, 2**16])
def test_pairs_are_counted_and_joined_range_by_range(seed: int, size: int, tmp_path: Path):
    generator, expected = random.Random(seed), Counter[tuple[int, int]]()
    files = [tmp_path / str(number) for number in range(4)]
    for file in files:
        keys = [generator.randrange(60) for _ in range(100)]
        pairs = find_pairs(np.array(keys, np.uint64), np.arange(100))
        expected.update(halves(pairs))
        pairs.tofile(file)
    (tmp_path / "empty").touch()
    ranges = list(gather_pairs([*files, tmp_path / "empty"], 100, size))
    assert all(len({one // size for one in later.tolist()}) == 1 for later, _, _ in ranges)
    rows = [row for columns in ranges for row in zip(*(column.tolist() for column in columns), strict=True)]
    assert rows == [(*pair, count) for pair, count in sorted(expected.items())], f"seed {seed}"
    chain = [(np.array([3, 4]), np.array([1, 3]), np.ones(2)), (np.array([4]), np.array([2]), np.ones(1))]
    assert join_pairs(iter(chain), 5).tolist() == [0, 1, 1, 1, 1]


def test_kept_shingles_are_limited(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deduplicate, "SHINGLES", 100)
    read: list[int] = []
    shingles = Shingles(
        lambda number: read.append(number) or " ".join(f"w{number}x{i}" for i in range(44)), 5
    )
    assert [len(shingles.get(number)) for number in (0, 1, 1, 0, 2, 0, 1)] == [40] * 7
    assert read == [0, 1, 2, 1]
    assert shingles.size <= 100


def test_another_process_is_handed_folders_only(tmp_path: Path):
    lines = [b'["a", "one"]\n', b'["b", "two"]\n']
    (tmp_path / "documents").write_bytes(b"".join(lines))
    np.cumsum([len(line) for line in lines]).astype(np.int64).tofile(tmp_path / "offsets")
    data = pickle.dumps(Shelf([tmp_path]))
    (tmp_path / "offsets").write_bytes(b"")
    assert len(pickle.loads(data).ends[0]) == 0  # read anew, not taken along


@pytest.mark.parametrize("chinese", [False, True])
def test_evaluation_overlap(seed: int, chinese: bool):
    writer = Writer(seed, chinese)
    length = 20 if chinese else 13
    evaluation = [writer.units(40) for _ in range(100)]
    index = EvaluationIndex(map(writer.write, evaluation))
    hidden = [writer.units(100) + units[5 : 5 + length] + writer.units(50) for units in evaluation]
    spared = [writer.units(100) + units[5 : 4 + length] + writer.units(50) for units in evaluation]
    for units, overlap in zip(evaluation, index.find([writer.write(text) for text in hidden]), strict=True):
        assert len(read_units([overlap]).hashes) == length, f"seed {seed}"
        assert overlap in writer.write(units), f"seed {seed}"
    assert sum(map(bool, index.find([writer.write(text) for text in spared]))) <= 2, f"seed {seed}"


def test_evaluation_texts_that_are_short_are_looked_for_whole():
    index = EvaluationIndex(
        ["What is the capital of France called today?", "Too short to tell", "今天北京的天气怎么样呢朋友"]
    )
    texts = ["He asked: what is the capital of FRANCE, called today", "what is the capital of France"]
    texts += ["Too short to tell", "有人问，今天北京的天气怎么样呢，朋友？"]
    found = index.find(texts)
    assert found[0] == "what is the capital of FRANCE, called today"
    assert found[1:3] == ["", ""]
    assert found[3] == "今天北京的天气怎么样呢，朋友"
