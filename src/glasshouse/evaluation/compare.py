"""Is one model better than another, or is it chance? Paired over the same held-out documents, and over seeds.

Knows costs per document and run; reads what `evaluate` wrote, or measures both sides on one corpus. "No difference
shown" is a normal answer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from glasshouse.artifact import open_artifact, require_decoder
from glasshouse.device import Device
from glasshouse.errors import InputError
from glasshouse.evaluation.perplexity import (
    FEWEST_DOCUMENTS,
    MOST_BYTES,
    NATS_PER_BIT,
    bits_per_byte,
    draw_documents,
    hold_out,
    resample,
)
from glasshouse.files import read_json
from glasshouse.text.packing import VALIDATION, open_corpus

ERROR_RATE = 0.05
DRAWS = 4000
POWER = 2.8
"""A difference of this many standard errors is shown four times in five: 1.96 + 0.84."""


@dataclass(frozen=True)
class Costs:
    """What one run paid for each unit (document or block) of a held-out set.

    Args:
        name: the run.
        weights: digest of its weights.
        held_out: digest of the held-out texts.
        nats: float64 [units].
        sizes: float64 [units]: UTF-8 bytes.
        languages: the language of each unit; empty where units are blocks of text.
    """

    name: str
    weights: str
    held_out: str
    nats: np.ndarray = field(repr=False)
    sizes: np.ndarray = field(repr=False)
    languages: Sequence[str] = field(default=(), repr=False)


@dataclass(frozen=True)
class Comparison:
    """Two sides under one metric: bits per byte, the mean over the runs of each side.

    Args:
        metric: what was compared.
        left: of the first side.
        right: of the second.
        low: lower end of the 95 % interval of left - right.
        high: upper end of it.
        probability: of a difference at least as large if there were none (two-sided), before Holm's correction.
        adjusted: the same after it.
        detectable: the smallest difference that such data would show four times in five.
        units: documents or blocks compared.
        runs: how many runs each side has.
        method: how.
    """

    metric: str
    left: float
    right: float
    low: float
    high: float
    probability: float
    adjusted: float
    detectable: float
    units: int
    runs: tuple[int, int]
    method: str

    @property
    def is_shown(self) -> bool:
        """Whether the data show a difference."""
        return self.adjusted < ERROR_RATE

    @property
    def verdict(self) -> str:
        """One sentence, with the interval."""
        difference = self.left - self.right
        interval = f"{difference:+.4f} bits per byte, 95 % interval {self.low:+.4f} to {self.high:+.4f}"
        if not self.is_shown:
            return f"{self.metric}: no difference shown ({interval}; {self.detectable:.4f} would have been)"
        scope = "" if min(self.runs) > 1 else "; one run a side, so nothing is said of other seeds"
        return f"{self.metric}: the {'first' if difference < 0 else 'second'} is better ({interval}{scope})"


def compare_costs(
    metric: str, left: np.ndarray, right: np.ndarray, sizes: np.ndarray, seed: int = 0
) -> Comparison:
    """Compare two sides on the same units.

    The error of the difference has two parts. Other documents: a bootstrap over units of the difference of the sides'
    means, paired. Other seeds, where a side has several runs: Welch's t on the runs' scores, drawn rather than
    resampled, because resampling three runs shows too little of their spread. What differs between runs from one
    document to the next is in both parts, so it is taken out of the first (Cameron, Gelbach and Miller 2011,
    two-way clustering). The interval is symmetric (Hall 1988), and excludes zero when the probability is below 5 %.

    Args:
        metric: its name.
        left: nats [runs, units].
        right: nats [runs, units].
        sizes: UTF-8 bytes [units].
        seed: of the bootstrap.
    """
    gaps, units, total = left.mean(0) - right.mean(0), len(sizes), float(sizes.sum())
    difference = float(gaps.sum()) / total
    cost, size = resample(np.stack([gaps, sizes.astype(np.float64)]), seed=seed, draws=DRAWS)
    deviations = (cost / np.maximum(size, 1e-300) - difference) * math.sqrt(units / max(units - 1, 1))
    method = f"paired bootstrap over {units:,} units, {DRAWS:,} draws"
    variance, freedom, shared = _seed_variance(left, right, sizes)
    if freedom:
        deviations *= math.sqrt(max(0.0, 1 - shared / max(float(deviations.var()), 1e-300)))
        deviations += math.sqrt(variance) * np.random.default_rng([seed, 1]).standard_t(freedom, DRAWS)
        method += f", and Welch's t over {len(left)} and {len(right)} runs"
    sizes_of_error = np.abs(deviations)
    reach = float(np.quantile(sizes_of_error, 1 - ERROR_RATE)) if units > 1 else math.inf
    probability = (1 + int((sizes_of_error >= abs(difference)).sum())) / (1 + DRAWS) if units > 1 else 1.0
    bit = NATS_PER_BIT
    return Comparison(
        metric=metric,
        left=float(left.mean(0).sum()) / total / bit,
        right=float(right.mean(0).sum()) / total / bit,
        low=(difference - reach) / bit,
        high=(difference + reach) / bit,
        probability=probability,
        adjusted=probability,
        detectable=POWER * float(deviations.std()) / bit,
        units=units,
        runs=(len(left), len(right)),
        method=method,
    )


def _seed_variance(left: np.ndarray, right: np.ndarray, sizes: np.ndarray) -> tuple[float, float, float]:
    """Of the difference of the sides' mean scores: its variance over seeds, the degrees of freedom (0: no side has two
    runs), and how much of that variance is noise of single documents. A side with one run borrows the other's."""
    total = float(sizes.sum())
    spreads, noises = [], []
    for side in (left, right):
        if len(side) < 2:
            continue
        scores = side.sum(1) / total
        rest = side - side.mean(0) - np.outer(scores - scores.mean(), sizes)
        spreads.append((float(scores.var(ddof=1)), len(side) - 1))
        noises.append(float((rest**2).sum()) / (len(side) - 1) / total**2)
    if not spreads:
        return 0.0, 0.0, 0.0
    counts = (len(left), len(right))
    parts = [(spreads[min(place, len(spreads) - 1)][0] / count) for place, count in enumerate(counts)]
    shared = sum(noises[min(place, len(noises) - 1)] / count for place, count in enumerate(counts))
    if len(spreads) == 1:
        return sum(parts), float(spreads[0][1]), shared
    below = sum(part**2 / freedom for part, (_, freedom) in zip(parts, spreads, strict=True))
    return sum(parts), sum(parts) ** 2 / below if below else float(spreads[0][1]), shared


