"""The stage `evaluate`: what a finished run's model pays for held-out text, beside a 5-gram baseline.

Reads the run's model and the corpus it was trained on; writes reports/evaluation.json and nothing else.
"""

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.artifact import open_artifact, require_decoder
from glasshouse.device import open_device
from glasshouse.errors import InputError
from glasshouse.evaluation.baselines import train_ngram
from glasshouse.evaluation.compare import compare_costs
from glasshouse.evaluation.perplexity import (
    FEWEST_DOCUMENTS,
    MOST_BYTES,
    NATS_PER_BIT,
    HeldOut,
    Measurement,
    Score,
    draw_documents,
    hold_out,
    measure,
    model_score,
    ngram_score,
    ratio_interval,
)  # fmt: skip
from glasshouse.run import Run
from glasshouse.text.packing import TRAIN, VALIDATION, Corpus, Split, open_corpus
from glasshouse.text.tokenizer import Tokenizer, open_tokenizer

MOST_GROUPS = 20
TRAIN_SHARE = 0.5
METHOD = (
    "95 % {interval}; every token and the end of each document counted once; documents longer than the context of "
    "{context} tokens in windows half a context apart"
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `glasshouse evaluate`.

    Args:
        corpus: the run of prepare whose held-out text is used; empty for the one the model was trained on.
        bytes: measure about this much held-out text, drawn by document.
        order: longest n-gram of the baseline.
        baseline_tokens: count the baseline on at most this many training tokens.
        seed: seed of the draw of documents and of the bootstrap.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "auto", "float32" or "bfloat16".
    """

    corpus: str = ""
    bytes: int = MOST_BYTES
    order: int = 5
    baseline_tokens: int = 20_000_000
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("bytes", "order", "baseline_tokens"):
            if getattr(self, name) < 1:
                raise InputError(
                    f"{name} is {getattr(self, name)}", f"--{name}", "give a whole number of at least 1"
                )
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}", "--seed", "give a whole number of at least 0")


def evaluate(config: EvaluateConfig, run: Run) -> dict[str, Any]:
    """Measure a run's model and attach the report "evaluation".

    Returns:
        The report: bits per byte of the model and of the n-gram baseline on the same tokens, their paired difference,
        the same on training text, per language and per source, all with 95 % intervals.

    Raises:
        InputError: the run has no model, its corpus is gone or was changed, or the tokenizers differ.
    """
    started = time.monotonic()
    device = open_device(config.device, config.dtype, config.seed)
    artifact = open_artifact(run.path, dtype=device.compute_dtype, device=device.torch_device)
    corpus = _open_parent(config, run)
    _require_tokenizer(corpus, artifact.tokenizer)
    split = corpus.split(VALIDATION)
    numbers = draw_documents(split, config.bytes, config.seed)
    held_out = hold_out(split, artifact.tokenizer, numbers)
    score = model_score(require_decoder(artifact), corpus.end_of_document)
    model = measure(held_out, score, seed=config.seed)
    baseline, counted = _baseline(corpus, config)
    ngram = measure(held_out, baseline, seed=config.seed)
    facts = [split.metadata(number) for number in numbers]
    languages, sources = ([str(one.get(key, "")) for one in facts] for key in ("language", "source"))
    whole = len(model.unit_nats) == len(model.nats)  # units are documents
    report = {
        "digest": artifact.digest,
        "command": shlex.join(["glasshouse", *sys.argv[1:]]),
        "seed": config.seed,
        "device": f"{device.kind} {device.dtype}",
        "held_out": {
            "split": VALIDATION, "documents": model.documents, "of_documents": split.documents, "tokens": model.tokens,
            "bytes": model.bytes, "digest": held_out.digest, "corpus": corpus.digest,
        },
        "bits_per_byte": _figures(model),
        "baseline": {"name": f"{config.order}-gram, modified Kneser-Ney", "tokens": counted, **_figures(ngram)},
        "difference": _difference(model, ngram, config.seed),
        "train": _training(corpus, artifact.tokenizer, held_out, score, model, config.seed),
        "languages": _by_group(languages, model, ngram, config.seed),
        "sources": _by_group(sources, model, ngram, config.seed),
        "method": METHOD.format(interval=model.method, context=artifact.config.context_length),
        "units": {
            "nats": [round(value, 4) for value in model.unit_nats.tolist()],
            "bytes": [int(value) for value in model.unit_sizes.tolist()],
            "languages": languages if whole else [],
        },
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    run.attach("evaluation", report)
    print(summary(report))
    return report


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    model, baseline, difference, train = (
        report[key] for key in ("bits_per_byte", "baseline", "difference", "train")
    )
    held_out = report["held_out"]
    return "\n".join(
        [
            f"held-out text: {held_out['documents']:,} documents, {held_out['bytes'] / 1e3:,.1f} kB, "
            f"{held_out['tokens']:,} tokens",
            f"model:         {_interval(model)} bits per byte",
            f"baseline:      {_interval(baseline)} ({baseline['name']})",
            f"difference:    {_interval(difference)}, {difference['verdict']}",
            f"on training text {train['value']:.3f}; gap {train['gap']:+.3f}",
        ]
    )


def _interval(figures: dict[str, Any]) -> str:
    if figures["low"] is None or not math.isfinite(figures["low"]):
        return f"{figures['value']:.3f}"
    return f"{figures['value']:.3f} [{figures['low']:.3f}, {figures['high']:.3f}]"


def _open_parent(config: EvaluateConfig, run: Run) -> Corpus:
    """The corpus named in the config, or the one the run was made from, unchanged since."""
    parents = run.read().get("parents") or []
    if not config.corpus and not parents:
        raise InputError("the run names no corpus", str(run.path), "add --corpus and a run of prepare")
    corpus = open_corpus(Run(Path(config.corpus or parents[0]["path"])).corpus_path)
    if not config.corpus and parents[0].get("digest") not in (None, corpus.digest):
        raise InputError(
            "the corpus is not the one the run was trained on",
            str(corpus.folder),
            "prepare it again as it was",
        )
    return corpus


def _require_tokenizer(corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Refuse a corpus in other tokens than the model's."""
    text = corpus.split(VALIDATION).text(0)[:1000]
    theirs = open_tokenizer(corpus.folder)
    if corpus.vocab_size != tokenizer.vocab_size or theirs.encode(text) != tokenizer.encode(text):
        fix = "give a corpus made with the model's tokenizer, or use glasshouse compare --corpus"
        raise InputError("the corpus has another tokenizer than the model", str(corpus.folder), fix)


def _baseline(corpus: Corpus, config: EvaluateConfig) -> tuple[Score, int]:
    """The n-gram scorer and how many training tokens it counted."""
    split, documents, tokens = corpus.split(TRAIN), [], 0
    for number in range(split.documents):
        if tokens >= config.baseline_tokens:
            break
        documents.append(split.document(number)[0])
        tokens += len(documents[-1])
    model = train_ngram(documents, corpus.vocab_size, corpus.end_of_document, config.order)
    return ngram_score(model.log_probabilities), tokens


def _figures(measured: Measurement) -> dict[str, float]:
    return {"value": measured.bits_per_byte, "low": measured.low, "high": measured.high}


def _difference(model: Measurement, ngram: Measurement, seed: int) -> dict[str, Any]:
    found = compare_costs("", model.unit_nats[None], ngram.unit_nats[None], model.unit_sizes, seed)
    better = "the model is better" if found.left < found.right else "the baseline is better"
    return {
        "value": found.left - found.right, "low": found.low, "high": found.high, "p": found.probability,
        "verdict": better if found.is_shown else "no difference shown", "method": found.method,
    }  # fmt: skip


def _training(
    corpus: Corpus, tokenizer: Tokenizer, held_out: HeldOut, score: Score, model: Measurement, seed: int
) -> dict[str, Any]:
    """The same figure on training text, and how much worse held-out text is."""
    budget = max(int(sum(map(len, held_out.tokens)) * TRAIN_SHARE), 1)
    sample = _sample(corpus.split(TRAIN), tokenizer, budget, seed)
    found = measure(sample, score, seed=seed)
    gap = model.bits_per_byte - found.bits_per_byte
    reach = math.hypot(model.high - model.low, found.high - found.low) / 2
    return {
        **_figures(found), "documents": found.documents, "tokens": found.tokens, "gap": gap, "gap_low": gap - reach,
        "gap_high": gap + reach, "gap_method": "two separate samples; half-widths added in quadrature",
    }  # fmt: skip


def _sample(split: Split, tokenizer: Tokenizer, budget: int, seed: int) -> HeldOut:
    """Documents of a split up to a number of tokens, the last one cut to fit."""
    order = np.random.default_rng(seed).permutation(split.documents).tolist()
    numbers, left = [], budget
    for number in order:
        if left <= 0:
            break
        numbers.append(number)
        left -= len(split.document(number)[0])
    sample = hold_out(split, tokenizer, numbers)
    if left >= 0:
        return sample
    cut = sample.tokens[-1][: len(sample.tokens[-1]) + left]
    sizes = [*sample.bytes[:-1].tolist(), max(int(sample.token_bytes[cut].sum()), 1)]
    return replace(sample, tokens=[*sample.tokens[:-1], cut], bytes=np.array(sizes))


def _by_group(
    names: Sequence[str], model: Measurement, ngram: Measurement, seed: int
) -> list[dict[str, Any]]:
    """Figures of each group of documents, the largest first; intervals where there are documents enough."""
    rows = []
    for name in sorted(set(names)):
        own = np.array([other == name for other in names])
        nats, sizes = model.nats[own], model.sizes[own].astype(np.float64)
        total = float(sizes.sum())
        if not total:
            continue
        ends: list[float | None] = [None, None]
        if own.sum() >= FEWEST_DOCUMENTS:
            ends = [end / NATS_PER_BIT for end in ratio_interval(nats, sizes, seed=seed, draws=1000)]
        rows.append(
            {
                "name": name or "unknown",
                "documents": int(own.sum()),
                "bytes": int(total),
                "value": float(nats.sum()) / total / NATS_PER_BIT,
                "low": ends[0],
                "high": ends[1],
                "baseline": float(ngram.nats[own].sum()) / total / NATS_PER_BIT,
            }
        )
    return sorted(rows, key=lambda row: -row["bytes"])[:MOST_GROUPS]
