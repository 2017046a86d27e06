"""What a task is: examples with a source and the targets that count as right, how a model is asked, how answers are scored,
and what a program without a model would answer. Knows no model; whoever has one asks it and hands the answers back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TaskExample:
    """One thing to do.

    Args:
        source: what is given: a sentence, a document, a question.
        targets: answers that count as right; the first is the usual one.
        row: where it was read, for messages.
    """

    source: str
    targets: tuple[str, ...]
    row: str = ""


@dataclass(frozen=True)
class Score:
    """One figure with its 95 % interval.

    Args:
        name: what is measured, with whatever makes it comparable.
        value: the figure; higher is better.
        low: lower end of the interval.
        high: upper end.
    """

    name: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.name} {self.value:.1f} [{self.low:.1f}, {self.high:.1f}]"


@dataclass(frozen=True)
class Task:
    """A job that a model is trained for and measured on.

    Args:
        name: one word.
        read: examples from files.
        prompt: what a model is given for an example.
        score: answers and their examples to figures.
        baseline: training examples and the sources of others to the answers of a program without a model.
    """

    name: str
    read: Callable[[Sequence[Path]], list[TaskExample]]
    prompt: Callable[[TaskExample], str]
    score: Callable[[Sequence[str], Sequence[TaskExample]], list[Score]]
    baseline: Callable[[Sequence[TaskExample], Sequence[str]], list[str]]