def correct(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Holm's correction (1979) for having looked at several metrics: the chance of any false difference stays 5 %."""
    ordered = sorted(range(len(comparisons)), key=lambda place: comparisons[place].probability)
    adjusted, highest = dict.fromkeys(ordered, 1.0), 0.0
    for rank, place in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * comparisons[place].probability))
        adjusted[place] = highest
    return [replace(comparison, adjusted=adjusted[place]) for place, comparison in enumerate(comparisons)]


def compare_sides(left: Sequence[Costs], right: Sequence[Costs], seed: int = 0) -> list[Comparison]:
    """Compare two sides overall and, where units are documents of several languages, in each language with enough.

    Raises:
        InputError: the held-out texts differ, or one side counts the same weights twice.
    """
    first = left[0]
    for costs in (*left, *right):
        if costs.held_out != first.held_out or len(costs.nats) != len(first.nats):
            raise InputError(
                "the two were not measured on the same held-out documents",
                f"{first.name} and {costs.name}",
                "measure both on one corpus: add --corpus RUN, a run of prepare",
            )
    for side in (left, right):
        if len({costs.weights for costs in side}) < len(side):
            names = ",".join(costs.name for costs in side)
            raise InputError(
                "one side has the same weights twice", names, "give runs that differ in their seed"
            )
    parts = {"bits per byte": np.ones(len(first.nats), bool)}
    languages = np.array(first.languages)
    for language in sorted(set(first.languages)) if len(set(first.languages)) > 1 else []:
        if (languages == language).sum() >= FEWEST_DOCUMENTS:
            parts[f"bits per byte, {language or 'unknown language'}"] = languages == language
    one, other = (np.stack([costs.nats for costs in side]) for side in (left, right))
    return correct(
        [
            compare_costs(name, one[:, part], other[:, part], first.sizes[part], seed)
            for name, part in parts.items()
        ]
    )


