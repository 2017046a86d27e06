"""What a model lost while it learned something else: its base's held-out text, predicted by both.

Kirkpatrick et al. 2017 (arXiv:1612.00796) name the fault; measured here as a paired difference over documents, with its
interval, overall and by language. Knows folders of models and corpora; nothing of how they were trained.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from glasshouse.device import Device
from glasshouse.evaluation.compare import compare_sides, measure_costs
from glasshouse.files import read_json

RUN_FILE = "run.json"
MOST_BYTES = 2**19
"""Of held-out text that is read by each model."""


def corpus_behind(model: Path) -> Path | None:
    """The corpus that a model was pretrained on, through any number of fine-tunings; None where it is not known here."""
    for _ in range(20):
        if not (model / RUN_FILE).is_file():
            return None
        parents = read_json(model / RUN_FILE).get("parents") or []
        if not parents:
            return None
        model = Path(parents[0]["path"])
        if (model / "corpus").is_dir():
            return model
    return None


def measure_forgetting(tuned: Path, base: Path, corpus: Path, device: Device) -> dict[str, Any]:
    """How much worse a fine-tuned model predicts the held-out text of its base.

    Args:
        tuned: the model after.
        base: the model before.
        corpus: a run of prepare whose held-out side is read.
        device: where to compute.

    Returns:
        A report: for all text and for each language, bits per byte after and before, their difference with its 95 %
        interval, and a verdict; and the digests of both models.

    Raises:
        InputError: a model or the corpus cannot be opened, or their tokenizers read different text.
    """
    after, before = (measure_costs(model, corpus, device, MOST_BYTES) for model in (tuned, base))
    found = compare_sides([after], [before])
    overall = found[0]
    return {
        "digest": after.weights, "base": str(base), "base_digest": before.weights, "corpus": str(corpus),
        "after": overall.left, "before": overall.right, "difference": overall.left - overall.right,
        "low": overall.low, "high": overall.high, "units": overall.units, "method": overall.method,
        "verdict": _verdict(overall.left - overall.right, overall.low, overall.high, overall.is_shown),
        "by": [{**asdict(one), "verdict": one.verdict} for one in found[1:]],
    }  # fmt: skip


def _verdict(difference: float, low: float, high: float, shown: bool) -> str:
    interval = f"{difference:+.3f} bits per byte, 95 % interval {low:+.3f} to {high:+.3f}"
    if not shown:
        return f"no forgetting shown on the base's held-out text ({interval})"
    return f"it {'forgot' if difference > 0 else 'gained'}: the base's held-out text costs {interval}"
