"""The stage that turns raw text into a corpus: read, clean, train the tokenizer, encode, pack.

Text streams from step to step through files beside the run, so memory does not grow with it. The corpus is a pure
function of the input and the config. Knows the order of the steps, not how any of them works.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from glasshouse.corpus.clean import clean_documents
from glasshouse.corpus.cluster import Cleaning, ClusterConfig, clean_on_cluster, collect_counts
from glasshouse.corpus.documents import Document, ReadCounts, ReadPolicy, estimate_bytes, read_documents
from glasshouse.corpus.personal_data import KINDS, Kind
from glasshouse.corpus.quality import CleanRules
from glasshouse.corpus.waterfall import Waterfall
from glasshouse.errors import InputError
from glasshouse.files import atomic_folder, recover_folder, require_free, write_error, write_json
from glasshouse.run import Run
from glasshouse.text.packing import TRAIN, VALIDATION
from glasshouse.text.shards import (
    SHARD_TOKENS,
    Packing,
    Sided,
    Spool,
    choose_threshold,
    divide_at_end,
    divide_by_hash,
    pack_documents,
)  # fmt: skip
from glasshouse.text.tokenizer import (
    SMALLEST_VOCABULARY,
    Tokenizer,
    open_tokenizer,
    train_tokenizer,
    training_cost,
)

LEAST_BYTES = 2000
LEAST_DOCUMENTS = 20
CHECKED_CHARACTERS = 2**19
LARGEST_CHOSEN_VOCABULARY = 65_536
PLAIN_EVERY = 10.0
DISK_FACTOR = 2.5  # what is kept between passes, and then the corpus, beside the text
WORK, SPOOL = ".work", "cleaned.jsonl"


@dataclass(frozen=True)
class PrepareConfig:
    """Settings of `glasshouse prepare`.

    Args:
        documents: files, folders and globs of txt, md, html, jsonl, json, csv, tsv, parquet; also .gz, .xz, .zst.
        vocab_size: tokens of the vocabulary; 0 chooses by the amount of text.
        tokenizer: folder of a tokenizer to use instead of training one.
        tokenizer_sample: most bytes of text that the tokenizer is trained on, drawn at random; of text without spaces
            (Chinese, Thai), which takes the trainer far more memory, a sixth of that.
        validation_fraction: share of the text held out.
        validation_from: hold out whole "documents", chosen by the hash of their text; or the last part of the text in
            reading order ("end"); "auto" takes the end only where there are fewer than 20 documents.
        language: language of documents that do not state theirs; empty to identify it.
        languages: keep only these languages (two-letter codes); empty keeps all.
        profile: quality rules: "gentle" drops what is no text, "web" what the published rules for crawled pages drop.
        skip: names of cleaning rules to switch off.
        thresholds: other limits for cleaning rules, by name.
        near_duplicates: how documents that are nearly equal are found, or "none".
        personal_data: kinds of personal data to replace by placeholders: email, phone, ip, card, ...; or "all".
        evaluation_sets: files whose texts must not be trained on.
        repeat: how often documents stand in the training side, by a pattern of their ids like "primer_*": a way to give
            some sources more weight. What is held out is never repeated.
        text_field: field or column that holds the text of tables and JSON; empty looks for the usual names.
        text_unit: what one document of a plain text file is: "file", "line" or "paragraph".
        encoding: character encoding of the files; empty to find it out.
        shard_tokens: tokens of one file of the corpus.
        workers: processes and threads; 0 is one per core. The result is the same for any number.
        seed: of what is drawn at random.
        executor: "own", or clean by datatrove's tasks: here ("local") or on many machines ("slurm", "ray"). Each entry
            of `documents` is a part then: give many, without names in common. The run must lie where every machine
            sees it. The corpus is the same.
        tasks: datatrove's tasks.
        partition: Slurm's partition.
        environment: command that prepares a Slurm task, for instance "source .venv/bin/activate".
    """

    documents: tuple[str, ...]
    vocab_size: int = 0
    tokenizer: Path | None = None
    tokenizer_sample: int = 64 * 2**20
    validation_fraction: float = 0.05
    validation_from: Literal["auto", "documents", "end"] = "auto"
    language: str = ""
    languages: tuple[str, ...] = ()
    profile: Literal["gentle", "web", "none"] = "gentle"
    skip: tuple[str, ...] = ()
    thresholds: dict[str, float] = field(default_factory=dict)
    near_duplicates: Literal["verified", "published", "none"] = "verified"
    personal_data: tuple[str, ...] = ()
    evaluation_sets: tuple[str, ...] = ()
    repeat: dict[str, int] = field(default_factory=dict)
    text_field: str = ""
    text_unit: Literal["auto", "file", "line", "paragraph"] = "auto"
    encoding: str = ""
    shard_tokens: int = SHARD_TOKENS
    workers: int = 0
    seed: int = 0
    executor: Literal["own", "local", "slurm", "ray"] = "own"
    tasks: int = 1
    partition: str = ""
    environment: str = ""


def prepare(config: PrepareConfig, run: Run) -> None:
    """Turn raw text into `run`'s corpus folder.

    Raises:
        InputError: nothing can be read, too little text is left, or the vocabulary is larger than the text supports.
    """
    started = time.perf_counter()
    _check(config)
    require_free(run.path, int(DISK_FACTOR * estimate_bytes(config.documents, _policy(config))))
    with run.lock(), Progress() as progress:
        recover_folder(run.corpus_path)
        with _work_folder(run) as work:
            spool, cleaning = _clean(config, work, progress)
            facts, report = _pack(config, spool, run.corpus_path, cleaning, progress)
        sides = facts["splits"]
        run.finish(
            documents={name: side["documents"] for name, side in sides.items()},
            tokens={name: side["tokens"] for name, side in sides.items()},
            bytes={name: side["bytes"] for name, side in sides.items()},
            vocab_size=facts["vocab_size"],
            seed=config.seed,
            seconds=time.perf_counter() - started,
        )
        progress.say(_summary(facts, report, time.perf_counter() - started))


@contextmanager
def _work_folder(run: Run) -> Iterator[Path]:
    """A folder for what has to be kept between passes; cleared also of what a killed process left."""
    work = run.path / WORK
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        yield work
    except OSError as error:
        raise write_error(error, run.path) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check(config: PrepareConfig) -> None:
    if not 0 < config.validation_fraction < 1:
        raise InputError(
            f"{config.validation_fraction} is no share",
            "--validation_fraction",
            "give a number between 0 and 1",
        )
    if config.vocab_size and config.vocab_size <= SMALLEST_VOCABULARY:
        raise InputError(
            f"vocab_size {config.vocab_size} leaves no room beside {SMALLEST_VOCABULARY} bytes and special tokens",
            "--vocab_size",
            "give a larger one, or 0 to have it chosen",
        )
    if config.vocab_size and config.tokenizer:
        raise InputError("both a tokenizer and a vocabulary size", "--tokenizer", "give one of the two")
    if min([1, *config.repeat.values()]) < 1:
        raise InputError("a document cannot stand less than once", "--repeat", "give whole numbers above 0")
    if min(config.shard_tokens, config.tokenizer_sample, config.tasks) < 1 or config.workers < 0:
        raise InputError(
            "shard_tokens, tokenizer_sample, tasks and workers count something", "", "give positive numbers"
        )


def _workers(config: PrepareConfig) -> int:
    return config.workers or len(os.sched_getaffinity(0))


class Progress:
    """What a person sees: one live line at a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._status = self.console.status("reading") if self.console.is_terminal else None
        self._every = 0.2 if self.console.is_terminal else PLAIN_EVERY

    def __enter__(self) -> "Progress":
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, soft_wrap=True, markup=False)

    def watch(self, documents: Iterable[Document], verb: str) -> Iterator[Document]:
        """Pass documents on, showing how many and how fast."""
        started = shown = 0.0
        number = size = 0
        for document in documents:
            started = (
                started or time.perf_counter()
            )  # what came before the first document was another step's work
            yield document
            number, size, now = number + 1, size + len(document.text), time.perf_counter()
            shown = shown or now
            if now - shown < self._every:
                continue
            shown, rate = now, size / (now - started) / 1e6
            line = f"{verb}: {number:,} documents, {size / 1e6:,.1f} M characters, {rate:.1f} M/s"
            if self._status:
                self._status.update(line)
            else:
                self.say(line)

    def watch_sides(self, documents: Iterable[Sided], verb: str) -> Iterator[Sided]:
        """The same for documents that have been given a side."""
        sides: list[str] = []

        def texts() -> Iterator[Document]:
            for side, document in documents:
                sides.append(side)
                yield document

        for document in self.watch(texts(), verb):
            yield sides.pop(), document


