"""Everything that the files of one run say, as plain data. Reads no files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glasshouse.card.quantity import number_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """Everything that the files of a run say.

    Args:
        name: of the run, for titles.
        place: of the run, as seen from the folder that holds it.
        run: run.json.
        recipe: recipe.yaml as text.
        settings: the stage's part of it.
        steps: lines of metrics.jsonl about a training step.
        validations: those about a validation.
        reports: attached reports by name.
        corpus: corpus.json, or {}.
        waterfall: waterfall.json, or {}.
        tokenizer: tokenizer_report.json, or {}.
        notes: what was missing or could not be read.
    """

    name: str
    place: str
    run: Row
    recipe: str
    settings: Row
    steps: Sequence[Row]
    validations: Sequence[Row]
    reports: dict[str, Any]
    corpus: Row
    waterfall: Row
    tokenizer: Row
    notes: Sequence[str]

    @property
    def evaluation(self) -> Row:
        """reports/evaluation.json, or {}."""
        return part(self.reports, "evaluation")

    @property
    def shape(self) -> Row:
        """The shape of the model."""
        return part(self.run, "shape", "model")

    @property
    def is_encoder(self) -> bool:
        """Whether the model guesses hidden tokens, so that its losses are no bits per byte."""
        return "head" in self.shape

    @property
    def best(self) -> Row:
        """The validation with the lowest loss, or {}: the one whose weights the run keeps."""
        known = [row for row in self.validations if number_of(row.get("validation_loss")) is not None]
        return min(known, key=lambda row: row["validation_loss"], default={})

    @property
    def languages(self) -> list[str]:
        """Codes of the languages of the corpus."""
        return sorted(name for name in part(self.corpus, "languages") if re.fullmatch(r"[a-z]{2,3}", name))

    @property
    def is_finished(self) -> bool:
        """Whether the stage came to its end."""
        return self.run.get("status") == "finished"

    @property
    def done(self) -> int:
        """Optimizer steps in the files."""
        return int(
            number_of(self.run.get("steps"))
            or (number_of(self.steps[-1].get("step")) if self.steps else 0)
            or 0
        )


def part(value: Any, *keys: str) -> Row:
    """A table inside tables, or {} where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def rows_of(value: Any) -> list[Row]:
    """The tables of a list, or []."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def numbers(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one figure, where it was logged."""
    pairs = [(row.get("step"), number_of(row.get(key))) for row in rows]
    known = [
        (float(step), value)
        for step, value in pairs
        if number_of(step) is not None and step is not None and value is not None
    ]
    return [step for step, _ in known], [value for _, value in known]


def spread(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many items, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(number * (len(rows) - 1) / (most - 1))] for number in range(most)]


def tokens_seen(facts: Facts) -> float | None:
    """Tokens that the weights have been trained on."""
    return number_of(facts.run.get("tokens")) or (
        number_of(facts.steps[-1].get("tokens")) if facts.steps else None
    )
