"""The first pass over a corpus: each document is judged by itself, and what is left is written with its hashes.

Work is done in chunks of documents, by any number of processes, and taken in order. It knows nothing of how repeats
are found among the hashes, nor of what happens to them.
"""

import json
import multiprocessing
import re
import shutil
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from glasshouse.corpus.deduplicate import SCHEMES, bucket_keys, exact_key, read_units
from glasshouse.corpus.documents import Document
from glasshouse.corpus.language import identify_language, normalise_code
from glasshouse.corpus.personal_data import redact
from glasshouse.corpus.quality import CleanRules, has_stage, judge, list_rules, quality_rules
from glasshouse.corpus.waterfall import Tally, digest_document

CHUNK_CHARACTERS, CHUNK_DOCUMENTS = 2**17, 1024  # what is worked on at once
SURE_LETTERS = 60  # a shorter text is never dropped for its language: the guess is too uncertain
LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
UNWANTED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")
TRAILING, BLANK_LINES = re.compile("[ \t\u3000]+\n"), re.compile("\n{4,}")
# What neither a plain space, line break nor tab is, and below U+00A0, and the few others: found in one look.
ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Results of a function over items, in order, from some processes; no more than two items per process wait."""
    if workers <= 1:
        yield from map(function, items)
        return
    # Not forked: a fork of a process with threads (torch has some) can hang.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def normalise(text: str, unicode_form: str = "NFC", white_space: bool = True) -> str:
    """Mend line ends and white space at line ends, remove control characters and byte order marks, limit blank lines.

    Args:
        text: any text.
        unicode_form: "NFC" or "none".
        white_space: False changes only the Unicode form.
    """
    if unicode_form == "NFC":
        text = unicodedata.normalize("NFC", text)
    if not white_space:
        return text
    if ODD.search(text):
        text = UNWANTED.sub("", LINE_ENDS.sub("\n", text))
    if " \n" in text or "\t\n" in text or "\u3000\n" in text:
        text = TRAILING.sub("\n", text)
    if "\n\n\n\n" in text:
        text = BLANK_LINES.sub("\n\n\n", text)
    return text.strip("\n").rstrip()


@dataclass(frozen=True)
class Screened:
    """What the first pass made of a chunk: one JSON line per document left, its hashes, and what was counted."""

    lines: list[bytes]
    exact: bytes
    keys: np.ndarray
    has: np.ndarray
    tally: Tally


def screen_documents(
    documents: Iterable[Document], rules: CleanRules, part: Path, seed: int, workers: int = 1
) -> Iterator[Tally]:
    """The first pass: judge each document by itself and write what is left to the folder `part`.

    Args:
        documents: read once.
        rules: which rules act.
        part: the folder to make; what an earlier attempt left there is removed.
        seed: of the choice of examples.
        workers: processes.

    Yields:
        What was counted, chunk by chunk.
    """
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    names = ["documents", "offsets", "exact", "has"]
    buckets = SCHEMES[rules.near_duplicates][0] if has_stage(rules, "near_duplicates") else 0
    names += [f"bucket-{bucket:02d}" for bucket in range(buckets)]
    with ExitStack() as stack:
        files = {name: stack.enter_context((part / name).open("wb")) for name in names}
        end = 0
        for screened in run_in_order(
            partial(screen, rules=rules, seed=seed), chunk_documents(documents), workers
        ):
            files["documents"].writelines(screened.lines)
            ends = end + np.cumsum([len(line) for line in screened.lines], dtype=np.int64)
            end = int(ends[-1]) if len(ends) else end
            files["offsets"].write(ends.tobytes())
            files["exact"].write(screened.exact)
            files["has"].write(screened.has.tobytes())
            for bucket in range(buckets):
                files[f"bucket-{bucket:02d}"].write(screened.keys[bucket].tobytes())
            yield screened.tally


def chunk_documents(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about half a million characters."""
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS or len(chunk) >= CHUNK_DOCUMENTS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def screen(chunk: list[Document], rules: CleanRules, seed: int) -> Screened:
    """Judge the documents of a chunk one by one, and hash those that are left."""
    screening = Screening(rules, seed)
    left = [kept for document in chunk if (kept := screening.run(document)) is not None]
    texts = [document.text for document in left]
    exact = b"".join(map(exact_key, texts)) if "exact_duplicates" in screening.stages else b""
    keys, has = np.empty((0, len(texts)), np.uint64), np.zeros(len(texts), bool)
    if "near_duplicates" in screening.stages:
        minimum = rules.near_duplicate_minimum
        keys, has = bucket_keys(read_units(texts), rules.near_duplicates, rules.near_duplicate_ngram, minimum)
    records = ([d.id, d.text, d.source, d.licence, d.language, d.metadata] for d in left)
    lines = [
        json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
        for record in records
    ]
    return Screened(lines, exact, keys, has, screening.tally)