# ------------------------------------------------------------------------------------------------- read and clean


def _kinds(names: tuple[str, ...]) -> tuple[Kind, ...]:
    """The kinds of personal data that were asked for."""
    if "all" in names:
        return KINDS
    if strange := [name for name in names if name not in KINDS]:
        known = ", ".join(KINDS)
        raise InputError(
            f"no kind of personal data {strange[0]!r}", "--personal_data", f"use all, or some of {known}"
        )
    return tuple(kind for kind in KINDS if kind in names)


def _policy(config: PrepareConfig) -> ReadPolicy:
    return ReadPolicy(text_field=config.text_field, text_unit=config.text_unit, encoding=config.encoding)


def _clean(config: PrepareConfig, work: Path, progress: Progress) -> tuple[Spool, dict[str, Any]]:
    rules = CleanRules(
        profile=config.profile,
        skip=config.skip,
        thresholds=config.thresholds,
        languages=config.languages,
        near_duplicates=config.near_duplicates,
        personal_data=_kinds(config.personal_data),
        evaluation_sets=config.evaluation_sets,
    )
    policy, waterfall, spool = _policy(config), Waterfall(config.seed), Spool(work / SPOOL)
    if config.executor == "own":
        counts = ReadCounts()
        documents = read_documents(config.documents, policy, counts)
        if config.language:
            documents = (replace(one, language=one.language or config.language) for one in documents)
        watched = progress.watch(documents, "reading")
        cleaned = clean_documents(watched, rules, waterfall, work, _workers(config))
        spool.fill(progress.watch(cleaned, "cleaning"))
        read = counts.as_report()
    else:
        cleaning = Cleaning(config.documents, rules, policy, str(work), config.seed, config.language)
        cluster = ClusterConfig(
            executor=config.executor,
            tasks=config.tasks,
            workers=_workers(config) if config.executor == "local" else config.workers or -1,
            partition=config.partition,
            environment=config.environment,
        )
        cleaned = clean_on_cluster(cleaning, cluster, waterfall)
        spool.fill(progress.watch(cleaned, "collecting"))
        read = collect_counts(cleaning)
    _check_size(config, read["bytes_kept"], spool)
    return spool, {"read": read, **waterfall.to_dict()}


