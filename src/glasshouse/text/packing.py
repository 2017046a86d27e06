"""A prepared corpus on disk, and the order in which training reads it.

A corpus folder (`shards` writes it) is memory-mapped, so its size does not matter. Which tokens make batch number
`step` is a pure function of (split, step, rows, context, seed): there is no loader, hence no loader state to save.
Knows nothing of models and tokenizers.
"""

import gzip
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.errors import InputError
from glasshouse.files import read_json, verify_manifest

CORPUS_FILE = "corpus.json"
TRAIN, VALIDATION = "train", "validation"
SAMPLED_TOKENS = 2**16
FEISTEL_ROUNDS = 6


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents; all arrays are [rows, context].

    Args:
        tokens: int64 token ids.
        labels: int64 id of the token that follows each; .
        positions: int64 position inside the document, 0 for the end-of-document token before it (or the row's first).
        documents: int32 number of the document inside the row; attention must not cross it.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    documents: np.ndarray


def take_rows(batch: Batch, start: int, stop: int) -> Batch:
    """Rows start..stop of a batch: a micro-batch, or one process's share."""
    return Batch(
        batch.tokens[start:stop],
        batch.labels[start:stop],
        batch.positions[start:stop],
        batch.documents[start:stop],
    )


@dataclass(frozen=True)
class Shard:
    """One memory-mapped piece of a split.

    Args:
        path: the path of its files, without their ending.
        tokens: [tokens] ids, uint16 or uint32.
        borders: [documents, 2] int64: start of each document in `tokens`, and its length in UTF-8 bytes.
    """

    path: Path
    tokens: np.ndarray
    borders: np.ndarray

    @cached_property
    def text_starts(self) -> np.ndarray:
        """[documents + 1] int64: where each document begins in the .text file."""
        return np.concatenate([[0], np.cumsum(self.borders[:, 1])])

    @cached_property
    def metadata(self) -> list[bytes]:
        """One JSON line per document."""
        return gzip.decompress(self.path.with_suffix(".jsonl.gz").read_bytes()).split(b"\n")[:-1]


class Split:
    """The training or the validation side of a corpus: documents one after another, as one stream of tokens.

    Args:
        name: "train" or "validation".
        shards: its pieces, in order.
        end_of_document: the id that ends every document.
        size: UTF-8 bytes of all documents.
    """

    def __init__(self, name: str, shards: list[Shard], end_of_document: int, size: int):
        self.name, self.shards, self.end_of_document, self.bytes = name, shards, end_of_document, size
        self._token_starts = np.cumsum([0] + [len(shard.tokens) for shard in shards])
        self._document_starts = np.cumsum([0] + [len(shard.borders) for shard in shards])
        self.tokens = int(self._token_starts[-1])
        self.documents = int(self._document_starts[-1])

    def _locate(self, number: int) -> tuple[Shard, int]:
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents}")
        shard = int(np.searchsorted(self._document_starts, number, side="right")) - 1
        return self.shards[shard], number - int(self._document_starts[shard])

    def document(self, number: int) -> tuple[np.ndarray, int]:
        """The ids of a document, its end-of-document token last, and its length in UTF-8 bytes."""
        shard, index = self._locate(number)
        start, size = (int(value) for value in shard.borders[index])
        stop = int(shard.borders[index + 1, 0]) if index + 1 < len(shard.borders) else len(shard.tokens)
        return shard.tokens[start:stop], size

    def text(self, number: int) -> str:
        """The text of a document, as it was encoded."""
        shard, index = self._locate(number)
        with open(shard.path.with_suffix(".text"), "rb") as file:
            file.seek(int(shard.text_starts[index]))
            return file.read(int(shard.borders[index, 1])).decode("utf-8")

    def metadata(self, number: int) -> dict[str, Any]:
        """Where a document came from: id, source, licence, language."""
        shard, index = self._locate(number)
        return json.loads(shard.metadata[index])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids of the stream from token `start` on; after its last token the stream begins again."""
        pieces, position = [], start % self.tokens
        while count > 0:
            shard = int(np.searchsorted(self._token_starts, position, side="right")) - 1
            offset = position - int(self._token_starts[shard])
            piece = self.shards[shard].tokens[offset : offset + count]
            pieces.append(piece)
            count -= len(piece)
            position = (position + len(piece)) % self.tokens
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class Corpus:
    """An open corpus folder.

    Args:
        folder: where it is.
        facts: the contents of corpus.json.
        splits: its two sides, by name.
        digest: digest of its manifest.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], splits: dict[str, Split], digest: str):
        self.folder, self.facts, self.digest = folder, facts, digest
        self.vocab_size: int = facts["vocab_size"]
        self.end_of_document: int = facts["end_of_document"]
        self._splits = splits

    def split(self, name: str) -> Split:
        """One side of the corpus: "train" or "validation"."""
        return self._splits[name]


def open_corpus(folder: Path) -> Corpus:
    """Open a corpus folder, memory-mapped, after checking every file against its manifest.

    Raises:
        InputError: there is no corpus, a file is missing, altered or of the wrong size, or a token id is out of range.
    """
    folder = Path(folder)
    if not (folder / CORPUS_FILE).is_file():
        raise InputError("no corpus here", str(folder), "give the corpus/ folder of a finished prepare run")
    digest = verify_manifest(folder)
    facts = read_json(folder / CORPUS_FILE)
    if (
        not isinstance(facts, dict)
        or facts.get("format") != 1
        or facts.get("dtype") not in ("uint16", "uint32")
    ):
        raise InputError(
            "a corpus format this version does not know", str(folder / CORPUS_FILE), "prepare it again"
        )
    splits = {}
    for name in (TRAIN, VALIDATION):
        listed = facts["splits"][name]
        shards = [_open_shard(folder, entry, facts) for entry in listed["shards"]]
        splits[name] = Split(name, shards, facts["end_of_document"], listed["bytes"])
    return Corpus(folder, facts, splits, digest)


