"""The same prompts through two models: how far apart are their logits, and where would another token have come?

An export is right when this says so, not when it was written without an error. Knows logits and tokens only; what
computed them is the caller's business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.text.tokenizer import Tokenizer

PROMPTS = (
    "",
    "Once upon a time",
    "The capital of France is Paris. It's 2026, and 1234567 people",
    "Жили-были старик со старухой. नमस्ते दुनिया।",
    "从前有一座山，山上有座庙。 👩‍👩‍👧 é",
    "def add(left, right):\n    return left + right\n\n\t  # two  spaces",
)
"""What every export replays: scripts, joined characters, digits, code and white space; each is then continued."""


@dataclass(frozen=True)
class Comparison:
    """What a replay found.

    Args:
        prompts: how many prompts were read.
        tokens: positions compared, over all prompts.
        largest: the largest difference between two logits of the same token.
        typical: the root of the mean square of all the differences.
        spread: the standard deviation of the logits over the vocabulary, to compare them with.
        divergence: mean Kullback-Leibler divergence of the exported model's distribution from the model's, in nats.
        disagreements: positions where the likeliest token is another one.
        first: the first of them, in words; empty when there is none.
    """

    prompts: int
    tokens: int
    largest: float
    typical: float
    spread: float
    divergence: float
    disagreements: int
    first: str

    def lines(self, what: str) -> list[str]:
        """What a person is told."""
        compared = f"replayed {self.prompts} prompts through {what}: {self.tokens:,} positions compared"
        return [
            compared,
            f"largest logit difference {self.largest:.3g}, typical {self.typical:.2g} "
            f"(the logits' own spread is {self.spread:.3g}); {self.divergence:.2g} nats from the model",
            self.first or "every likeliest token is the same",
        ]

    def facts(self) -> dict[str, Any]:
        """The same as a table."""
        return dict(vars(self))


def compare_logits(
    texts: Sequence[Sequence[int]],
    expected: Sequence[Tensor],
    exported: Callable[[list[int]], Tensor],
    tokenizer: Tokenizer,
) -> Comparison:
    """Compare two models on the same tokens.

    Args:
        texts: token ids, one list for each prompt.
        expected: the model's logits for each, float32 [T, vocab_size].
        exported: gives the exported model's, of the same shape.
        tokenizer: spells tokens.
    """
    largest, errors, squares, divergence, count, wrong, first = 0.0, 0.0, 0.0, 0.0, 0, 0, ""
    for number, (tokens, ours) in enumerate(zip(texts, expected, strict=True)):
        theirs = exported(list(tokens)).float()
        difference = (theirs - ours).nan_to_num(float("inf")).abs()
        largest = max(largest, float(difference.max()))
        errors += float(difference.square().mean(-1).sum())
        squares += float(ours.std(-1).square().sum())
        logs, others = ours.log_softmax(-1), theirs.log_softmax(-1)
        divergence += float((logs.exp() * (logs - others)).sum())
        places = (ours.argmax(-1) != theirs.argmax(-1)).nonzero().flatten().tolist()
        if places and not first:
            first = _difference(number, places[0], ours, theirs, tokenizer)
        wrong, count = wrong + len(places), count + len(tokens)
    typical, spread = (errors / count) ** 0.5, (squares / count) ** 0.5
    return Comparison(len(texts), count, largest, typical, spread, divergence / count, wrong, first)


def _difference(number: int, place: int, ours: Tensor, theirs: Tensor, tokenizer: Tokenizer) -> str:
    left, right = int(ours[place].argmax()), int(theirs[place].argmax())
    margin = float(ours[place, left] - ours[place, right])
    said, instead = (_spell(tokenizer, token) for token in (left, right))
    return (
        f"first differing token: after token {place + 1} of prompt {number + 1} it says {instead} instead of {said}, "
        f"which the model prefers by {margin:.3g}"
    )


def _spell(tokenizer: Tokenizer, token: int) -> str:
    return repr(
        tokenizer.decode([token], keep_special=True) if token < tokenizer.vocab_size else f"[{token}]"
    )


def require_close(comparison: Comparison, limit: float, what: str) -> None:
    """Refuse an export that says something else than the model.

    Args:
        comparison: what the replay found.
        limit: the typical logit difference allowed, as a share of the logits' spread.
        what: the export, in words.

    Raises:
        InputError: it is further away.
    """
    allowed = limit * max(comparison.spread, torch.finfo(torch.float32).eps)
    if not comparison.typical <= allowed:
        raise InputError(
            f"{what} differs from the model: logits by typically {comparison.typical:.3g}, {allowed:.3g} allowed; "
            f"{comparison.first or 'every likeliest token is the same'}",
            "export",
            "choose a finer --type, or allow more with --limit; nothing was written",
        )