def _check_size(config: PrepareConfig, kept: int, spool: Spool) -> None:
    if spool.bytes < LEAST_BYTES:
        raise InputError(
            f"too little text: {kept:,} bytes read, {spool.bytes:,} left after cleaning, "
            f"{LEAST_BYTES:,} needed",
            ", ".join(config.documents),
            "give more text" if kept < LEAST_BYTES else "switch cleaning rules off: --profile none",
        )


# ----------------------------------------------------------------------------------------------- divide, tokenize


@dataclass(frozen=True)
class Division:
    """How documents are put on two sides.

    Args:
        by: "documents" or "end".
        value: the hash threshold, or the share of the text held out.
    """

    by: str
    value: float

    def sides(self, spool: Spool) -> Iterator[Sided]:
        """Every document with its side."""
        if self.by == "end":
            return divide_at_end(spool, spool.bytes, self.value)
        return divide_by_hash(spool, self.value)


def _divide(config: PrepareConfig, spool: Spool) -> Division:
    by = config.validation_from
    if by == "auto":
        by = "end" if spool.documents < LEAST_DOCUMENTS else "documents"
    if by == "end":
        return Division(by, config.validation_fraction)
    return Division(by, choose_threshold((one.text for one in spool), config.validation_fraction))


def choose_vocab_size(size: int) -> int:
    """A vocabulary for `size` bytes of text: the power of two nearest to twice their square root, at most 65,536.

    A rule of thumb: most tokens occur often enough to be learned, and ids fit in 16 bits.
    """
    nearest = 2 ** round(float(np.log2(2 * max(size, 1) ** 0.5)))
    return int(min(max(nearest, 512), LARGEST_CHOSEN_VOCABULARY))


def sample_texts(documents: Iterable[Sided], share: float, limit: int, seed: int) -> Iterator[str]:
    """Training texts, each drawn with probability `share`, until they cost `limit` (see `training_cost`)."""
    taken = 0
    for side, document in documents:
        drawn = hashlib.sha256(f"{seed}\0{document.id}".encode("utf-8", "replace")).digest()
        if side == TRAIN and int.from_bytes(drawn[:6], "big") < share * 2**48:
            yield document.text
            taken += training_cost(document.text)
            if taken >= limit:
                return


