"""What each stage of `glasshouse prepare` costs on some text: MB/s, processor seconds and peak memory of all processes.

    python benchmarks/preparing.py FILES... [--workers 4] [--profile gentle] [--near_duplicates verified]

The stages are those of `prepare` with its default settings, run one after the other; rates are per MB of text that was
read. Memory is the sum over all processes of what they do not share plus their part of what they do (PSS), looked at
five times a second; processor seconds count ended child processes too. Linux only.
"""

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import TypeVar

from glasshouse.corpus.clean import mark_repeats, release_documents
from glasshouse.corpus.deduplicate import Shelf
from glasshouse.corpus.documents import ReadCounts, ReadPolicy, read_documents
from glasshouse.corpus.quality import CleanRules
from glasshouse.corpus.screening import screen_documents
from glasshouse.text.prepare import choose_vocab_size, sample_texts
from glasshouse.text.shards import Packing, Spool, choose_threshold, divide_by_hash, pack_documents
from glasshouse.text.tokenizer import Tokenizer, train_tokenizer

Result = TypeVar("Result")


def processes(root: int) -> list[int]:
    """A process and all below it."""
    found = [root]
    for process in found:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def memory() -> int:
    """Bytes of memory of this process and those below it, shared pages counted once."""
    total = 0
    for process in processes(os.getpid()):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def measure(stage: str, work: Callable[[], Result], size: float) -> Result:
    """Run one stage and print a line about it."""
    ended, peak = threading.Event(), [memory()]

    def watch() -> None:
        while not ended.wait(0.2):
            peak[0] = max(peak[0], memory())

    def processor() -> float:
        used = [getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    watcher = threading.Thread(target=watch)
    started, before = time.perf_counter(), processor()
    watcher.start()
    try:
        result = work()
    finally:
        ended.set()
        watcher.join()
    wall, used = time.perf_counter() - started, processor() - before
    rates = f"{size / 1e6 / wall:8.2f} MB/s  {size / 1e6 / used:8.2f} MB per processor second"
    print(
        f"{stage:<18} {wall:8.2f} s  {used:8.2f} s of processor  {rates}  {peak[0] / 2**20:7.0f} MiB",
        flush=True,
    )
    return result


def prepare_by_stages(arguments: argparse.Namespace, work: Path) -> None:
    """The stages of `prepare`, each measured."""
    rules = CleanRules(profile=arguments.profile, near_duplicates=arguments.near_duplicates)
    counts = ReadCounts()
    measure("(start)", lambda: None, 0)
    for _ in read_documents(arguments.files, ReadPolicy(), counts):
        pass
    size = counts.bytes_kept
    print(f"{size / 1e6:.1f} MB of text in {counts.documents:,} documents")

    def read() -> None:
        for _ in read_documents(arguments.files, ReadPolicy(), ReadCounts()):
            pass

    def screen() -> None:
        documents = read_documents(arguments.files, ReadPolicy(), ReadCounts())
        for _ in screen_documents(documents, rules, work / "part", 0, arguments.workers):
            pass

    measure("read", read, size)
    measure("read and screen", screen, size)
    shelf = Shelf([work / "part"])
    measure("find repeats", lambda: mark_repeats(shelf, rules), size)
    spool = Spool(work / "spool")
    released = (documents for documents, _ in release_documents(shelf, 0, rules, 0, arguments.workers))
    measure("release", lambda: spool.fill(chain.from_iterable(released)), size)
    threshold = measure("divide", lambda: choose_threshold((one.text for one in spool), 0.05), size)
    print(f"{spool.bytes / 1e6:.1f} MB left in {spool.documents:,} documents")

    def train() -> Tokenizer:
        share = min(1.0, arguments.sample / spool.cost)
        texts = sample_texts(divide_by_hash(spool, threshold), share, arguments.sample, 0)
        return train_tokenizer(texts, choose_vocab_size(spool.bytes), exact=False)

    tokenizer = measure("train tokenizer", train, size)
    measure("prove encoder", lambda: tokenizer.fast, size)
    packing, corpus = Packing(threads=arguments.workers), work / "corpus"
    corpus.mkdir()
    sided = divide_by_hash(spool, threshold)
    measure("encode and pack", lambda: pack_documents(corpus, sided, tokenizer, packing), size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--profile", default="gentle")
    parser.add_argument("--near_duplicates", default="verified")
    parser.add_argument("--sample", type=int, default=64 * 2**20)
    parser.add_argument("--work", type=Path, default=None)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        prepare_by_stages(arguments, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
