"""Which tokens a masked language model must guess, and what it is shown instead.

A pure function of tokens, seed and step, so a resumed run hides what an uninterrupted one would have. Knows token ids
and where words begin; nothing of models.
"""

from dataclasses import dataclass

import numpy as np

from glasshouse.errors import InputError
from glasshouse.text.reading import Words

IGNORED = -100
SPAN_ENDS = 0.2
"""Chance that a span ends after each of its words: SpanBERT's (Joshi et al. 2019, arXiv:1907.10529)."""
LONGEST_SPAN = 10
UNITS = ("token", "word", "span")


@dataclass(frozen=True)
class Masking:
    """What is hidden, and how.

    Args:
        share: of the tokens that must be guessed: 0.15 in BERT, 0.3 in ModernBERT (Wettig et al. 2022,
            arXiv:2202.08005).
        unit: what is hidden at once: a "token", a whole "word", or a "span" of some words, 3.8 on average.
        hidden: share of those tokens in whose place the mask is shown (BERT: 0.8).
        replaced: share in whose place a random token is shown (BERT: 0.1); the rest is shown as it is.
    """

    share: float = 0.3
    unit: str = "token"
    hidden: float = 0.8
    replaced: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"a share of {self.share}", "--mask_share", "give a number between 0 and 1")
        if self.unit not in UNITS:
            raise InputError(f"unknown unit {self.unit!r}", "--mask_unit", f"use {', '.join(UNITS)}")


def hide_tokens(
    tokens: np.ndarray, words: Words, mask: int, masking: Masking, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hide some of the tokens.

    Args:
        tokens: int64 [rows, T].
        words: where words begin; special tokens are never hidden, nor shown in place of others.
        mask: the id shown for a hidden token.
        masking: how many, and how.
        seed: of the choice.
        step: another choice for each.

    Returns:
        What the model is shown, [rows, T], and its labels, [rows, T]: the token that stood there where it must be
        guessed, `IGNORED` elsewhere.
    """
    generator = np.random.default_rng([seed, step, 0x6D61736B])
    if masking.unit == "token":
        chosen = generator.random(tokens.shape) < masking.share
    else:
        chosen = _choose_words(words.starts(tokens), masking, generator)
    chosen &= ~words.is_special[tokens]
    labels = np.where(chosen, tokens, IGNORED)
    fate = generator.random(tokens.shape)
    ordinary = np.flatnonzero(~words.is_special)
    others = ordinary[generator.integers(0, len(ordinary), tokens.shape)]
    shown = np.where(
        fate < masking.hidden, mask, np.where(fate < masking.hidden + masking.replaced, others, tokens)
    )
    return np.where(chosen, shown, tokens), labels


def _choose_words(starts: np.ndarray, masking: Masking, generator: np.random.Generator) -> np.ndarray:
    """Whole words, one by one or in spans: bool [rows, T]."""
    number = np.cumsum(starts, axis=1) - 1  # of the word, in its row
    rows, words = len(starts), int(number.max(initial=0)) + 1
    chosen = generator.random((rows, words)) < masking.share
    if masking.unit == "span":
        chosen = _choose_spans(rows, words, masking.share, generator)
    return np.take_along_axis(chosen, number, axis=1)


def _choose_spans(rows: int, words: int, share: float, generator: np.random.Generator) -> np.ndarray:
    """Spans of words with gaps between them, both of random lengths whose means give the share: bool [rows, words]."""
    mean = (1 - (1 - SPAN_ENDS) ** LONGEST_SPAN) / SPAN_ENDS  # of a geometric length cut at the longest
    gap = mean * (1 - share) / share
    spans = np.minimum(generator.geometric(SPAN_ENDS, (rows, words + 1)), LONGEST_SPAN)
    gaps = generator.geometric(1 / (gap + 1), (rows, words + 1)) - 1  # may be 0: two spans in a row
    # a row begins at a random place of the pattern, so that its first words are hidden as often as the others
    lengths = np.stack([gaps, spans], axis=2).reshape(rows, -1)
    ends = np.cumsum(lengths, axis=1)
    shift = generator.integers(0, LONGEST_SPAN * 4, (rows, 1))
    places = np.arange(words)[None] + shift
    piece = np.stack([np.searchsorted(ends[row], places[row], side="right") for row in range(rows)])
    return piece % 2 == 1
