"""The n-gram baseline against a slow one written from the paper, and against the laws of probability."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.errors import InputError
from glasshouse.evaluation.baselines import FALLBACK_DISCOUNTS, train_ngram
from glasshouse.inference.sampling import GenerationConfig

END = 0


class NaiveKneserNey:
    """Chen and Goodman 1999, section 3.3, with dictionaries and recursion; start is None, so it is no token."""

    def __init__(self, documents, vocab_size, order):
        self.vocab_size, self.order = vocab_size, order
        raw = [Counter() for _ in range(order + 1)]
        for document in documents:
            words = [None, *document, END]
            for end in range(2, len(words) + 1):
                for length in range(1, min(order, end) + 1):
                    gram = tuple(words[end - length : end])
                    raw[length][gram] += 1
        self.counts = [Counter() for _ in range(order + 1)]
        for length in range(1, order + 1):
            before = defaultdict(set)
            if length < order:
                for longer in raw[length + 1]:
                    before[longer[1:]].add(longer[0])
            for gram, count in raw[length].items():
                starts = length > 1 and gram[0] is None
                self.counts[length][gram] = count if length == order or starts else len(before[gram])
        self.discounts = [
            None,
            *(self.estimate(self.counts[length].values()) for length in range(1, order + 1)),
        ]
        self.children = defaultdict(dict)
        for length in range(1, order + 1):
            for gram, count in self.counts[length].items():
                self.children[gram[:-1]][gram[-1]] = count

    @staticmethod
    def estimate(counts):
        n = Counter(counts)
        if not (n[1] and n[2] and n[3]):
            return FALLBACK_DISCOUNTS
        base = n[1] / (n[1] + 2 * n[2])
        found = (1 - 2 * base * n[2] / n[1], 2 - 3 * base * n[3] / n[2], 3 - 4 * base * n[4] / n[3])
        usable = 0 <= found[0] <= 1 and 0 <= found[1] <= 2 and 0 <= found[2] <= 3
        return found if usable else FALLBACK_DISCOUNTS

    def probability(self, history, word):
        """P(word | history), history a tuple of at most order - 1 tokens."""
        shorter = self.probability(history[1:], word) if history else 1 / self.vocab_size
        followers = self.children.get(history)
        if not followers:
            return shorter
        discount = (0, *self.discounts[len(history) + 1])
        total = sum(followers.values())
        freed = sum(discount[min(count, 3)] for count in followers.values())
        count = followers.get(word, 0)
        return (max(count - discount[min(count, 3)], 0) + freed * shorter) / total

    def document(self, document):
        words = [None, *document, END]
        return [
            np.log(self.probability(tuple(words[max(0, end - self.order + 1) : end]), words[end]))
            for end in range(1, len(words))
        ]


def random_documents(seed, vocab_size=30, number=200, longest=40):
    """Documents of a skewed random walk, so that there are repeated n-grams of every order; some are empty."""
    random = np.random.default_rng(seed)
    weights = 1 / np.arange(1, vocab_size)
    documents = []
    for _ in range(number):
        length = random.integers(0, longest)
        words = 1 + random.choice(vocab_size - 1, size=length, p=weights / weights.sum())
        repeated = random.random(length) < 0.6
        words[1:] = np.where(repeated[1:], (words[:-1] * 7 + 3) % (vocab_size - 1) + 1, words[1:])
        documents.append([int(word) for word in words])
    return documents


def arrays(documents, dtype=np.uint16):
    return [np.array([*document, END], dtype) for document in documents]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_same_as_a_naive_one(order):
    train, held_out = random_documents(1), random_documents(2, number=30)
    ours, naive = train_ngram(arrays(train), 30, END, order), NaiveKneserNey(train, 30, order)
    for found, expected in zip(ours.discounts, naive.discounts[1:], strict=True):
        assert found == pytest.approx(expected)
    for document in [*held_out, *train[:20]]:
        scored = ours.log_probabilities(np.array([*document, END]))
        np.testing.assert_allclose(scored, naive.document(document), rtol=1e-5, atol=1e-6)


def test_discounts_are_estimated_not_the_fallback():
    model = train_ngram(arrays(random_documents(1, vocab_size=300, number=600)), 300, END, 3)
    assert all(found != FALLBACK_DISCOUNTS for found in model.discounts[1:])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5), max_size=8), min_size=1, max_size=8),
    st.lists(st.integers(1, 6), max_size=7),
)
def test_same_as_a_naive_one_on_any_tiny_corpus(documents, held_out):
    ours, naive = train_ngram(arrays(documents), 7, END, 4), NaiveKneserNey(documents, 7, 4)
    scored = ours.log_probabilities(np.array([*held_out, END]))
    np.testing.assert_allclose(scored, naive.document(held_out), rtol=1e-5, atol=1e-6)


def test_probabilities_sum_to_one_and_agree_with_the_scores():
    train = random_documents(3)
    model, random = train_ngram(arrays(train), 30, END), np.random.default_rng(0)
    contexts = [list(random.integers(1, 30, size=size)) for size in (0, 1, 2, 3, 4, 7) for _ in range(5)]
    contexts += [document[:cut] for document in train[:40] for cut in (1, 3, 5) if len(document) > cut]
    for context in contexts:
        distribution = model.distribution(context)
        assert distribution.sum() == pytest.approx(1, abs=1e-5)
        assert distribution.min() > 0
        token = int(random.integers(0, 30))
        scored = model.log_probabilities(np.array([*context, token]))[-1]
        assert scored == pytest.approx(np.log(distribution[token]), abs=1e-5)


def test_documents_in_one_stream_score_as_alone():
    model, held_out = (
        train_ngram(arrays(random_documents(4)), 30, END),
        arrays(random_documents(5, number=20)),
    )
    alone = np.concatenate([model.log_probabilities(document) for document in held_out])
    np.testing.assert_allclose(model.log_probabilities(np.concatenate(held_out)), alone)


def test_counting_does_not_depend_on_how_documents_are_handed_over():
    documents = arrays(random_documents(6))
    one_by_one, joined = train_ngram(documents, 30, END), train_ngram([np.concatenate(documents)], 30, END)
    for left, right in zip(one_by_one.orders, joined.orders, strict=True):
        np.testing.assert_array_equal(left.probability, right.probability)
    assert one_by_one.tokens == sum(map(len, documents))


def test_borders_are_respected():
    """What follows a word across a border must not be learned."""
    crossing = train_ngram([np.array([1, END, 2, END] * 50)], 4, END)
    assert crossing.distribution([1])[2] < 0.1
    assert crossing.distribution([1])[END] > 0.8
    assert crossing.distribution([1, END, 2])[END] > 0.8
    assert crossing.distribution([]) == pytest.approx(crossing.distribution([1, END]))


def test_better_than_the_next_lower_order_on_text_with_long_patterns():
    sentence = [1, 2, 3, 4, 1, 2, 5, 6, 1, 2, 3, 7]
    losses = [
        -train_ngram(arrays([sentence] * 20), 10, END, order)
        .log_probabilities(np.array([*sentence, END]))
        .mean()
        for order in (1, 2, 3, 5)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 2 * losses[-1]


def test_samples_follow_the_distribution_and_the_seed():
    model = train_ngram(arrays(random_documents(7)), 30, END)
    firsts = [next(model.sample([3], GenerationConfig(1.0, seed=seed))) for seed in range(2000)]
    frequency = np.bincount(firsts, minlength=30) / 2000
    assert np.abs(frequency - model.distribution([3])).max() < 0.04
    text = list(model.sample([3], GenerationConfig(1.0, seed=1, max_new_tokens=50)))
    assert text == list(model.sample([3], GenerationConfig(1.0, seed=1, max_new_tokens=50)))
    assert text != list(model.sample([3], GenerationConfig(1.0, seed=2, max_new_tokens=50)))
    assert all(token != END for token in text[:-1])
    greedy = list(model.sample([3], GenerationConfig(temperature=0)))
    assert greedy[0] == model.distribution([3]).argmax()


def test_refusals_name_the_trouble():
    with pytest.raises(InputError, match="token 30 in a vocabulary of 30"):
        train_ngram([np.array([30, END])], 30, END)
    with pytest.raises(InputError, match="no tokens"):
        train_ngram([], 30, END)
    with pytest.raises(InputError, match="order is 0"):
        train_ngram([np.array([1, END])], 30, END, order=0)
    with pytest.raises(InputError, match="token 31"):
        train_ngram([np.array([1, END])], 30, END).log_probabilities(np.array([31]))


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_any_integer_format(dtype):
    documents = random_documents(8, number=20)
    reference = train_ngram(arrays(documents), 30, END).log_probabilities(np.array([1, 2, END]))
    model = train_ngram(arrays(documents, dtype), 30, END)
    np.testing.assert_array_equal(model.log_probabilities(np.array([1, 2, END], dtype)), reference)
