"""Documents -> a corpus folder, as a stream: encoded, divided by the hash of their text, written in shards.

Per shard: `.tokens` (ids as raw little-endian integers, every document followed by the end-of-document token),
`.documents` (two int64 per document: its first token, its length in UTF-8 bytes), `.text` (the documents' UTF-8 one
after another) and `.jsonl.gz` (a line per document: id, source, licence, language). Knows nothing of cleaning.
"""

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.errors import InputError
from glasshouse.files import write_json
from glasshouse.text.corpus import Document
from glasshouse.text.packing import CORPUS_FILE, TRAIN, VALIDATION
from glasshouse.text.tokenizer import Tokenizer

SHARD_TOKENS = 2**27
BATCH_BYTES = 4 * 2**20


def hash_fraction(text: str) -> float:
    """A number in [0, 1) from the SHA-256 of a text: which side of the split it belongs to, wherever it occurs."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:6], "big") / 2**48


def choose_threshold(texts: Iterable[str], validation_fraction: float) -> float:
    """The hash fraction below which a document is held out, so that both sides have at least one document.

    Raises:
        InputError: there are not two different texts.
    """
    lowest, highest_train, second = 1.0, -1.0, 1.0
    for text in texts:
        fraction = hash_fraction(text)
        if fraction < lowest:
            lowest, second = fraction, lowest
        elif lowest < fraction < second:
            second = fraction
        highest_train = max(highest_train, fraction)
    if second >= 1.0:
        raise InputError(
            "fewer than two different documents: nothing can be held out", "documents", "give more text"
        )
    return min(max(validation_fraction, (lowest + second) / 2), highest_train)


class CorpusWriter:
    """Writes documents into the shards of a folder as they come; memory does not grow with the corpus.

    Args:
        folder: an empty folder.
        vocab_size: decides how many bytes an id takes.
        end_of_document: id written after every document.
        shard_tokens: tokens after which a new shard is begun.
    """

    def __init__(self, folder: Path, vocab_size: int, end_of_document: int, shard_tokens: int = SHARD_TOKENS):
        self._folder, self._vocab_size, self._end = Path(folder), vocab_size, end_of_document
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._shard_tokens = shard_tokens
        self._splits: dict[str, dict[str, Any]] = {
            name: {"shards": [], "tokens": 0, "documents": 0, "bytes": 0} for name in (TRAIN, VALIDATION)
        }
        self._files: dict[str, list[Any]] = {}
        self._open: dict[str, ExitStack] = {}
        self._counts = {name: Counter[str]() for name in ("languages", "licences", "sources")}

    def add(self, split: str, document: Document, text: bytes, tokens: np.ndarray) -> None:
        """Append one document: its text as UTF-8 and its ids, without the end-of-document token."""
        listed = self._splits[split]
        if not listed["shards"] or listed["shards"][-1]["tokens"] >= self._shard_tokens:
            self._next_shard(split)
        shard, (ids, borders, texts, lines) = listed["shards"][-1], self._files[split]
        ids.write(np.append(tokens, self._end).astype(self._dtype).tobytes())
        borders.write(np.array([shard["tokens"], len(text)], dtype="<i8").tobytes())
        texts.write(text)
        facts = {"id": document.id, "source": document.source}
        facts |= {"licence": document.licence, "language": document.language}
        lines.write(json.dumps(facts, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        for place in (shard, listed):
            place["tokens"] += len(tokens) + 1
            place["documents"] += 1
        listed["bytes"] += len(text)
        for name, value in (
            ("languages", document.language),
            ("licences", document.licence),
            ("sources", document.source),
        ):
            self._counts[name][value or "unknown"] += 1

    def _next_shard(self, split: str) -> None:
        self._close(split)
        shards = self._splits[split]["shards"]
        stem = self._folder / f"{split}-{len(shards):05d}"
        shards.append({"file": stem.name, "tokens": 0, "documents": 0})
        stack = ExitStack()
        raw: list[Any] = []
        for ending in (".tokens", ".documents", ".text", ".jsonl.gz"):
            raw.append(stack.enter_context(open(stem.with_suffix(ending), "wb")))
        # No name and no time in the header: the same corpus must have the same digest.
        lines = gzip.GzipFile(filename="", mode="wb", fileobj=raw.pop(), mtime=0)
        self._files[split] = [*raw, stack.enter_context(lines)]
        self._open[split] = stack

    def _close(self, split: str) -> None:
        if split in self._open:
            self._open.pop(split).close()

    def finish(self) -> dict[str, Any]:
        """Close the shards and write corpus.json; returns its contents."""
        for split in list(self._open):
            self._close(split)
        facts = {
            "format": 1,
            "vocab_size": self._vocab_size,
            "dtype": "uint16" if self._dtype.itemsize == 2 else "uint32",
            "end_of_document": self._end,
            "splits": self._splits,
            **{name: dict(counts.most_common(1000)) for name, counts in self._counts.items()},
        }
        write_json(self._folder / CORPUS_FILE, facts)
        return facts


def encode_in_batches(
    documents: Iterable[Document], tokenizer: Tokenizer, threads: int = 2
) -> Iterator[tuple[Document, bytes, np.ndarray]]:
    """Encode documents a few megabytes at a time: (document, text as UTF-8, ids)."""
    waiting: list[Document] = []
    size = 0
    for document in documents:
        waiting.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield from _encode(waiting, tokenizer, threads)
            waiting, size = [], 0
    yield from _encode(waiting, tokenizer, threads)


def _encode(
    documents: list[Document], tokenizer: Tokenizer, threads: int
) -> Iterator[tuple[Document, bytes, np.ndarray]]:
    arrays = tokenizer.encode_batch_arrays([document.text for document in documents], threads)
    for document, ids in zip(documents, arrays, strict=True):
        yield document, document.text.encode("utf-8"), ids


def write_corpus(
    folder: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    validation_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    threads: int = 2,
) -> dict[str, Any]:
    """Encode documents and write them, the tokenizer and corpus.json into a folder.

    The manifest is the caller's (`files.atomic_folder` writes it): a reader refuses a folder without one.

    Args:
        folder: an existing, empty folder.
        documents: read twice, so a list or another object that can be iterated again.
        tokenizer: encodes them.
        validation_fraction: share of documents held out, chosen by the SHA-256 of their text.
        shard_tokens: tokens of a shard.
        threads: encoding threads.

    Returns:
        The contents of corpus.json.

    Raises:
        InputError: there are fewer than two different documents.
    """
    threshold = choose_threshold((document.text for document in documents), validation_fraction)
    writer = CorpusWriter(folder, tokenizer.vocab_size, tokenizer.end_of_document, shard_tokens)
    for document, text, ids in encode_in_batches(documents, tokenizer, threads):
        side = VALIDATION if hash_fraction(document.text) < threshold else TRAIN
        writer.add(side, document, text, ids)
    tokenizer.save(folder)
    return writer.finish()
