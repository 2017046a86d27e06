"""Span denoising: a text with pieces taken out as the source, the pieces as the target.

A pure function of tokens, seed and step, so a resumed run corrupts what an uninterrupted one would have. Source: Raffel et
al. 2020 (arXiv:1910.10683), section 3.1.4. Knows token ids; nothing of models.
"""

from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import AddedToken

from glasshouse.errors import InputError
from glasshouse.text.tokenizer import Tokenizer

SENTINELS = 32
"""Marks for places where something was taken out, beginning with the first."""


def with_sentinels(tokenizer: Tokenizer, count: int = SENTINELS) -> tuple[Tokenizer, list[int]]:
    """The same tokenizer with `count` special tokens as its last, and their ids in order."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.plain.to_str())
    names = [f"<|span_{number}|>" for number in range(count)]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    marked = Tokenizer(backend, tokenizer.settings, tokenizer.chat_template)
    return marked, [marked.special[name] for name in names]


def corrupt_spans(
    tokens: np.ndarray,
    sentinels: Sequence[int],
    seed: int,
    step: int,
    share: float = 0.15,
    mean_length: float = 3.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Take spans out of a text.

    The text begins with something that stays; kept pieces and spans alternate, each at least one token long, their
    lengths a random composition of what is kept and of what is taken.

    Args:
        tokens: [n] ids, n >= 2.
        sentinels: ids of the marks; one more than there are spans.
        seed: of the choice.
        step: another choice for each.
        share: of the tokens that are taken out.
        mean_length: of a span, on average.

    Returns:
        The source: what stays, a mark in place of each span. The target: each mark and what stood there, and one mark
        more as its end.

    Raises:
        InputError: the text is shorter than two tokens, or needs more marks than there are.
    """
    size = len(tokens)
    if size < 2:
        raise InputError(f"{size} tokens are too few to take some out", "denoising", "give longer texts")
    taken = min(max(round(size * share), 1), size - 1)
    spans = min(max(round(taken / mean_length), 1), taken, size - taken)
    if spans + 1 > len(sentinels):
        raise InputError(
            f"{spans} spans and {len(sentinels)} marks", "denoising", "give shorter texts or more marks"
        )
    draw = np.random.default_rng([seed, step])
    kept_lengths, span_lengths = _composition(draw, size - taken, spans), _composition(draw, taken, spans)
    source: list[int] = []
    target: list[int] = []
    place = 0
    for mark, kept, length in zip(sentinels, kept_lengths, span_lengths, strict=False):
        source += [*tokens[place : place + kept].tolist(), mark]
        target += [mark, *tokens[place + kept : place + kept + length].tolist()]
        place += kept + length
    return np.array(source), np.array([*target, sentinels[spans]])


def _composition(draw: np.random.Generator, total: int, parts: int) -> list[int]:
    """`total` as a sum of `parts` numbers above 0, each such sum equally likely."""
    cuts = np.sort(draw.permutation(total - 1)[: parts - 1]) + 1
    return np.diff([0, *cuts, total]).tolist()
