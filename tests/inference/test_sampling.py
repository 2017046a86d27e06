"""Logit rules against slow ones written from their definitions, and against transformers' processors."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.errors import InputError
from glasshouse.inference import sampling
from glasshouse.inference.sampling import (
    BIAS_BOUNDS,
    BOUNDS,
    LONGEST_STOP,
    MOST_BIASES,
    MOST_STOPS,
    GenerationConfig,
    add_bias,
    apply_rules,
    choose,
    draw,
    expand,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    logit_rules,
    make_sampler,
    penalize_occurrence,
    penalize_repetition,
    rank_answers,
    require_tokens,
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
    assert len(logit_rules(GenerationConfig(1.0, presence_penalty=1, logit_bias={1: 1.0}))) == 2
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
        {"temperature": 1e308},
        {"temperature": 100.5},
        {"top_k": 2**31},
        {"top_k": -5},
        {"max_new_tokens": 10**9},
        {"seed": 2**80},
        {"seed": 10**5000},
        {"presence_penalty": 2.1},
        {"presence_penalty": math.nan},
        {"frequency_penalty": -2.1},
        {"frequency_penalty": "0"},
        {"n": 0},
        {"n": 10**6},
        {"n": 2.0},
        {"best_of": 0},
        {"best_of": 65},
        {"best_of": 2, "n": 3},
        {"logit_bias": {5: 101}},
        {"logit_bias": {5: math.nan}},
        {"logit_bias": {-1: 1}},
        {"logit_bias": {"5": 1}},
        {"logit_bias": {True: 1}},
        {"logit_bias": [(5, 1)]},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        {"stop": ("a",) * 65},
        {"stop": ("a" * 1025,)},
        {"stop": {"a": 1}},
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
    for name, bounds in BOUNDS.items():
        GenerationConfig(**{name: int(bounds.high) if bounds.whole else bounds.high})
        if not bounds.above:
            GenerationConfig(**{name: int(bounds.low) if bounds.whole else bounds.low})
    for edge in (BIAS_BOUNDS.low, BIAS_BOUNDS.high):
        GenerationConfig(logit_bias=dict.fromkeys(range(MOST_BIASES), edge))
    GenerationConfig(stop=("a" * LONGEST_STOP,) * MOST_STOPS)


@pytest.mark.parametrize("wrong", [{"seed": 10**5000}, {"stop": ("a" * 10**6,)}, {"logit_bias": "x" * 10**6}])
def test_a_refusal_stays_short(wrong):
    with pytest.raises(InputError) as refusal:
        GenerationConfig(**wrong)
    assert len(str(refusal.value)) < 200


def test_every_number_of_a_config_has_bounds():
    numbers = {
        name for name, kind in GenerationConfig.__annotations__.items() if kind in (int, float, int | None)
    }
    assert numbers == set(BOUNDS)


def test_a_bias_for_no_token_is_refused():
    require_tokens(GenerationConfig(logit_bias={299: 1.0}), 300)
    with pytest.raises(InputError, match="token 300 in a vocabulary of 300"):
        require_tokens(GenerationConfig(logit_bias={3: 1.0, 300: 1.0}), 300)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 30), st.floats(-2, 2), st.floats(-2, 2))
def test_occurrences_are_counted_in_the_answer_alone(tokens, prompt_length, presence, frequency):
    logits = torch.arange(10.0) - 4
    found = penalize_occurrence(presence, frequency, prompt_length)(
        torch.tensor(tokens, dtype=torch.int64), logits
    )
    answer = tokens[prompt_length:]
    for token in range(10):
        count = answer.count(token)
        expected = token - 4 - frequency * count - presence * (1 if count else 0)
        assert float(found[token]) == pytest.approx(expected, abs=1e-5)


def test_bias_adds():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, float("-inf"), 5.0]])
    expected = [[1.0, 102.0, 2.5], [0.0, float("-inf"), 4.5]]
    assert add_bias({1: 100, 2: -0.5})(NOTHING, logits).tolist() == expected


def test_a_large_bias_decides():
    config = GenerationConfig(1.0, logit_bias={3: 100, 1: -100})
    sampler = make_sampler(config, 0)
    assert {int(sampler.choose(NOTHING, torch.tensor([5.0, 30.0, 1.0, 2.0]))) for _ in range(50)} == {3}


def mixed_batch(rows):
    """Requests of every kind in turn, with logits and texts of their own."""
    random = torch.Generator().manual_seed(5)
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8, "presence_penalty": 1.0},
        {"temperature": 0, "repetition_penalty": 2.0},
        {"temperature": 1.5, "top_k": 9, "logit_bias": {3: 4.0}},
    ]
    configs = [GenerationConfig(seed=row, **kinds[row % len(kinds)]) for row in range(rows)]
    texts = [torch.randint(0, 50, (row + 3,), generator=random) for row in range(rows)]
    allowed = [torch.rand(50, generator=random) < 0.5 if row % 3 == 2 else None for row in range(rows)]
    return 3 * torch.randn(8, rows, 50, generator=random), configs, texts, allowed


def test_an_answer_draws_for_itself_whatever_is_drawn_beside_it():
    logits, configs, texts, allowed = mixed_batch(15)
    samplers = [make_sampler(config, 2) for config in configs]
    together = [
        [
            int(one.choose(text, row, mask))
            for one, text, row, mask in zip(samplers, texts, step, allowed, strict=True)
        ]
        for step in logits
    ]
    for row, config in enumerate(configs):
        alone = make_sampler(config, 2)
        found = [int(alone.choose(texts[row], step[row], allowed[row])) for step in logits]
        assert found == [step[row] for step in together]
    assert len(set(map(tuple, together))) == len(logits)
    for step in together:
        assert all(mask is None or mask[token] for token, mask in zip(step, allowed, strict=True))


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9, 0.999, 1 - 1e-7])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
def test_top_p_of_a_large_vocabulary_is_that_of_sorting_all(monkeypatch, mass, spread):
    """Flat distributions need more than the head; with many equal logits the first of them stay."""
    logits = torch.round(
        spread * torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)), decimals=1
    )
    found = keep_top_p(mass)(NOTHING, logits)
    monkeypatch.setattr(sampling, "NUCLEUS", 5000)
    assert torch.equal(found, keep_top_p(mass)(NOTHING, logits))
    chances, order = torch.sort(logits.double().softmax(-1), descending=True, stable=True)
    dropped = chances.cumsum(-1) - chances >= mass
    expected = torch.zeros_like(dropped).scatter_(-1, order, dropped)
    # Rounding decides at the border itself: a token there more or less, or some that have next to no probability.
    differing = logits.double().softmax(-1) * (torch.isinf(found) != expected)
    border = chances.masked_fill(dropped, 1.0).amin(-1)
    assert (differing.sum(-1) <= 1.01 * border + 2e-6).all()


def test_more_answers_do_not_change_the_first():
    config = GenerationConfig(0.9, seed=7, n=3, top_k=4)
    answers = expand(config)
    assert answers[0] == GenerationConfig(0.9, seed=7, top_k=4)
    assert len({answer.seed for answer in answers}) == 3
    more = expand(GenerationConfig(0.9, seed=7, n=3, best_of=5, top_k=4))
    assert more[:3] == answers
    assert len(more) == 5
    assert not {answer.seed for answer in expand(GenerationConfig(seed=8, n=9))} & {
        answer.seed for answer in more
    }


def test_answers_are_ranked_by_mean_log_probability():
    probabilities = [[0.5, 0.5], [0.9], [0.9, 0.9, 0.2], [0.5], [0.0, 1.0]]
    means = [sum(map(math.log, one)) / len(one) for one in probabilities[:4]]
    assert rank_answers(probabilities, 5) == [1, 2, 0, 3, 4]
    assert means[1] > means[2] > means[0] == means[3]
    assert rank_answers(probabilities, 2) == [1, 2]


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="the oracle is not installed")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("seed", range(8))
def test_same_as_transformers(seed):
    from transformers.generation import logits_process as oracle  # a slow import: only here

    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 200, (1, 30), generator=random)
    logits = 4 * torch.randn(1, 200, generator=random)
    bias = {int(token): float(4 * seed - 9) for token in torch.randint(0, 200, (5,), generator=random)}
    config = GenerationConfig(
        0.3 + 0.2 * seed,
        5 + 9 * seed,
        0.99 - 0.1 * seed,
        0.02 * seed,
        1 + 0.1 * (seed + 1),
        logit_bias=bias,
    )
    expected = logits
    for processor in (
        oracle.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
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
