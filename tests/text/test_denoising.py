"""Span denoising: nothing is lost, nothing shown twice, as much taken as asked for."""

import numpy as np
import pytest

from glasshouse.errors import InputError
from glasshouse.text.denoising import corrupt_spans, with_sentinels
from glasshouse.text.tokenizer import train_tokenizer

SENTINELS = list(range(1000, 1200))


def restore(source: np.ndarray, target: np.ndarray) -> list[int]:
    """Put each span back where its mark stands."""
    spans: dict[int, list[int]] = {}
    for token in target.tolist():
        if token >= 1000:
            spans[token] = last = []
        else:
            last.append(token)
    return [t for token in source.tolist() for t in (spans[token] if token >= 1000 else [token])]


@pytest.mark.parametrize("size", [2, 3, 7, 50, 512])
def test_source_and_target_together_are_the_text(size):
    tokens = np.arange(size) % 900
    for step in range(20):
        source, target = corrupt_spans(tokens, SENTINELS, 1, step)
        assert restore(source, target) == tokens.tolist()
        marks = [token for token in source if token >= 1000]
        assert marks == SENTINELS[: len(marks)]
        assert [t for t in target if t >= 1000] == SENTINELS[: len(marks) + 1]
        assert target[-1] == SENTINELS[len(marks)]
        assert source[0] < 1000  # it begins with something that stays


def test_as_much_is_taken_as_asked_for():
    tokens = np.arange(400) % 900
    source, target = corrupt_spans(tokens, SENTINELS, 1, 0, share=0.15, mean_length=3.0)
    assert sum(target < 1000) == 60
    assert sum(source >= 1000) == 20


def test_seed_and_step_decide_and_every_place_is_taken_some_time():
    tokens = np.arange(40)
    first = corrupt_spans(tokens, SENTINELS, 1, 7)
    assert all(
        np.array_equal(a, b) for a, b in zip(first, corrupt_spans(tokens, SENTINELS, 1, 7), strict=True)
    )
    taken = {
        token for step in range(300) for token in corrupt_spans(tokens, SENTINELS, 1, step)[1] if token < 1000
    }
    assert taken == set(range(1, 40))  # all but the first
    assert len({tuple(corrupt_spans(tokens, SENTINELS, seed, 0)[1]) for seed in range(20)}) > 10


def test_too_short_and_too_many_are_refused():
    with pytest.raises(InputError, match="too few"):
        corrupt_spans(np.array([1]), SENTINELS, 0, 0)
    with pytest.raises(InputError, match="more marks"):
        corrupt_spans(np.arange(500), SENTINELS[:5], 0, 0)


def test_marks_are_special_tokens_behind_all_others():
    tokenizer = train_tokenizer(iter(["a cat and a dog and a cat. "] * 20), 270, exact=False)
    marked, ids = with_sentinels(tokenizer, 5)
    assert ids == list(range(tokenizer.vocab_size, tokenizer.vocab_size + 5))
    assert all(marked.is_special(token) for token in ids)
    assert marked.encode("a cat <|span_0|>") == tokenizer.encode("a cat <|span_0|>")  # in a text it is text