def read_costs(run: Path) -> Costs:
    """What `evaluate` recorded of a run.

    Raises:
        InputError: it was not evaluated, or its weights changed since.
    """
    run = Path(run)
    path = run / "reports" / "evaluation.json"
    if not path.is_file():
        raise InputError("the run was not evaluated", str(run), f"run: glasshouse evaluate {run}")
    report: Mapping[str, Any] = read_json(path)
    if report["digest"] != read_json(run / "run.json").get("digest"):
        raise InputError(
            "the report is of other weights than the run's", str(path), f"run: glasshouse evaluate {run}"
        )
    units = report["units"]
    return Costs(
        str(run), report["digest"], report["held_out"]["digest"], np.array(units["nats"], dtype=np.float64),
        np.array(units["bytes"], dtype=np.float64), units["languages"],
    )  # fmt: skip


def measure_costs(run: Path, corpus: Path, device: Device, most_bytes: int = MOST_BYTES) -> Costs:
    """What a model pays on the held-out side of a corpus that need not be its own.

    Args:
        run: a run or a model folder.
        corpus: a run of prepare, or its corpus folder.
        device: where to compute.
        most_bytes: measure about this much of it.

    Raises:
        InputError: the model or the corpus cannot be opened.
    """
    corpus = Path(corpus)
    artifact = open_artifact(run, dtype=device.compute_dtype, device=device.torch_device)
    split = open_corpus(corpus / "corpus" if (corpus / "corpus").is_dir() else corpus).split(VALIDATION)
    numbers = draw_documents(split, most_bytes)
    held_out = hold_out(split, artifact.tokenizer, numbers, encode=True)
    found = bits_per_byte(
        require_decoder(artifact), held_out, end_of_document=artifact.tokenizer.end_of_document
    )
    whole = len(found.unit_nats) == len(found.nats)
    languages = [str(split.metadata(number).get("language", "")) for number in numbers] if whole else []
    return Costs(str(run), artifact.digest, held_out.digest, found.unit_nats, found.unit_sizes, languages)


def compare_runs(
    left: Sequence[Path],
    right: Sequence[Path],
    *,
    corpus: Path | None = None,
    device: Device | None = None,
    seed: int = 0,
) -> list[Comparison]:
    """Compare two runs, or two sets of runs that differ in nothing but their seeds.

    Args:
        left: runs of the first side.
        right: runs of the second.
        corpus: measure both on the held-out side of this corpus, instead of reading what `evaluate` recorded.
        device: where to measure; needed with a corpus.
        seed: of the bootstrap.

    Raises:
        InputError: a run was not evaluated, or the held-out texts differ.
    """
    if corpus is None or device is None:
        sides = [[read_costs(run) for run in side] for side in (left, right)]
    else:
        sides = [[measure_costs(run, corpus, device) for run in side] for side in (left, right)]
    return compare_sides(sides[0], sides[1], seed)


def describe(comparisons: Sequence[Comparison]) -> str:
    """A table of the comparisons, their verdicts and the method, as lines of plain text."""
    width = max(len(comparison.metric) for comparison in comparisons)
    lines = [
        f"{'':<{width}}  {'first':>8}  {'second':>8}  {'difference':>10}  {'95 % interval':>20}  {'p':>6}"
    ]
    for found in comparisons:
        interval = f"{found.low:+.4f} to {found.high:+.4f}"
        probability = "<0.001" if found.adjusted < 0.001 else f"{found.adjusted:.3f}"
        lines.append(
            f"{found.metric:<{width}}  {found.left:8.4f}  {found.right:8.4f}  {found.left - found.right:+10.4f}"
            f"  {interval:>20}  {probability:>6}"
        )
    corrected = f"; p after Holm's correction for {len(comparisons)} metrics" if len(comparisons) > 1 else ""
    return "\n".join(
        [*lines, "", *(found.verdict for found in comparisons), f"({comparisons[0].method}{corrected})"]
    )