@dataclass
class Draft:
    """A document on its way: its id, text, language, bytes and SHA-256."""

    id: str
    text: str
    language: str
    size: int
    digest: bytes


class Screening:
    """The rules that judge a document by itself, and what they counted.

    Args:
        rules: which rules act.
        seed: of the choice of examples.
    """

    def __init__(self, rules: CleanRules, seed: int):
        self.rules, self.tally = rules, Tally(seed)
        self.stages = {stage for stage, _ in list_rules(rules)}
        self.quality = quality_rules(rules)

    def run(self, document: Document) -> Document | None:
        """One document through normalise, language and quality; None if a rule dropped it."""
        size = len(document.text.encode("utf-8", "replace"))
        self.tally.enter(size)
        draft = Draft(document.id, document.text, normalise_code(document.language), size, b"")
        self.normalise(draft)
        if self.tell_language(draft) and self.judge(draft):
            return replace(document, text=draft.text, language=draft.language)
        return None

    def normalise(self, draft: Draft) -> None:
        """Stage normalise."""
        if "normalise" in self.stages:
            text = normalise(draft.text, self.rules.unicode_form, self.rules.normalise)
            if text != draft.text:
                added = len(text.encode("utf-8", "replace")) - draft.size
                self.tally.change("normalise", added, draft.id, show(text, self.rules))
                draft.text, draft.size = text, draft.size + added
        draft.digest = digest_document(draft.id, draft.text)
        if "normalise" in self.stages:
            self.tally.leave("normalise", draft.size, draft.digest)

    def tell_language(self, draft: Draft) -> bool:
        """Stage language; whether the document stays. A language that was only guessed from little text keeps it."""
        stated = draft.language
        if not stated and self.rules.identify_language:
            draft.language = identify_language(draft.text)
        source = "stated" if stated else "identified" if draft.language else "unknown"
        self.tally.facts.setdefault("language_known_by", Counter())[source] += 1
        if "language" not in self.stages:
            return True
        sure = stated or sum(map(str.isalpha, draft.text[:1000])) >= SURE_LETTERS
        if draft.language and sure and draft.language not in self.rules.languages:
            example = f"{draft.language}: {show(draft.text, self.rules)}"
            self.tally.drop("language", draft.size, draft.id, example)
            return False
        self.tally.leave("language", draft.size, draft.digest)
        return True

    def judge(self, draft: Draft) -> bool:
        """Stage quality; whether the document stays."""
        if "quality" not in self.stages:
            return True
        judgement = judge(draft.text, draft.language, self.quality)
        for name, added, example in judgement.changes:
            self.tally.change(name, added, draft.id, show(example, self.rules))
            draft.size += added
        if judgement.dropped_by:
            example = f"{judgement.why}: {show(judgement.text, self.rules)}"
            self.tally.drop(judgement.dropped_by, draft.size, draft.id, example)
            return False
        if judgement.text != draft.text:
            draft.text, draft.digest = judgement.text, digest_document(draft.id, judgement.text)
        self.tally.leave("quality", draft.size, draft.digest)
        return True


def show(text: str, rules: CleanRules) -> str:
    """The beginning of a text, for the report, without the personal data that the rules replace."""
    beginning = text[:400]
    return redact(beginning, rules.personal_data)[0] if rules.personal_data else beginning
