"""Documents -> a corpus folder, as a stream: encoded, divided by the hash of their text, written in shards.

Per shard: `.tokens` (ids as raw little-endian integers, every document followed by the end-of-document token),
`.documents` (two int64 per document: its first token, its length in UTF-8 bytes), `.text` (the documents' UTF-8 one
after another) and `.jsonl.gz` (a line per document: id, source, licence, language). Knows nothing of cleaning.
"""

import gzip
import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.corpus.documents import Document
from glasshouse.errors import InputError
from glasshouse.files import write_json
from glasshouse.text.packing import CORPUS_FILE, TRAIN, VALIDATION
from glasshouse.text.tokenizer import Tokenizer, training_cost

SHARD_TOKENS = 2**27
BATCH_CHARACTERS = 2 * 2**20
NAMES_LIMIT = 10_000
UNKNOWN, OTHERS = "unknown", "others"

Sided = tuple[str, Document]
Encoded = tuple[str, Document, np.ndarray]


@dataclass(frozen=True)
class Packing:
    """How documents are packed.

    Args:
        shard_tokens: tokens after which a new shard is begun.
        threads: encoding threads.
        fast: use the tokenizer's faster encoder where it has one.
    """

    shard_tokens: int = SHARD_TOKENS
    threads: int = 2
    fast: bool = True


class Spool:
    """Cleaned documents in a file, in order, to be read as often as needed; knows their number, bytes and what they
    would cost a tokenizer's training.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self._path = path
        self.documents = self.bytes = self.cost = 0

    def fill(self, documents: Iterable[Document]) -> None:
        """Write documents that have any text."""
        with open(self._path, "wb") as file:
            for document in documents:
                text = document.text
                if not text.strip():
                    continue
                row = [document.id, text, document.source, document.licence, document.language, {}]
                file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                self.documents += 1
                self.bytes += len(text.encode("utf-8", "replace"))
                self.cost += training_cost(text)

    def __iter__(self) -> Iterator[Document]:
        with open(self._path, "rb") as file:
            for line in file:
                yield Document(*json.loads(line))


def hash_fraction(text: str) -> float:
    """A number in [0, 1) from the SHA-256 of a text: which side of the split it belongs to, wherever it occurs."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:6], "big") / 2**48


def choose_threshold(texts: Iterable[str], validation_fraction: float) -> float:
    """The hash fraction below which a document is held out, so that both sides have at least one document.

    Raises:
        InputError: there are not two different texts.
    """
    lowest, second, highest = 1.0, 1.0, 0.0
    for text in texts:
        fraction = hash_fraction(text)
        if fraction < lowest:
            lowest, second = fraction, lowest
        elif lowest < fraction < second:
            second = fraction
        highest = max(highest, fraction)
    if second >= 1.0:
        raise InputError(
            "fewer than two different documents: none can be held out", "documents", "give more text"
        )
    return min(max(validation_fraction, (lowest + second) / 2), highest)


def divide_by_hash(documents: Iterable[Document], threshold: float) -> Iterator[Sided]:
    """Hold out the documents whose `hash_fraction` is below a threshold: equal texts are always on one side."""
    for document in documents:
        yield (VALIDATION if hash_fraction(document.text) < threshold else TRAIN), document


def divide_at_end(documents: Iterable[Document], total: int, validation_fraction: float) -> Iterator[Sided]:
    """Hold out the last part of the text in reading order; the document at the border is cut between two lines.

    Args:
        documents: in reading order.
        total: UTF-8 bytes of all of them.
        validation_fraction: share of the bytes to hold out.
    """
    left = round(total * (1 - validation_fraction))
    for document in documents:
        size = len(document.text.encode("utf-8"))
        if size <= left or left <= 0:
            yield (TRAIN if left > 0 else VALIDATION), document
        else:
            first, last = _cut(document.text, left)
            if first:
                yield TRAIN, replace(document, text=first)
            if last:
                yield VALIDATION, replace(document, text=last, id=f"{document.id}#held-out")
        left -= size


def _cut(text: str, size: int) -> tuple[str, str]:
    """Cut a text near `size` bytes, after a line if there is one, else after a space, else between characters."""
    place = len(text.encode("utf-8")[:size].decode("utf-8", "ignore")) or 1
    for border in ("\n", " "):
        after = text.rfind(border, 0, place) + 1
        if 0 < after < len(text):
            return text[:after], text[after:]
    return text[:place], text[place:]


