"""Finding documents that repeat earlier ones, exactly or nearly, and texts that share long n-grams.

A text is a row of units: words in lower case without punctuation, or single characters where a script does not
separate words. Everything is computed for a batch of texts at once, on arrays. Near duplicates: MinHash (Broder
1997) over unit 5-grams, banded for locality-sensitive hashing. "published" is the setting of FineWeb and datatrove
(14 buckets of 8 hashes, candidates taken as they are, joined transitively). "verified" takes many more candidates
(40 buckets of 4) and then compares the real sets, so that it finds documents with 5 % of the words changed
(Jaccard about 0.63, of which "published" finds a third) and drops none whose n-grams differ by half.

Nothing is held per pair and little per document: keys are sorted a part of the key space at a time, candidate pairs
wait on disk, one sorted file per bucket, and are compared for a range of documents at a time. Measured with 2.5 million
documents: 266 MiB in all. The sets of n-grams kept for comparing are limited to 64 MiB.

datatrove's MinHash blocks are not used: they split words with spaCy, take one document at a time (signatures of
English Wikipedia on one core: 2.2 MB/s with the words split for them, here 16 MB/s with splitting), and
need a pass over files per step; the tests hold the "published" clusters against them. It knows no rules and no report.
"""

import hashlib
import json
import tempfile
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.corpus.language import UNSPACED

PLANES = 0x20000  # code points with entries of their own; those above are Han
PIECE = 2**20  # characters hashed at once, so that a long document needs no more memory
MIX = np.uint64(0x9E3779B97F4A7C15)
SCHEMES = {"verified": (40, 4), "published": (14, 8)}  # buckets, hashes per bucket
SHORTEST_WORDS, SHORTEST_CHARACTERS = 8, 12  # of an evaluation text that is looked for
COMPARISONS = 8  # real comparisons per document at most, so that a corpus of one template stays linear
PART_KEYS = 2**22  # keys that are sorted at once
RANGE_DOCUMENTS = 2**16  # documents whose candidates are in memory at once
SHINGLES = 2**23  # hashes of n-grams that are kept for comparing: 64 MiB

Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]


def scramble(values: np.ndarray) -> np.ndarray:
    """uint64 -> uint64: the finaliser of SplitMix64 (Steele et al. 2014), a bijection that mixes all bits."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=1)
def character_table() -> tuple[np.ndarray, np.ndarray]:
    """What each code point is.

    Returns:
        uint32 [planes] the lower-case code point of letters, digits and marks, 0 for what separates units; and
        bool [planes] whether it is a unit of its own.
    """
    single = np.zeros(PLANES, bool)
    position = 0
    pattern = list(UNSPACED)
    while position < len(pattern):
        first = last = ord(pattern[position])
        if position + 2 < len(pattern) and pattern[position + 1] == "-":
            last, position = ord(pattern[position + 2]), position + 2
        single[first : last + 1] = True
        position += 1
    folded = np.zeros(PLANES, np.uint32)
    for code in range(PLANES):
        category = unicodedata.category(chr(code))
        if category[0] in "LNM":
            folded[code] = ord(chr(code).lower()[0])
    return folded, single


@dataclass(frozen=True)
class Units:
    """The units of a batch of texts.

    Args:
        hashes: uint64 [units].
        starts: int64 [texts + 1] the first unit of each text, and their number.
        first, last: int64 [units] where each unit begins and ends (exclusive), in the texts joined by line breaks.
        by_character: bool [units] whether it is a single character of a script without spaces.
    """

    hashes: np.ndarray
    starts: np.ndarray
    first: np.ndarray
    last: np.ndarray
    by_character: np.ndarray


def read_units(texts: Sequence[str]) -> Units:
    """Units of some texts; words are hashed from their lower-case letters, marks and digits."""
    joined = "\n".join(texts)
    pieces, begin = [], 0
    while begin < len(joined) or not pieces:
        end = find_cut(joined, begin + PIECE)
        pieces.append(hash_units(joined[begin:end], begin))
        begin = max(end, 1)
    hashes, first, last, alone = (np.concatenate(columns) for columns in zip(*pieces, strict=True))
    edges = np.cumsum([0, *(len(text) + 1 for text in texts)])
    return Units(hashes, np.searchsorted(first, edges), first, last, alone)


def find_cut(joined: str, place: int) -> int:
    """Where to cut near `place`: not inside a word, unless it has more than a thousand characters."""
    if place >= len(joined):
        return len(joined)
    return next((p for p in range(place, min(place + 1000, len(joined))) if not joined[p].isalnum()), place)


def hash_units(text: str, offset: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Units of a piece of text that begins at `offset`: hashes, first, last and by_character of `Units`."""
    folded, single = character_table()
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    inside = np.minimum(codes, PLANES - 1)
    high = (codes >= PLANES) & (codes < 2 * PLANES)
    values = np.where(high, codes, folded[inside])
    at = np.flatnonzero(values)
    values, alone = values[at].astype(np.uint64), (single[inside] | high)[at]
    begins = np.ones(len(at), bool)
    if len(at):
        begins[1:] = (np.diff(at) > 1) | alone[1:] | alone[:-1]
    firsts = np.flatnonzero(begins)
    lengths = np.diff(np.append(firsts, len(at)))
    place = (np.arange(len(at)) - np.repeat(firsts, lengths)).astype(np.uint64)
    mixed = scramble(values * MIX + place * np.uint64(0xD1B54A32D192ED03))
    hashes = scramble(np.add.reduceat(mixed, firsts)) if len(firsts) else np.empty(0, np.uint64)
    return hashes, at[firsts] + offset, at[firsts + lengths - 1] + 1 + offset, alone[firsts]


