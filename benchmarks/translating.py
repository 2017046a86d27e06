"""A translation model on a test set: its scores beside a dictionary's, and its speed beside transformers' on the same weights.

    python benchmarks/translating.py MODEL --train TRAIN... --test SOURCES REFERENCES [--lines 200] [--rounds 3] [--cores 0 1]

Scores: sacrebleu's own on all test lines, with 95 % intervals, and the overlap of the test set with the training pairs.
Speed: the same lines with four beams in both, in turn, round after round; transformers' `generate` is given batches of as
many lines, once in the order of the file and once sorted by length, as ours are. Printed are ratios (median, min, max) and how many texts are the same.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSeq2SeqLM
from transformers.utils import logging

from glasshouse.artifact import Artifact, open_artifact
from glasshouse.inference.generate import TranslationConfig, translate_texts
from glasshouse.tasks.translation import TRANSLATION, count_overlap
from glasshouse.text.pairs import encode_sources, pad_rows

BEAMS, ROWS, LONGEST = 4, 64, 200


def print_scores(artifact: Artifact, train: list[Path], test: list[Path], config: TranslationConfig) -> None:
    examples, learned = TRANSLATION.read(test), TRANSLATION.read(train)
    sources = [TRANSLATION.prompt(example) for example in examples]
    shared, whole = count_overlap(learned, examples)
    print(
        f"{len(examples):,} test pairs; {shared} sources and {whole} whole pairs occur in {len(learned):,} training pairs"
    )
    for name, answers in (
        ("this model", translate_texts(artifact, sources, config)),
        ("dictionary, word by word", TRANSLATION.baseline(learned, sources)),
    ):
        print(f"  {name:<26}", "; ".join(map(str, TRANSLATION.score(answers, examples))))


def their_answers(model, artifact: Artifact, texts: list[str], penalty: float, by_length: bool) -> list[str]:
    """What transformers' beam search makes of the texts."""
    sources = encode_sources(artifact.tokenizer, texts)
    order = (
        sorted(range(len(texts)), key=lambda row: len(sources[row])) if by_length else list(range(len(texts)))
    )
    answers = [""] * len(texts)
    for start in range(0, len(order), ROWS):
        chosen = order[start : start + ROWS]
        padded = torch.from_numpy(pad_rows([sources[row] for row in chosen], artifact.tokenizer.pad))
        made = model.generate(
            input_ids=padded, attention_mask=(padded != artifact.tokenizer.pad).long(), num_beams=BEAMS,
            length_penalty=penalty, early_stopping=False, max_new_tokens=LONGEST,
        )  # fmt: skip
        for row, ids in zip(chosen, made.tolist(), strict=True):
            answers[row] = artifact.tokenizer.decode(ids).strip()
    return answers


def compare(candidates: dict[str, Callable[[], list[str]]], rounds: int) -> None:
    """Run the candidates in turn; the first is ours."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    answers: dict[str, list[str]] = {}
    for _ in range(rounds):
        for name, work in candidates.items():
            started = time.perf_counter()
            answers[name] = work()
            seconds[name].append(time.perf_counter() - started)
    ours = next(iter(candidates))
    for name, taken in seconds.items():
        ratios = [other / mine for mine, other in zip(seconds[ours], taken, strict=True)]
        same = statistics.mean(a == b for a, b in zip(answers[ours], answers[name], strict=True))
        print(
            f"  {name:<44} ours is {statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}] times as fast; "
            f"{same:.1%} of the texts are ours"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--test", type=Path, nargs=2, required=True)
    parser.add_argument("--length_penalty", type=float, default=1.0)
    parser.add_argument("--lines", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--speed_only", action="store_true")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, arguments.cores)
    torch.set_num_threads(len(arguments.cores))
    logging.set_verbosity_error()
    dtype = getattr(torch, arguments.dtype)
    artifact = open_artifact(arguments.model, dtype=dtype)
    config = TranslationConfig(BEAMS, arguments.length_penalty, LONGEST, ROWS)
    if not arguments.speed_only:
        print_scores(artifact, arguments.train, arguments.test, config)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(artifact.path, dtype=dtype).eval()
    texts = [example.source for example in TRANSLATION.read(arguments.test)[: arguments.lines]]
    print(
        f"{len(texts)} lines, {BEAMS} beams, batches of {ROWS}, {arguments.dtype}, {len(arguments.cores)} cores, {arguments.rounds} rounds"
    )
    compare(
        {
            "glasshouse": lambda: translate_texts(artifact, texts, config),
            "transformers, sorted by length": lambda: their_answers(
                theirs, artifact, texts, arguments.length_penalty, True
            ),
            "transformers, as in the file": lambda: their_answers(
                theirs, artifact, texts, arguments.length_penalty, False
            ),
        },
        arguments.rounds,
    )


if __name__ == "__main__":
    main()