def _make_tokenizer(config: PrepareConfig, spool: Spool, division: Division, progress: Progress) -> Tokenizer:
    if config.tokenizer:
        return open_tokenizer(config.tokenizer)
    limit = config.tokenizer_sample
    share = min(1.0, limit / spool.cost)
    wanted = config.vocab_size or choose_vocab_size(spool.bytes)
    progress.say(f"training the tokenizer: {wanted:,} tokens")
    texts = sample_texts(division.sides(spool), share, limit, config.seed)
    tokenizer = train_tokenizer(texts, wanted, exact=config.vocab_size > 0)
    if tokenizer.vocab_size == wanted:
        return tokenizer
    rounded = tokenizer.vocab_size // 64 * 64  # a vocabulary that fills the processor's registers
    if rounded <= SMALLEST_VOCABULARY:
        return tokenizer
    return train_tokenizer(sample_texts(division.sides(spool), share, limit, config.seed), rounded)


def _check_encoder(tokenizer: Tokenizer, spool: Spool, progress: Progress) -> str:
    """How to encode: "tiktoken" where it gives what tokenizer.json gives on the first megabytes, else "tokenizers"."""
    if tokenizer.fast is None:
        return "tokenizers"
    texts, size = [], 0
    for document in spool:
        texts.append(document.text[:CHECKED_CHARACTERS])
        size += len(texts[-1])
        if size >= CHECKED_CHARACTERS:
            break
    fast, slow = tokenizer.encode_batch_arrays(texts), tokenizer.encode_batch_slowly(texts)
    if all(np.array_equal(left, right) for left, right in zip(fast, slow, strict=True)):
        return "tiktoken"
    progress.say("the fast encoder differs from tokenizer.json on this text: encoding slowly")
    return "tokenizers"


# ------------------------------------------------------------------------------------------------------ the corpus


def _pack(
    config: PrepareConfig, spool: Spool, folder: Path, cleaning: dict[str, Any], progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    division = _divide(config, spool)
    tokenizer = _make_tokenizer(config, spool, division, progress)
    encoder = _check_encoder(tokenizer, spool, progress)
    packing = Packing(config.shard_tokens, _workers(config), encoder == "tiktoken")
    with atomic_folder(folder) as temporary:
        repeated = _repeat(division, spool, config.repeat)
        watched = progress.watch_sides(repeated, "encoding")
        facts = pack_documents(temporary, watched, tokenizer, packing)
        if not facts["splits"][TRAIN]["documents"] or not facts["splits"][VALIDATION]["documents"]:
            raise InputError(
                "one side of the split is empty", "--validation_fraction", "give more text or another share"
            )
        report = tokenizer_report(facts, encoder, asdict(division))
        write_json(temporary / "waterfall.json", cleaning)
        write_json(temporary / "tokenizer_report.json", report)
    return facts, report


def _repeat(division: Division, spool: Spool, repeat: dict[str, int]) -> Iterator[Sided]:
    """Every document with its side; then again those of the training side that stand there more than once."""
    for number in range(max([1, *repeat.values()])):
        for side, document in division.sides(spool):
            times = [count for pattern, count in repeat.items() if fnmatch(document.id, pattern)]
            if number == 0 or (side == TRAIN and number < max(times, default=1)):
                yield side, document


def tokenizer_report(facts: dict[str, Any], encoder: str, division: dict[str, Any]) -> dict[str, Any]:
    """UTF-8 bytes per token, of each language and side; on the held-out side the tokenizer never saw the text.

    Args:
        facts: contents of corpus.json.
        encoder: what encoded the text.
        division: how it was divided.
    """
    languages = {
        language: {
            side: measured | {"bytes_per_token": bytes_per_token(measured)}
            for side, measured in sides.items()
        }
        for language, sides in facts["languages"].items()
    }
    overall = {side: bytes_per_token(listed) for side, listed in facts["splits"].items()}
    return {
        "format": 1,
        "vocab_size": facts["vocab_size"],
        "encoder": encoder,
        "division": division,
        "bytes_per_token": overall,
        "languages": languages,
    }


def bytes_per_token(measured: dict[str, Any]) -> float:
    """UTF-8 bytes per token of text; the tokens that end documents are not text."""
    return measured["bytes"] / max(1, measured["tokens"] - measured["documents"])


def _summary(facts: dict[str, Any], report: dict[str, Any], seconds: float) -> str:
    train, held_out = facts["splits"][TRAIN], facts["splits"][VALIDATION]
    return (
        f"{train['tokens']:,} training tokens in {train['documents']:,} documents, {held_out['tokens']:,} held out; "
        f"vocabulary {facts['vocab_size']:,}, {report['bytes_per_token'][VALIDATION]:.2f} bytes per token; "
        f"{seconds:.1f} s, {(train['bytes'] + held_out['bytes']) / 1e6 / seconds:.1f} MB/s"
    )