def grams(units: Units, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of `length` units that lie within one text.

    Returns:
        uint64 [grams] hashes and int64 [grams] the unit each begins with, in order.
    """
    count = len(units.hashes) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    text = np.repeat(np.arange(len(units.starts) - 1), np.diff(units.starts))
    at = np.flatnonzero(text[:count] == text[length - 1 :])
    hashes = np.zeros(len(at), np.uint64)
    for offset in range(length):
        hashes = hashes * MIX + units.hashes[at + offset]
    return scramble(hashes), at


@lru_cache(maxsize=8)
def permutations(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint32 [count] odd factors and offsets of `count` permutations of 32-bit numbers."""
    generator = np.random.default_rng(seed)
    factors = generator.integers(0, 2**31, count, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    return factors, generator.integers(0, 2**32, count, dtype=np.uint32)


def bucket_keys(units: Units, scheme: str, length: int, minimum: int) -> tuple[np.ndarray, np.ndarray]:
    """MinHash bucket keys of a batch of texts.

    Args:
        units: from `read_units`.
        scheme: "verified" or "published".
        length: units per shingle.
        minimum: texts of fewer units have no keys.

    Returns:
        uint64 [buckets, texts] keys and bool [texts] whether a text has keys.
    """
    buckets, rows = SCHEMES[scheme]
    hashes, at = grams(units, length)
    sizes = np.diff(units.starts)
    has = (sizes >= max(length, minimum)) & (sizes > 0)
    keys = np.zeros((buckets, len(sizes)), np.uint64)
    # Each text with keys has at least one shingle: the segments of `reduceat` are not empty.
    text = np.searchsorted(units.starts, at, side="right") - 1
    chosen = has[text]
    small = (hashes[chosen] >> np.uint64(32)).astype(np.uint32)
    if not len(small):
        return keys, has
    firsts = np.searchsorted(text[chosen], np.flatnonzero(has))
    factors, offsets = permutations(buckets * rows, seed=1)
    work = np.empty_like(small)
    for bucket in range(buckets):
        key = np.full(len(firsts), bucket, np.uint64)
        for row in range(bucket * rows, bucket * rows + rows):
            np.bitwise_xor(small, offsets[row], out=work)
            np.multiply(work, factors[row], out=work)
            key = scramble(key * MIX + np.minimum.reduceat(work, firsts))
        keys[bucket, has] = key
    return keys, has


def exact_key(text: str) -> bytes:
    """16 bytes that are equal for texts equal but for case and white space."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode("utf-8", "replace"), digest_size=16).digest()


def split_keys(keys: np.ndarray, limit: int = PART_KEYS) -> Iterator[np.ndarray]:
    """The places of keys, int64 ascending, in lots of about `limit` of which no two share a key.

    Args:
        keys: [n, bytes] uint8 of well-mixed hashes.
        limit: keys of a lot.
    """
    lots = min(256, -(-len(keys) // limit))
    if lots <= 1:
        yield np.arange(len(keys))
        return
    for lot in range(lots):
        yield np.flatnonzero(keys[:, 0] % lots == lot)


def find_exact(keys: np.ndarray, limit: int = PART_KEYS) -> np.ndarray:
    """The first document equal to each one.

    Args:
        keys: [documents, 16] uint8, from `exact_key`.
        limit: keys that are sorted at once.

    Returns:
        int64 [documents]: the number of the first document with the same key; its own if it is the first.
    """
    first = np.empty(len(keys), np.int64)
    for places in split_keys(keys, limit):
        halves = np.ascontiguousarray(keys[places]).view(np.uint64).reshape(-1, 2)
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal keys stay in document order
        ordered = halves[order]
        fresh = np.ones(len(order), bool)
        fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        leaders = order[np.flatnonzero(fresh)]
        first[places[order]] = places[leaders[np.cumsum(fresh) - 1]]
    return first


def find_pairs(keys: np.ndarray, documents: np.ndarray, limit: int = PART_KEYS) -> np.ndarray:
    """Pairs of documents that share a bucket: each with the first in the bucket and with the one before it.

    Linking to the first and the one before gives the same clusters as all pairs, in linear space.

    Args:
        keys: uint64 [n] keys of one bucket.
        documents: int64 [n] numbers of the documents, ascending.
        limit: keys that are sorted at once.

    Returns:
        uint64 [pairs], ascending: the later document's number << 32, plus the earlier one's.
    """
    found = [np.empty(0, np.uint64)]
    for places in split_keys(keys.view(np.uint8).reshape(-1, 8), limit):
        order = places[np.argsort(keys[places], kind="stable")]
        ordered = keys[order]
        at = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        if not len(at):
            continue
        begins = np.concatenate(
            [[True], np.diff(at) > 1]
        )  # of a run of equal keys; its first stands before it
        leader = (at[begins] - 1)[np.cumsum(begins) - 1]
        later = documents[order[at]].astype(np.uint64) << np.uint64(32)
        found += [later | documents[order[other]].astype(np.uint64) for other in (leader, at - 1)]
    return np.unique(np.concatenate(found))


def gather_pairs(files: Sequence[Path], documents: int, size: int = RANGE_DOCUMENTS) -> Iterator[Pairs]:
    """Candidate pairs over all buckets, for a range of later documents at a time.

    Args:
        files: what `find_pairs` gave for each bucket, as raw numbers.
        documents: how many there are.
        size: documents of a range.

    Yields:
        int64 later and earlier documents, sorted, and in how many buckets each pair occurs.
    """
    columns = [np.memmap(file, np.uint64, "r") for file in files if file.stat().st_size]
    starts = np.arange(0, documents + size, size, dtype=np.uint64) << np.uint64(32)
    edges = [np.searchsorted(column, starts) for column in columns]
    for number in range(len(starts) - 1):
        parts = [column[edge[number] : edge[number + 1]] for column, edge in zip(columns, edges, strict=True)]
        if any(map(len, parts)):
            pairs, counts = np.unique(np.concatenate(parts), return_counts=True)
            later, earlier = pairs >> np.uint64(32), pairs & np.uint64(2**32 - 1)
            yield later.astype(np.int64), earlier.astype(np.int64), counts


def join_pairs(pairs: Iterator[Pairs], documents: int) -> np.ndarray:
    """Transitive clusters: int64 [documents], the first document of each one's cluster ("published")."""
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while (above := parent.get(node, node)) != node:
            parent[node] = node = parent.get(above, above)
        return node

    for later, earlier, _ in pairs:
        for one, other in zip(later.tolist(), earlier.tolist(), strict=True):
            low, high = sorted((root(one), root(other)))
            parent[high] = low
    kept = np.arange(documents)
    for node in parent:
        kept[node] = root(node)
    return kept


class Shingles:
    """Shingle sets of documents, read when asked for; the last are kept, up to a fixed number of shingles.

    Args:
        read_text: document number -> text.
        length: units per shingle.
    """

    def __init__(self, read_text: Callable[[int], str], length: int):
        self.read_text, self.length = read_text, length
        self.kept: OrderedDict[int, np.ndarray] = OrderedDict()
        self.size = 0

    def get(self, document: int) -> np.ndarray:
        """uint64 sorted, unique."""
        if document in self.kept:
            self.kept.move_to_end(document)
            return self.kept[document]
        shingles = np.unique(grams(read_units([self.read_text(document)]), self.length)[0])
        self.kept[document] = shingles
        self.size += len(shingles)
        while self.size > SHINGLES and len(self.kept) > 1:
            self.size -= len(self.kept.popitem(last=False)[1])
        return shingles

    def similarity(self, one: int, other: int) -> float:
        """Jaccard similarity of two documents' shingles."""
        left, right = self.get(one), self.get(other)
        both = len(np.intersect1d(left, right, assume_unique=True))
        return both / max(1, len(left) + len(right) - both)


def verify_pairs(pairs: Iterator[Pairs], documents: int, shingles: Shingles, similarity: float) -> np.ndarray:
    """Drop each document that is really similar to an earlier one that is kept ("verified").

    Args:
        pairs: from `gather_pairs`.
        documents: how many there are.
        shingles: to compare by.
        similarity: Jaccard similarity from which the later document repeats the earlier.

    Returns:
        int64 [documents]: the kept document that each repeats; its own number if it is kept.
    """
    kept = np.arange(documents)
    for later, earlier, counts in pairs:
        edges = [0, *(np.flatnonzero(np.diff(later)) + 1).tolist(), len(later)]
        for start, stop in pairwise(edges):
            document = int(later[start])
            likely = start + np.argsort(-counts[start:stop], kind="stable")
            candidates = dict.fromkeys(kept[earlier[likely]].tolist())
            for candidate in list(candidates)[:COMPARISONS]:
                if shingles.similarity(document, candidate) >= similarity:
                    kept[document] = candidate
                    break
    return kept


def open_column(path: Path, dtype: Any) -> np.ndarray:
    """A file of raw numbers, left on the disk."""
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


class Shelf:
    """The documents that the first pass left in some folders, by one running number, read from disk when asked for.

    A folder holds `documents` (one JSON list per line: id, text, ...), `offsets` (int64, where each line ends),
    `exact` (16 bytes per document), `has` (1 byte) and `bucket-NN` (8 bytes), and then `exact-repeats` and
    `near-repeats` (int64 per document: the number of the document that it repeats, its own if none).

    Args:
        folders: in the order of their documents.
    """

    def __init__(self, folders: Sequence[Path]):
        self.folders = list(folders)
        self.ends = [open_column(folder / "offsets", np.int64) for folder in folders]
        self.firsts = np.cumsum([0, *map(len, self.ends)])

    def __reduce__(self) -> tuple[type["Shelf"], tuple[list[Path]]]:
        """Another process is handed the folders, not what is in them."""
        return Shelf, (self.folders,)

    def read(self, document: int) -> list[Any]:
        """The record of one document."""
        part = int(np.searchsorted(self.firsts, document, side="right")) - 1
        number = document - int(self.firsts[part])
        start = int(self.ends[part][number - 1]) if number else 0
        with (self.folders[part] / "documents").open("rb") as file:
            file.seek(start)
            return json.loads(file.read(int(self.ends[part][number]) - start))

    def column(self, name: str, dtype: type) -> np.ndarray:
        """One file of every folder, joined: [all documents]."""
        columns = [open_column(folder / name, dtype) for folder in self.folders]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    def write_column(self, name: str, values: np.ndarray) -> None:
        """Write each folder its share of [all documents]."""
        for folder, first, last in zip(self.folders, self.firsts[:-1], self.firsts[1:], strict=True):
            values[first:last].tofile(folder / name)


def find_repeats(shelf: Shelf, exact: bool, scheme: str, length: int, similarity: float) -> None:
    """Find what repeats what, and write it to the folders as `exact-repeats` and `near-repeats`.

    Args:
        shelf: the documents.
        exact: look for equal documents.
        scheme: "verified", "published" or "none", for near ones among those that are not equal to an earlier one.
        length: units per shingle.
        similarity: for "verified".
    """
    count = int(shelf.firsts[-1])
    first = find_exact(shelf.column("exact", np.uint8).reshape(-1, 16)) if exact else np.arange(count)
    shelf.write_column("exact-repeats", first)
    if scheme == "none":
        return
    chosen = np.flatnonzero((shelf.column("has", np.uint8) > 0) & (first == np.arange(count)))
    del first
    with tempfile.TemporaryDirectory(dir=shelf.folders[0]) as folder:
        files = [Path(folder) / f"{bucket:02d}" for bucket in range(SCHEMES[scheme][0])]
        for bucket, file in enumerate(files):
            keys = shelf.column(f"bucket-{bucket:02d}", np.uint64)[chosen]
            find_pairs(keys, chosen).tofile(file)
        pairs = gather_pairs(files, count)
        if scheme == "published":
            kept = join_pairs(pairs, count)
        else:
            shingles = Shingles(lambda document: shelf.read(document)[1], length)
            kept = verify_pairs(pairs, count, shingles, similarity)
    shelf.write_column("near-repeats", kept)


class EvaluationIndex:
    """Hashes of the n-grams of evaluation texts, 8 bytes each, to find training texts that share one.

    GPT-3's rule (arXiv 2005.14165, appendix C): 13 words in a row, in lower case, without punctuation. In scripts
    without spaces 20 characters stand for 13 words. An evaluation text too short for that is looked for whole, if it
    has at least 8 words or 12 characters. It finds no paraphrases or translations: nothing that counts n-grams does.
    (datatrove's block needs the lighteval package and its tasks for its index.)

    Args:
        texts: the evaluation texts.
        ngram: words in a row that count as overlap.
        ngram_characters: the same in scripts without spaces.
    """

    def __init__(self, texts: Iterable[str], ngram: int = 13, ngram_characters: int = 20):
        found: dict[int, list[np.ndarray]] = {}
        for text in texts:
            units = read_units([text])
            count, spaced = len(units.hashes), units.by_character.mean() <= 0.5 if len(units.hashes) else True
            length, shortest = (ngram, SHORTEST_WORDS) if spaced else (ngram_characters, SHORTEST_CHARACTERS)
            if count >= shortest:
                length = min(length, count)
                found.setdefault(length, []).append(grams(units, length)[0])
        self.hashes = {length: np.unique(np.concatenate(parts)) for length, parts in sorted(found.items())}

    def find(self, texts: Sequence[str]) -> list[str]:
        """For each text the first n-gram that it shares with an evaluation text, as it stands there; "" for none."""
        units = read_units(texts)
        overlaps = [""] * len(texts)
        edges = np.cumsum([0, *(len(text) + 1 for text in texts)])
        for length, index in self.hashes.items():
            hashes, at = grams(units, length)
            place = np.minimum(np.searchsorted(index, hashes), len(index) - 1)
            for unit in at[index[place] == hashes].tolist():
                text = int(np.searchsorted(units.starts, unit, side="right")) - 1
                if not overlaps[text]:
                    first, last = units.first[unit] - edges[text], units.last[unit + length - 1] - edges[text]
                    overlaps[text] = texts[text][first:last]
        return overlaps
