"""Scores of whole test sets by the field's reference scorers, with intervals from resampled test sets.

Each figure is the reference library's own on the same lines. Knows no task and no model.
"""

from collections.abc import Sequence
from typing import Any

from glasshouse.errors import InputError
from glasshouse.tasks.task import Score

RESAMPLES = 1000
"""Test sets drawn with replacement for each interval (Koehn 2004)."""


def bleu(answers: Sequence[str], references: Sequence[str], lower_case: bool = False) -> Score:
    """Corpus BLEU as sacrebleu computes it (Post 2018, arXiv:1804.08771): cased and detokenized unless asked otherwise;
    Chinese and Japanese references are cut into characters.

    Raises:
        InputError: sacrebleu is not installed, or the two differ in length.
    """
    from_library = _library().BLEU(lowercase=lower_case, tokenize=_tokenizer_for(references))
    name = "BLEU, lower-cased" if lower_case else "BLEU"
    return _score(name, from_library, answers, references)


def chrf(answers: Sequence[str], references: Sequence[str]) -> Score:
    """Corpus chrF2 as sacrebleu computes it (Popovic 2015): n-grams of characters, for languages without spaces too.

    Raises:
        InputError: sacrebleu is not installed, or the two differ in length.
    """
    return _score("chrF", _library().CHRF(), answers, references)


def _score(name: str, metric: Any, answers: Sequence[str], references: Sequence[str]) -> Score:
    if len(answers) != len(references) or not answers:
        what = f"{len(answers):,} answers and {len(references):,} references"
        raise InputError(what, name, "give one reference for each answer")
    found = metric.corpus_score(list(answers), [list(references)], n_bootstrap=RESAMPLES)
    # Its interval is the resamples' mean and half-width.
    return Score(name, found.score, found._mean - found._ci, found._mean + found._ci)


def _tokenizer_for(references: Sequence[str]) -> str:
    """sacrebleu's name of the way to cut a language into words."""
    text = "".join(references[:200])
    unspaced = sum("\u3040" <= character <= "\u9fff" for character in text)
    return "zh" if unspaced > 0.3 * len(text) else "13a"


def _library() -> Any:
    try:
        import sacrebleu
    except ImportError:
        raise InputError(
            "sacrebleu is not installed", "scores", "pip install 'glasshouse[evaluation]'"
        ) from None
    return sacrebleu
