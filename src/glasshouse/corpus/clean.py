"""Cleaning a corpus: normalise, tell the language, drop what is no text, drop repeats, decontaminate, redact.

Two passes over the documents. The first judges each by itself, and writes what is left, with its hashes, to a work
folder, a *part*; then repeats are found from the hashes; the second reads the parts again and gives out what stays.
Any number of processes, and any split into parts (see `cluster`), give the same documents and the same report.

Memory does not grow with the text; it does with the number of documents, by about 70 bytes each while repeats are
sought. It knows nothing of tokens, nor of what a rule measures.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from glasshouse.corpus.deduplicate import EvaluationIndex, Shelf, find_repeats, open_column
from glasshouse.corpus.documents import Document, ReadCounts, ReadPolicy, read_documents
from glasshouse.corpus.personal_data import redact
from glasshouse.corpus.quality import CleanRules, check_rules, has_stage, list_rules
from glasshouse.corpus.screening import CHUNK_CHARACTERS, run_in_order, screen_documents, show
from glasshouse.corpus.waterfall import Tally, Waterfall, digest_document
from glasshouse.errors import InputError


def clean_documents(
    documents: Iterator[Document], rules: CleanRules, waterfall: Waterfall, work: Path, workers: int = 1
) -> Iterator[Document]:
    """Clean documents in one stream, in order, in memory that does not grow with the text.

    Args:
        documents: what to clean; read once.
        rules: which rules act.
        waterfall: filled as documents pass; complete when the last document has been taken.
        work: a folder for what has to be kept between passes, about the size of the text; emptied at the end.
        workers: processes; the result is the same for any number.

    Raises:
        InputError: a rule, threshold, language or evaluation set that does not exist.
    """
    check_rules(rules)
    waterfall.expect(list_rules(rules))
    part = work / "cleaning"
    shutil.rmtree(part, ignore_errors=True)
    try:
        for tally in screen_documents(documents, rules, part, waterfall.seed, workers):
            waterfall.add(tally)
        shelf = Shelf([part])
        mark_repeats(shelf, rules)
        count = size = 0
        for chunk, tally in release_documents(shelf, 0, rules, waterfall.seed, workers):
            waterfall.add(tally)
            for document in chunk:
                count, size = count + 1, size + len(document.text.encode())
                yield document
        report = waterfall.to_dict()
        if (count, size) != (report["documents_out"], report["bytes_out"]):
            raise RuntimeError(
                f"the waterfall does not add up: {count} documents left, it says {report['documents_out']}"
            )
    finally:
        shutil.rmtree(part, ignore_errors=True)


def mark_repeats(shelf: Shelf, rules: CleanRules) -> None:
    """Find exact and near repeats among what the first pass left, as the rules ask."""
    scheme = rules.near_duplicates if has_stage(rules, "near_duplicates") else "none"
    exact = has_stage(rules, "exact_duplicates")
    find_repeats(shelf, exact, scheme, rules.near_duplicate_ngram, rules.near_duplicate_similarity)


def release_documents(
    shelf: Shelf, part: int, rules: CleanRules, seed: int, workers: int = 1
) -> Iterator[tuple[list[Document], Tally]]:
    """The second pass over one part: drop repeats and overlaps, redact.

    Args:
        shelf: all parts, repeats marked.
        part: number of the part to go through.
        rules: which rules act.
        seed: of the choice of examples.
        workers: processes.

    Yields:
        The documents that stay and what was counted, chunk by chunk.
    """
    chunks = chunk_records(shelf, part, rules)
    if not (has_stage(rules, "evaluation_overlap") or has_stage(rules, "personal_data")):
        workers = 1  # handing records over and documents back would cost more than all there is to do
    yield from run_in_order(partial(release, rules=rules, seed=seed, shelf=shelf), chunks, workers)


@dataclass(frozen=True)
class Records:
    """Documents of one part as they were written, and which document each repeats exactly and nearly."""

    first: int
    lines: list[bytes]
    exact: np.ndarray
    near: np.ndarray


def chunk_records(shelf: Shelf, part: int, rules: CleanRules) -> Iterator[Records]:
    """The records of a part in chunks."""
    folder, first = shelf.folders[part], int(shelf.firsts[part])
    count = int(shelf.firsts[part + 1]) - first
    exact = open_column(folder / "exact-repeats", np.int64)
    near = open_column(folder / "near-repeats", np.int64) if has_stage(rules, "near_duplicates") else None
    with (folder / "documents").open("rb") as file:
        start = 0
        while start < count:
            lines = file.readlines(CHUNK_CHARACTERS)
            stop = start + len(lines)
            numbers = np.arange(first + start, first + stop)
            repeats = numbers if near is None else np.array(near[start:stop])
            yield Records(first + start, lines, np.array(exact[start:stop]), repeats)
            start = stop


@lru_cache(maxsize=2)
def open_index(paths: tuple[str, ...], ngram: int, ngram_characters: int) -> EvaluationIndex:
    """The n-grams of some evaluation files; built once per process."""
    documents = read_documents(paths, ReadPolicy(), ReadCounts())
    index = EvaluationIndex((document.text for document in documents), ngram, ngram_characters)
    if not index.hashes:
        raise InputError(
            "the evaluation sets have no text long enough to look for", ", ".join(paths), "check the files"
        )
    return index


def release(records: Records, rules: CleanRules, seed: int, shelf: Shelf) -> tuple[list[Document], Tally]:
    """The documents of a chunk that stay, and what was counted."""
    stages, tally, left = {stage for stage, _ in list_rules(rules)}, Tally(seed), []
    for offset, line in enumerate(records.lines):
        document = Document(*json.loads(line))
        repeated = Repeated(records.first + offset, int(records.exact[offset]), int(records.near[offset]))
        if drop_repeat(document, repeated, stages, rules, tally, shelf):
            left.append(document)
    if "evaluation_overlap" in stages:
        left = drop_overlaps(left, rules, tally)
    if "personal_data" in stages:
        left = [redact_document(document, rules, tally) for document in left]
    for document in left:
        tally.facts.setdefault("languages", Counter())[document.language or "unknown"] += 1
    return left, tally


@dataclass(frozen=True)
class Repeated:
    """The number of a document, and of the ones that it repeats (itself where it repeats none)."""

    number: int
    exact: int
    near: int


def drop_repeat(
    document: Document, repeated: Repeated, stages: set[str], rules: CleanRules, tally: Tally, shelf: Shelf
) -> bool:
    """Stages exact_duplicates and near_duplicates; whether the document stays."""
    size, digest = len(document.text.encode()), digest_document(document.id, document.text)
    for stage, original in (("exact_duplicates", repeated.exact), ("near_duplicates", repeated.near)):
        if stage not in stages:
            continue
        if original != repeated.number:
            # The original is only looked up for what can become an example: reading costs.
            kept = shelf.read(original)[0] if tally.wants(stage, document.id) else ""
            tally.drop(stage, size, document.id, f"repeats {kept}: {show(document.text, rules)}")
            return False
        tally.leave(stage, size, digest)
    return True


def drop_overlaps(documents: list[Document], rules: CleanRules, tally: Tally) -> list[Document]:
    """Stage evaluation_overlap."""
    index = open_index(rules.evaluation_sets, rules.evaluation_ngram, rules.evaluation_ngram_characters)
    left = []
    for document, overlap in zip(
        documents, index.find([document.text for document in documents]), strict=True
    ):
        size = len(document.text.encode())
        if overlap:
            tally.drop("evaluation_overlap", size, document.id, show(overlap, rules))
        else:
            tally.leave("evaluation_overlap", size, digest_document(document.id, document.text))
            left.append(document)
    return left


def redact_document(document: Document, rules: CleanRules, tally: Tally) -> Document:
    """Stage personal_data."""
    text, found = redact(document.text, rules.personal_data)
    if found:
        tally.facts.setdefault("personal_data", Counter()).update(found)
        added = len(text.encode()) - len(document.text.encode())
        tally.change("personal_data", added, document.id, text)
    tally.leave("personal_data", len(text.encode()), digest_document(document.id, text))
    return replace(document, text=text)