def _metadata_line(document: Document) -> bytes:
    facts = {"id": document.id, "source": document.source}
    facts |= {"licence": document.licence, "language": document.language}
    return json.dumps(facts, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


class CorpusWriter:
    """Writes documents into the shards of a folder as they come; memory does not grow with the corpus.

    Args:
        folder: an empty folder.
        vocab_size: decides how many bytes an id takes.
        end_of_document: id written after every document.
        shard_tokens: tokens after which a new shard is begun.
    """

    def __init__(self, folder: Path, vocab_size: int, end_of_document: int, shard_tokens: int = SHARD_TOKENS):
        self._folder, self._vocab_size, self._end_of_document = Path(folder), vocab_size, end_of_document
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._end = np.array([end_of_document], dtype=self._dtype).tobytes()
        self._shard_tokens = shard_tokens
        self._splits: dict[str, dict[str, Any]] = {
            name: {"shards": [], "tokens": 0, "documents": 0, "bytes": 0} for name in (TRAIN, VALIDATION)
        }
        self._files: dict[str, list[Any]] = {}
        self._waiting: dict[str, list[list[bytes]]] = {side: [[], [], [], []] for side in self._splits}
        self._open: dict[str, ExitStack] = {}
        self._counts = {name: Counter[str]() for name in ("licences", "sources")}
        self._measured: dict[tuple[str, str], dict[str, int]] = {}

    def add_all(self, documents: Iterable[Encoded]) -> None:
        """Append documents, each with its side and its ids without the end-of-document token."""
        for side, document, ids in documents:
            self._add(side, document, ids)
        for side in self._waiting:
            self._write(side)

    def _write(self, side: str) -> None:
        """Write what waits: one write per file for many short documents."""
        for file, parts in zip(self._files.get(side, ()), self._waiting[side], strict=False):
            file.write(b"".join(parts))
            parts.clear()

    def _add(self, side: str, document: Document, ids: np.ndarray) -> None:
        listed = self._splits[side]
        if not listed["shards"] or listed["shards"][-1]["tokens"] >= self._shard_tokens:
            self._next_shard(side)
        shard, (tokens, borders, texts, lines) = listed["shards"][-1], self._waiting[side]
        text = document.text.encode("utf-8")
        tokens += (ids.astype(self._dtype).tobytes(), self._end)
        borders.append(struct.pack("<qq", shard["tokens"], len(text)))
        texts.append(text)
        lines.append(_metadata_line(document))
        language = document.language or UNKNOWN
        counted = self._measured.setdefault((side, language), {"documents": 0, "bytes": 0, "tokens": 0})
        for place in (shard, listed, counted):
            place["tokens"] += len(ids) + 1
            place["documents"] += 1
        listed["bytes"] += len(text)
        counted["bytes"] += len(text)
        for name, value in (("licences", document.licence), ("sources", document.source)):
            counts = self._counts[name]
            value = value or UNKNOWN
            counts[value if value in counts or len(counts) < NAMES_LIMIT else OTHERS] += 1

    def _next_shard(self, split: str) -> None:
        self._close(split)
        shards = self._splits[split]["shards"]
        stem = self._folder / f"{split}-{len(shards):05d}"
        shards.append({"file": stem.name, "tokens": 0, "documents": 0})
        stack = ExitStack()
        endings = (".tokens", ".documents", ".text", ".jsonl.gz")
        raw: list[Any] = [stack.enter_context(stem.with_suffix(ending).open("wb")) for ending in endings]
        # No name and no time in the header: the same corpus must have the same digest.
        lines = gzip.GzipFile(filename="", mode="wb", fileobj=raw.pop(), mtime=0, compresslevel=6)
        self._files[split] = [*raw, stack.enter_context(lines)]
        self._open[split] = stack

    def _close(self, split: str) -> None:
        if split in self._open:
            self._write(split)
            self._open.pop(split).close()

    def finish(self) -> dict[str, Any]:
        """Close the shards and write corpus.json; returns its contents."""
        for split in list(self._open):
            self._close(split)
        languages: dict[str, dict[str, dict[str, int]]] = {}
        for (side, language), measured in sorted(self._measured.items()):
            languages.setdefault(language, {})[side] = measured
        facts = {
            "format": 1,
            "vocab_size": self._vocab_size,
            "dtype": "uint16" if self._dtype.itemsize == 2 else "uint32",
            "end_of_document": self._end_of_document,
            "splits": self._splits,
            "languages": languages,
            **{name: dict(sorted(counts.items())) for name, counts in self._counts.items()},
        }
        write_json(self._folder / CORPUS_FILE, facts)
        return facts


def pack_documents(
    folder: Path, documents: Iterable[Sided], tokenizer: Tokenizer, packing: Packing
) -> dict[str, Any]:
    """Encode documents a few megabytes at a time and write them into a folder, as a stream.

    Returns:
        The contents of corpus.json.
    """
    writer = CorpusWriter(folder, tokenizer.vocab_size, tokenizer.end_of_document, packing.shard_tokens)
    with ThreadPoolExecutor(1) as ahead:  # the next batch is encoded while the last one is written
        waiting: Future[list[Encoded]] | None = None
        for batch in _batches(documents):
            encoding = ahead.submit(_encode, batch, tokenizer, packing)
            if waiting is not None:
                writer.add_all(waiting.result())
            waiting = encoding
        if waiting is not None:
            writer.add_all(waiting.result())
    tokenizer.save(folder)
    return writer.finish()


def _batches(documents: Iterable[Sided]) -> Iterator[list[Sided]]:
    batch: list[Sided] = []
    size = 0
    for side, document in documents:
        batch.append((side, document))
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[Sided], tokenizer: Tokenizer, packing: Packing) -> list[Encoded]:
    texts = [document.text for _, document in batch]
    if packing.fast:
        arrays = tokenizer.encode_batch_arrays(texts, packing.threads)
    else:
        arrays = tokenizer.encode_batch_slowly(texts)
    return [(side, document, ids) for (side, document), ids in zip(batch, arrays, strict=True)]


def write_corpus(
    folder: Path,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    validation_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write documents at hand, the tokenizer and corpus.json into a folder, divided by the hash of their text.

    The manifest is the caller's (`files.atomic_folder` writes it): a reader refuses a folder without one.

    Args:
        folder: an existing, empty folder.
        documents: the corpus.
        tokenizer: encodes them.
        validation_fraction: share of documents held out.
        shard_tokens: tokens of a shard.

    Returns:
        The contents of corpus.json.

    Raises:
        InputError: there are fewer than two different documents.
    """
    threshold = choose_threshold((document.text for document in documents), validation_fraction)
    sided = divide_by_hash(documents, threshold)
    return pack_documents(folder, sided, tokenizer, Packing(shard_tokens=shard_tokens))
