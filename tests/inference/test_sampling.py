"""Logit rules against slow ones written from their definitions, and against transformers' processors."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.errors import InputError
from glasshouse.inference.sampling import (
    GenerationConfig,
    apply_rules,
    choose,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    logit_rules,
    penalize_repetition,
    scale_temperature,
)

NOTHING = torch.zeros(0, dtype=torch.int64)
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40)


def kept(logits):
    return set(torch.nonzero(torch.isfinite(logits)).flatten().tolist())


def softmax(values):
    largest = max(values)
    weights = [math.exp(value - largest) for value in values]
    return [weight / sum(weights) for weight in weights]


@settings(max_examples=150, deadline=None)
@given(LOGITS, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(values, mass):
    logits = torch.tensor(values)
    found = kept(keep_top_p(mass)(NOTHING, logits))
    probabilities = softmax(values)
    inside = [probabilities[index] for index in found]
    # Rounding decides at the border itself, so the set is checked within a hair of it.
    assert found
    assert sum(inside) >= mass - 1e-5
    assert sum(inside) - min(inside) < mass + 1e-5
    outside = [probability for index, probability in enumerate(probabilities) if index not in found]
    assert not outside or max(outside) <= min(inside) + 1e-9


@settings(max_examples=150, deadline=None)
@given(LOGITS, st.floats(0.01, 1.0))
def test_min_p_keeps_tokens_near_the_likeliest(values, fraction):
    probabilities = softmax(values)
    found = kept(keep_min_p(fraction)(NOTHING, torch.tensor(values)))
    for index, probability in enumerate(probabilities):
        ratio = probability / max(probabilities)
        if abs(ratio - fraction) > 1e-5 * fraction:
            assert (index in found) == (ratio > fraction)
    assert probabilities.index(max(probabilities)) in found


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.integers(1, 50))
def test_top_k_keeps_the_largest_and_their_equals(values, count):
    found = kept(keep_top_k(count)(NOTHING, torch.tensor(values)))
    last = sorted(values, reverse=True)[min(count, len(values)) - 1]
    assert found == {index for index, value in enumerate(values) if value >= last}


def test_penalty_counts_a_token_once():
    logits = torch.tensor([2.0, -2.0, 4.0, -4.0])
    tokens = torch.tensor([0, 1, 1, 0, 0])
    assert penalize_repetition(2.0)(tokens, logits).tolist() == [1.0, -4.0, 4.0, -4.0]
    assert logits.tolist() == [2.0, -2.0, 4.0, -4.0]


def test_no_temperature_overflows():
    logits = torch.tensor([60.0, 70.0, 50.0])
    assert scale_temperature(1e-38)(NOTHING, logits).softmax(-1).tolist() == [0.0, 1.0, 0.0]
    assert scale_temperature(1e30)(NOTHING, logits).softmax(-1).tolist() == pytest.approx([1 / 3] * 3)


def test_rules_that_change_nothing_are_left_out():
    assert logit_rules(GenerationConfig(1.0)) == []
    assert len(logit_rules(GenerationConfig(0.5, 3, 0.5, 0.1, 1.1))) == 5
    assert len(logit_rules(GenerationConfig(0, 3, 0.5, 0.1, 1.1))) == 1


def test_greedy_takes_the_likeliest_after_the_penalty():
    config = GenerationConfig(temperature=0, repetition_penalty=3.0)
    logits = apply_rules(logit_rules(config), torch.tensor([1]), torch.tensor([1.0, 2.0, 0.5]))
    assert choose(logits, config, torch.Generator()) == 0


def test_draws_follow_the_probabilities():
    logits, generator = torch.tensor([0.0, 1.0, float("-inf"), 2.0, -3.0]), torch.Generator().manual_seed(0)
    drawn = np.bincount([draw(logits, generator) for _ in range(20_000)], minlength=5) / 20_000
    assert drawn[2] == 0
    assert np.abs(drawn - logits.softmax(-1).numpy()).max() < 0.01


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_draw_never_give_a_forbidden_token(monkeypatch, uniform):
    monkeypatch.setattr(torch, "rand", lambda *size, **rest: torch.full(size, uniform, dtype=torch.float64))
    logits = torch.tensor([float("-inf"), 0.3, 0.1, -0.7, float("-inf")])
    assert draw(logits, torch.Generator()) == (1 if uniform == 0 else 3)


def test_seed_decides():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))

    def sequence(seed):
        generator = torch.Generator().manual_seed(seed)
        return [draw(logits, generator) for _ in range(30)]

    assert sequence(1) == sequence(1)
    assert sequence(1) != sequence(2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "1"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"min_p": -0.01},
        {"min_p": 1.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": math.inf},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 0.5},
        {"max_new_tokens": 0},
        {"stop": "word"},
        {"stop": ("",)},
        {"stop": (1,)},
    ],
)
def test_every_number_is_checked(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        GenerationConfig(**wrong)


def test_the_borders_themselves_are_allowed():
    GenerationConfig(0, 0, 1.0, 0.0, 1.0, 2**63 - 1)
    GenerationConfig(0.0, 10**9, 1e-9, 1.0, 1e-3, 0)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the oracle is not installed")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("seed", range(8))
def test_same_as_transformers(seed):
    from transformers.generation import logits_process as oracle  # a slow import: only here

    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 200, (1, 30), generator=random)
    logits = 4 * torch.randn(1, 200, generator=random)
    config = GenerationConfig(
        0.3 + 0.2 * seed, 5 + 9 * seed, 0.99 - 0.1 * seed, 0.02 * seed, 1 + 0.1 * (seed + 1)
    )
    expected = logits
    for processor in (
        oracle.RepetitionPenaltyLogitsProcessor(config.repetition_penalty),
        oracle.TemperatureLogitsWarper(config.temperature),
        oracle.TopKLogitsWarper(config.top_k),
        oracle.TopPLogitsWarper(config.top_p),
        oracle.MinPLogitsWarper(config.min_p),
    ):
        expected = processor(tokens, expected)
    found = apply_rules(logit_rules(config), tokens, logits)
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), atol=1e-6, rtol=1e-5)
    assert torch.equal(torch.isfinite(found), torch.isfinite(expected))
