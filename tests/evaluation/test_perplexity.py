"""Bits per byte against one forward pass per token, and intervals against what they promise."""

import math

import numpy as np
import pytest
import torch

from glasshouse.errors import InputError
from glasshouse.evaluation.perplexity import (
    FEWEST_DOCUMENTS,
    bits_per_byte,
    hold_out,
    measure,
    model_score,
    ngram_score,
    ratio_interval,
    resample,
)
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.text.tokenizer import train_tokenizer

TEXTS = [
    "The cat sat on the mat.",
    "猫坐在垫子上。🙂",
    "A",
    "The dog ran to the cat, and the cat ran away from the dog, over the mat and under the mat. " * 3,
    "狗跑了。" * 9,
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS * 2), 280)


def random_model(vocab_size, context_length=16, **changes):
    model = Decoder(DecoderConfig(vocab_size, 32, 2, 4, 2, 8, 48, context_length, **changes))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random) + (parameter.dim() == 1))
    return model.eval()


class FakeSplit:
    """What hold_out asks of a split."""

    def __init__(self, texts, tokenizer):
        self.name, self.texts, self.documents, self.tokenizer = "validation", texts, len(texts), tokenizer

    def document(self, number):
        text = self.texts[number]
        ids = [*self.tokenizer.encode(text), self.tokenizer.end_of_document]
        return np.array(ids, dtype=np.uint16), len(text.encode())

    def text(self, number):
        return self.texts[number]


def slow_costs(model, end, tokens, context, stride):
    """The nats of each token, one forward pass per token."""
    stream, costs = [end, *map(int, tokens)], []
    for place in range(1, len(stream)):
        if place <= context:
            start = 0
        else:  # the window that charges this token ends `stride` at a time after the first, or with the document
            stop = min(context + stride * math.ceil((place - context) / stride), len(tokens))
            start = stop - context
        with torch.inference_mode():
            logits = model.logits(model(torch.tensor([stream[start:place]])))[0, -1]
        costs.append(-float(logits.log_softmax(-1)[stream[place]]))
    return np.array(costs)


@pytest.mark.parametrize("stride", [8, 5, 1, 16])
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_every_token_is_charged_once_with_its_context(tokenizer, stride, position):
    model, end = random_model(tokenizer.vocab_size, position=position), tokenizer.end_of_document
    documents = hold_out(FakeSplit(TEXTS, tokenizer), tokenizer).tokens
    assert max(map(len, documents)) > 50
    found = model_score(model, end, stride=stride, batch_tokens=64)(documents)
    for tokens, cost in zip(documents, found, strict=True):
        np.testing.assert_allclose(cost, slow_costs(model, end, tokens, 16, stride), rtol=1e-4, atol=1e-4)


