"""Tokenizer training, encoding and packing, side by side with the libraries that others use directly.

    python benchmarks/tokenizing.py FILES... [--megabytes 8] [--rounds 5] [--vocab_size 16000] [--cores 0 1]

Every candidate works on the same text in turn, round after round; what is printed is MB/s of UTF-8 text (median, min,
max) and the ratio to the other candidates round by round (median, min, max). Only ratios of one table mean anything.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tiktoken
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from glasshouse.corpus.documents import Document, ReadCounts, ReadPolicy, read_documents
from glasshouse.text.byte_pair import bytes_of
from glasshouse.text.packing import TRAIN
from glasshouse.text.shards import Packing, pack_documents
from glasshouse.text.tokenizer import SPLIT_PATTERN, Tokenizer, train_tokenizer

Candidates = dict[str, Callable[[], object]]


def load(paths: list[str], megabytes: float) -> list[Document]:
    """Documents of some files until there are enough."""
    documents, size = [], 0
    for document in read_documents(paths, ReadPolicy(), ReadCounts()):
        documents.append(document)
        size += len(document.text.encode())
        if size >= megabytes * 1e6:
            break
    return documents


def compare(title: str, candidates: Candidates, size: int, rounds: int) -> None:
    """Run the candidates in turn and print a table; the first is ours."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, work in candidates.items():
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    ours = next(iter(candidates))
    print(f"\n{title}: {size / 1e6:.1f} MB, {rounds} rounds")
    for name, taken in seconds.items():
        rates = [size / 1e6 / one for one in taken]
        ratios = [other / mine for mine, other in zip(seconds[ours], taken, strict=True)]
        print(
            f"  {name:<44} {statistics.median(rates):6.1f} MB/s [{min(rates):.1f}, {max(rates):.1f}]"
            f"   ours is {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] times as fast"
        )


def train_directly(texts: list[str], vocab_size: int, pattern: str = "") -> Backend:
    """The library's own trainer, with GPT-2's split, which is its own for byte-level BPE, or with another pattern."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        mapped = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, mapped])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer, length=len(texts))
    return backend


def encoders(documents: list[Document], tokenizer: Tokenizer, threads: int, folder: Path) -> Candidates:
    """Our encoding, with and without packing, and the two libraries'."""
    texts = [document.text for document in documents]
    saved = folder / "tokenizer"
    saved.mkdir(exist_ok=True)
    tokenizer.save(saved)
    library = Backend.from_file(str(saved / "tokenizer.json"))
    ids = [bytes_of(library.id_to_token(number) or "") for number in range(tokenizer.end_of_document)]
    other = tiktoken.Encoding(
        "same",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks={token: number for number, token in enumerate(ids)},
        special_tokens={},
    )
    assert [one.tolist() for one in tokenizer.encode_batch_arrays(texts[:50])] == [
        one.ids for one in library.encode_batch_fast(texts[:50], add_special_tokens=False)
    ]

    def pack() -> object:
        with tempfile.TemporaryDirectory(dir=folder) as corpus:
            sided = ((TRAIN, document) for document in documents)
            return pack_documents(Path(corpus), sided, tokenizer, Packing(threads=threads))

    return {
        "glasshouse, encode and pack to disk": pack,
        "glasshouse, encode only": lambda: tokenizer.encode_batch_arrays(texts, threads),
        "tiktoken encode_ordinary_batch (lists)": lambda: other.encode_ordinary_batch(
            texts, num_threads=threads
        ),
        "tokenizers encode_batch_fast": lambda: library.encode_batch_fast(texts, add_special_tokens=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+")
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab_size", type=int, default=16_000)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    arguments = parser.parse_args()
    os.sched_setaffinity(0, arguments.cores)
    os.environ["RAYON_NUM_THREADS"] = str(len(arguments.cores))  # read when the library first needs threads
    everything = {path: load([path], arguments.megabytes) for path in arguments.files}
    texts = [document.text for documents in everything.values() for document in documents]
    size = sum(len(text.encode()) for text in texts)
    candidates: Candidates = {
        "glasshouse train_tokenizer": lambda: train_tokenizer(iter(texts), arguments.vocab_size),
        "tokenizers BpeTrainer, same split": lambda: train_directly(
            texts, arguments.vocab_size, SPLIT_PATTERN
        ),
        "tokenizers BpeTrainer, GPT-2's split": lambda: train_directly(texts, arguments.vocab_size),
    }
    compare(f"training {arguments.vocab_size:,} tokens", candidates, size, arguments.rounds)
    tokenizer = train_tokenizer(iter(texts), arguments.vocab_size)
    assert tokenizer.fast is not None, "the fast encoder is not sure of these merges"
    with tempfile.TemporaryDirectory() as folder:
        for path, documents in everything.items():
            size = sum(len(document.text.encode()) for document in documents)
            candidates = encoders(documents, tokenizer, len(arguments.cores), Path(folder))
            compare(f"encoding {Path(path).name}", candidates, size, arguments.rounds)


if __name__ == "__main__":
    main()