def _open_shard(folder: Path, entry: dict[str, Any], facts: dict[str, Any]) -> Shard:
    path = folder / entry["file"]
    tokens_path, borders_path = path.with_suffix(".tokens"), path.with_suffix(".documents")
    width = np.dtype(facts["dtype"]).itemsize
    for file, expected in ((tokens_path, entry["tokens"] * width), (borders_path, entry["documents"] * 16)):
        if not file.is_file() or file.stat().st_size != expected or expected == 0:
            raise InputError(
                f"not the {expected:,} bytes corpus.json speaks of", str(file), "prepare the corpus again"
            )
    tokens = np.memmap(tokens_path, dtype=np.dtype(facts["dtype"]).newbyteorder("<"), mode="r")
    borders = np.memmap(borders_path, dtype="<i8", mode="r").reshape(-1, 2)
    starts = borders[:, 0]
    if (
        starts[0] != 0
        or (np.diff(starts) <= 0).any()
        or starts[-1] >= len(tokens)
        or (borders[:, 1] < 0).any()
    ):
        raise InputError("document borders out of order", str(borders_path), "prepare the corpus again")
    if path.with_suffix(".text").stat().st_size != int(borders[:, 1].sum()):
        raise InputError(
            "not as long as its documents", str(path.with_suffix(".text")), "prepare the corpus again"
        )
    sampled = tokens[:: max(1, len(tokens) // SAMPLED_TOKENS)]
    ends = tokens[starts[1:][:SAMPLED_TOKENS] - 1]
    if int(sampled.max()) >= facts["vocab_size"] or (ends != facts["end_of_document"]).any():
        raise InputError(
            "token ids that the vocabulary does not have", str(tokens_path), "prepare the corpus again"
        )
    return Shard(path, tokens, borders)


def windows_per_epoch(split: Split, context: int) -> int:
    """How many rows of `context` tokens one pass over a split gives.

    Raises:
        InputError: not even one; says how much text is needed.
    """
    windows = split.tokens // context
    if windows == 0:
        needed = split.bytes * context / max(1, split.tokens)
        raise InputError(
            f"the {split.name} text has {split.tokens:,} tokens, fewer than one row of {context:,}",
            f"{split.name} split",
            f"give at least {needed / 1e3:,.1f} kB of {split.name} text, or a smaller context",
        )
    return windows


def batch(split: Split, step: int, rows: int, context: int, seed: int) -> Batch:
    """The rows of one optimizer step: a pure function of its arguments, at the same cost for any step.

    A pass over the split (an epoch) reads it as a ring, from a start drawn for that epoch, in windows of `context`
    tokens; every window is used exactly once, in an order drawn for that epoch. Rows are numbered through all steps, so
    an epoch may begin inside a batch.

    Args:
        split: where to read.
        step: number of the batch, from 0.
        rows: rows of the batch, of all processes and micro-batches together.
        context: tokens in a row.
        seed: seed of the order.

    Raises:
        InputError: the split is shorter than one row.
    """
    windows = windows_per_epoch(split, context)
    first = step * rows
    stream = np.empty((rows, context + 1), dtype=np.int64)
    for epoch in range(first // windows, (first + rows - 1) // windows + 1):
        start, stop = max(first, epoch * windows), min(first + rows, (epoch + 1) * windows)
        chosen = permute(np.arange(start - epoch * windows, stop - epoch * windows), windows, seed, epoch)
        offset = int(_draw(seed, epoch, "offset") % split.tokens)
        for row, window in zip(range(start - first, stop - first), chosen.tolist(), strict=True):
            stream[row] = split.read(offset + window * context, context + 1)
    return pack_rows(stream, split.end_of_document)


def pack_rows(stream: np.ndarray, end_of_document: int) -> Batch:
    """Turn windows of the stream into a batch.

    The end-of-document token has two parts: it is what the last token of a document must predict, and it is what the
    next document is read after. So it belongs to the document that follows it, as in generation, where it begins the
    prompt; every token of a document is predicted, its first one too.

    Args:
        stream: [rows, context + 1] int64 ids, every document ended by `end_of_document`.
        end_of_document: that id.
    """
    tokens, labels = stream[:, :-1], stream[:, 1:].copy()
    begun = tokens == end_of_document
    documents = np.cumsum(begun, axis=1, dtype=np.int32)
    columns = np.arange(tokens.shape[1], dtype=np.int64)
    positions = columns - np.maximum.accumulate(np.where(begun, columns, 0), axis=1)
    return Batch(np.ascontiguousarray(tokens), labels, positions, documents)


def _draw(seed: int, epoch: int, purpose: str) -> int:
    """64 bits that depend on all arguments and on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()[:8], "little")


def permute(numbers: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a random permutation of range(size) sends some numbers, in memory that does not depend on `size`.

    A Feistel network (Luby and Rackoff 1988) permutes the next power of four; numbers that leave the range walk on
    until they come back (Black and Rogaway 2002).

    Args:
        numbers: [n] integers in range(size).
        size: of the range.
        seed: of the permutation.
        epoch: a different permutation for each.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = [np.uint64(_draw(seed, epoch, f"round {number}")) for number in range(FEISTEL_ROUNDS)]
    result = _feistel(numbers.astype(np.uint64), half, keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def _feistel(numbers: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    left, right = numbers >> shift, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << shift) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
