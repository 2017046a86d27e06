"""Hidden tokens: the shares are those asked for, words stay whole, and seed and step alone decide."""

import numpy as np
import pytest

from glasshouse.errors import InputError
from glasshouse.text.masking import IGNORED, Masking, hide_tokens
from glasshouse.text.reading import Words

VOCABULARY, MASK = 103, 102
# ids below 50 begin a word, 50 to 99 go on with one, the last three are special
WORDS = Words(
    begins=np.arange(VOCABULARY) < 50,
    goes_on=(np.arange(VOCABULARY) >= 50) & (np.arange(VOCABULARY) < 100),
    is_open=np.zeros(VOCABULARY, dtype=bool),
    is_special=np.arange(VOCABULARY) >= 100,
)


def rows(seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 100, (64, 512))
    tokens[:, ::100] = 100
    return tokens


@pytest.mark.parametrize("unit", ["token", "word", "span"])
@pytest.mark.parametrize("share", [0.15, 0.3])
def test_shares(unit, share):
    tokens = rows()
    shown, labels = hide_tokens(tokens, WORDS, MASK, Masking(share, unit), seed=1, step=2)
    chosen = labels != IGNORED
    ordinary = tokens < 100
    assert not chosen[~ordinary].any()
    assert (labels[chosen] == tokens[chosen]).all()
    assert (shown[~chosen] == tokens[~chosen]).all()
    # about 7,000 words or 1,300 spans a share: four standard errors
    assert abs(chosen[ordinary].mean() - share) < 0.03 * (share / 0.15)
    hidden = (shown[chosen] == MASK).mean()
    kept = (shown[chosen] == tokens[chosen]).mean()
    assert abs(hidden - 0.8) < 0.03
    assert abs(kept - 0.1 - 0.1 / 100) < 0.02
    assert not (shown[chosen & (shown != MASK)] >= 100).any()
    first, last = chosen[:, 1:100].mean(), chosen[:, -99:].mean()  # nowhere in a row more than elsewhere
    assert abs(first - last) < 0.06


@pytest.mark.parametrize("unit", ["word", "span"])
def test_words_are_hidden_whole(unit):
    tokens = rows()
    _, labels = hide_tokens(tokens, WORDS, MASK, Masking(0.3, unit), seed=1, step=2)
    chosen, starts = labels != IGNORED, WORDS.starts(tokens)
    same_word = ~starts[:, 1:] & (tokens[:, :-1] < 100)
    assert same_word.sum() > 1000
    assert (chosen[:, 1:] == chosen[:, :-1])[same_word].all()
    _, alone = hide_tokens(tokens, WORDS, MASK, Masking(0.3, "token"), seed=1, step=2)
    split = ((alone != IGNORED)[:, 1:] != (alone != IGNORED)[:, :-1])[same_word]
    assert split.any()


def test_spans_have_geometric_lengths():
    """On rows of one-token words: the lengths of runs, where runs that touch are apart by the odds of no gap."""
    tokens = np.random.default_rng(0).integers(0, 50, (64, 2000))
    _, labels = hide_tokens(tokens, WORDS, MASK, Masking(0.15, "span"), seed=1, step=2)
    chosen = np.pad(labels != IGNORED, ((0, 0), (1, 1)))
    edges = np.diff(chosen.astype(int), axis=1)
    lengths = np.argwhere(edges == -1)[:, 1] - np.argwhere(edges == 1)[:, 1]
    lengths_of_one = np.array([(lengths == size).mean() for size in range(1, 6)])
    gap = 4.463129088 * 0.85 / 0.15  # mean of min(geometric(0.2), 10), by hand
    apart = gap / (gap + 1)
    expected = 0.2 * 0.8 ** np.arange(5) * apart
    expected[1] += 0.2 * 0.2 * (1 - apart) * apart  # two spans of one word that touch
    assert np.abs(lengths_of_one - expected).max() < 0.03
    assert abs((labels != IGNORED).mean() - 0.15) < 0.01


def test_seed_and_step_alone_decide():
    tokens = rows()
    for unit in ("token", "word", "span"):
        first, second = (hide_tokens(tokens, WORDS, MASK, Masking(0.3, unit), 1, 2) for _ in range(2))
        assert all((one == other).all() for one, other in zip(first, second, strict=True))
        for seed, step in ((1, 3), (2, 2)):
            assert (hide_tokens(tokens, WORDS, MASK, Masking(0.3, unit), seed, step)[1] != first[1]).any()


def test_bad_settings_are_refused():
    with pytest.raises(InputError, match="--mask_share"):
        Masking(share=1.0)
    with pytest.raises(InputError, match="token, word, span"):
        Masking(unit="sentence")