def test_batches_change_nothing(tokenizer):
    model = random_model(tokenizer.vocab_size)
    documents = hold_out(FakeSplit(TEXTS, tokenizer), tokenizer).tokens
    alone = model_score(model, tokenizer.end_of_document, batch_tokens=1)(documents)
    together = model_score(model, tokenizer.end_of_document, batch_tokens=10**6)(documents)
    for left, right in zip(alone, together, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


def test_bits_per_byte_counts_the_end_and_divides_by_bytes(tokenizer):
    held_out = hold_out(FakeSplit(TEXTS, tokenizer), tokenizer)
    model = random_model(tokenizer.vocab_size)
    found = bits_per_byte(model, held_out, end_of_document=tokenizer.end_of_document)
    costs = [slow_costs(model, tokenizer.end_of_document, tokens, 16, 8) for tokens in held_out.tokens]
    size = sum(len(text.encode()) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(sum(map(np.sum, costs)) / math.log(2) / size, rel=1e-4)
    assert found.nats == pytest.approx([cost.sum() for cost in costs], rel=1e-4)
    assert (found.documents, found.bytes) == (5, size)
    assert found.tokens == sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)
    assert found.low < found.bits_per_byte < found.high


def test_a_uniform_scorer_pays_what_it_must(tokenizer):
    held_out = hold_out(FakeSplit(TEXTS, tokenizer), tokenizer)
    found = measure(held_out, ngram_score(lambda tokens: np.full(len(tokens), -math.log(4.0))))
    assert found.bits_per_byte == pytest.approx(2 * found.tokens / found.bytes)


def test_ngram_score_cuts_the_stream_where_documents_end():
    seen = []

    def log_probabilities(tokens):
        seen.append(tokens.tolist())
        return -tokens.astype(float)

    costs = ngram_score(log_probabilities)([np.array([3, 0]), np.array([0]), np.array([5, 6, 0])])
    assert [cost.tolist() for cost in costs] == [[3, 0], [0], [5, 6, 0]]
    assert seen == [[3, 0, 0, 5, 6, 0]]


def test_few_documents_are_resampled_by_blocks_of_text(tokenizer):
    held_out = hold_out(FakeSplit([TEXTS[0], TEXTS[3] * 4, TEXTS[4] * 3], tokenizer), tokenizer)
    found = measure(held_out, lambda documents: [np.ones(len(tokens)) for tokens in documents])
    assert "blocks" in found.method
    assert len(found.unit_nats) > 50
    assert found.unit_nats.sum() == pytest.approx(found.nats.sum())
    assert found.unit_sizes.sum() == found.bytes
    other = train_tokenizer(iter(TEXTS), 262)  # the same text in other tokens has the same blocks
    held_other = hold_out(FakeSplit([TEXTS[0], TEXTS[3] * 4, TEXTS[4] * 3], other), other)
    found_other = measure(held_other, lambda documents: [np.ones(len(tokens)) for tokens in documents])
    np.testing.assert_array_equal(found.unit_sizes, found_other.unit_sizes)
    assert held_out.digest == held_other.digest
    assert found.tokens < found_other.tokens


def test_blocks_hold_the_cost_of_their_own_bytes(tokenizer):
    """Each token charged its own bytes: then every block must cost about its size."""
    held_out = hold_out(FakeSplit([TEXTS[3] * 8], tokenizer), tokenizer)
    found = measure(
        held_out, lambda documents: [held_out.token_bytes[tokens].astype(float) for tokens in documents]
    )
    assert np.abs(found.unit_nats - found.unit_sizes).max() <= held_out.token_bytes.max()
    assert found.bits_per_byte == pytest.approx(1 / math.log(2))


def test_many_documents_are_the_units_themselves(tokenizer):
    texts = [f"{TEXTS[number % 5]} {number}" for number in range(FEWEST_DOCUMENTS)]
    held_out = hold_out(FakeSplit(texts, tokenizer), tokenizer)
    found = measure(held_out, lambda documents: [np.ones(len(tokens)) for tokens in documents])
    assert "documents" in found.method
    np.testing.assert_array_equal(found.unit_nats, found.nats)


def test_other_tokenizers_read_the_text_again(tokenizer):
    split, other = FakeSplit(TEXTS, tokenizer), train_tokenizer(iter(TEXTS), 262)
    held_out = hold_out(split, other, encode=True)
    assert [list(tokens[:-1]) for tokens in held_out.tokens] == [other.encode(text) for text in TEXTS]
    assert all(tokens[-1] == other.end_of_document for tokens in held_out.tokens)
    assert held_out.digest == hold_out(split, tokenizer).digest


def test_the_digest_names_the_texts(tokenizer):
    def digest(texts, numbers=None):
        return hold_out(FakeSplit(texts, tokenizer), tokenizer, numbers).digest

    assert digest(TEXTS) == digest(list(TEXTS))
    assert digest(TEXTS) != digest(TEXTS[::-1])
    assert digest(TEXTS) != digest([*TEXTS[:-1], TEXTS[-1] + " "])
    assert digest(TEXTS, [0, 2]) == digest([TEXTS[0], TEXTS[2]])
    assert digest(["ab", "c"]) != digest(["a", "bc"])


def test_refusals(tokenizer):
    with pytest.raises(InputError, match="no text to measure on"):
        hold_out(FakeSplit([], tokenizer), tokenizer)
    for stride in (0, 17):
        with pytest.raises(InputError, match=f"stride is {stride}"):
            model_score(random_model(280), 0, stride=stride)


def test_resampling_is_seeded_and_paired():
    values = np.random.default_rng(0).random((2, 50))
    once, again = resample(values, seed=1, draws=300), resample(values, seed=1, draws=300)
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, resample(values, seed=2, draws=300))
    np.testing.assert_allclose(
        resample(np.stack([values[0], values[0] + 1]), seed=1, draws=300)[1], once[0] + 50
    )
    assert once.mean(1) == pytest.approx(values.sum(1), rel=0.02)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """400 sets of 40 documents of uneven size, true ratio 2: 95 % of intervals should hold it; 4 standard errors off
    would be below 90.6 or above 99.4 %."""
    random, covered = np.random.default_rng(5), 0
    for trial in range(400):
        sizes = random.lognormal(5, 0.7, 40)
        costs = sizes * (2 + 0.3 * random.standard_normal(40))
        low, high = ratio_interval(costs, sizes, seed=trial, draws=500)
        covered += low <= 2 <= high
    assert 0.906 < covered / 400 < 0.994


def test_one_unit_has_no_interval():
    assert ratio_interval(np.ones(1), np.ones(1), seed=0, draws=10) == (-math.inf, math.inf)


def test_a_wide_vocabulary_is_scored_in_parts(monkeypatch, tokenizer):
    """No more rows of logits at once than allowed, and the same figures."""
    model, documents = random_model(tokenizer.vocab_size), [np.arange(40) % 200, np.arange(7)]
    whole = model_score(model, 0)(documents)
    monkeypatch.setattr("glasshouse.evaluation.perplexity.LOGIT_ROWS", 5)
    rows = []

    class Watched:
        config, output_weight = model.config, model.output_weight

        def __call__(self, tokens):
            return model(tokens)

        def logits(self, hidden):
            rows.append(len(hidden))
            return model.logits(hidden)

    parts = model_score(Watched(), 0)(documents)
    assert max(rows) == 5
    for left, right in zip(whole, parts, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5)
