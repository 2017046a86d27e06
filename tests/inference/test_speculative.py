"""Guessing ahead: no text changes by it, guesses are what they say, and it is used only while it pays."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.errors import InputError
from glasshouse.inference.constrain import compile_constraint
from glasshouse.inference.engine import Engine
from glasshouse.inference.request import EngineSettings, Request
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.inference.speculative import DraftModel, PromptLookup, Worth, while_it_pays
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.text.tokenizer import train_tokenizer

TEXT = "The cat sat on the mat. 猫坐在垫子上。🙂 The dog ran to the cat, and the cat ran away. 狗跑了。\n"
TOKENIZER = train_tokenizer(iter([TEXT] * 4), 300)


def random_model(layers, seed=3, dtype=torch.float32):
    model = Decoder(DecoderConfig(310, 32, layers, 4, 2, 8, 48, 128, tie_embeddings=False))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def trained():
    """Two models that learned the same text, so that one can guess what the other writes."""
    ids = torch.tensor(TOKENIZER.encode(TEXT * 12))
    models = []
    for layers in (2, 1):
        torch.manual_seed(layers)
        model = Decoder(DecoderConfig(300, 32, layers, 4, 2, 8, 64, 128))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            starts = torch.randint(0, len(ids) - 33, (12,))
            window = torch.stack([ids[start : start + 33] for start in starts])
            logits = model.logits(model(window[:, :-1]))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        models.append(model.eval())
    return models


CONFIGS = [
    GenerationConfig(0, max_new_tokens=40),
    GenerationConfig(0, repetition_penalty=1.3, max_new_tokens=40),
    GenerationConfig(0.9, seed=5, max_new_tokens=40),
    GenerationConfig(1.2, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.2, seed=6, max_new_tokens=40),
    GenerationConfig(0.8, seed=7, max_new_tokens=40, stop=("cat", "。")),
]
PROMPTS = [TOKENIZER.encode(text) for text in ("The cat", TEXT, "狗", "The dog ran to the dog ran to the")]


def answers(model, proposers, configs=CONFIGS, constraint=None):
    """The answers of all prompts under all configs, at work together, each with a guesser of its own."""
    engine = Engine(model, TOKENIZER, EngineSettings(cache_tokens=4096, max_batch=5))
    requests = [
        Request(
            tuple(prompt), config, alternatives=2, propose=proposer, constraint=constraint and constraint()
        )
        for (prompt, config), proposer in zip(itertools.product(PROMPTS, configs), proposers, strict=False)
    ]
    found = engine.complete(requests)
    return found, engine.statistics


def wild_guesses(seed):
    """Anything: too long, too short, ids that are no tokens, and now and then what is likely."""
    chance = random.Random(seed)
    lookup = PromptLookup(3, 1, 5)

    def propose(tokens):
        kind = chance.random()
        if kind < 0.4:
            return lookup(tokens)
        if kind < 0.6:
            return []
        return [chance.randrange(-2, 330) for _ in range(chance.randrange(1, 30))]

    return propose


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_guess_changes_a_text(dtype):
    model = random_model(2, dtype=dtype)
    plain, _ = answers(model, itertools.repeat(None))
    guessed, statistics = answers(model, map(wild_guesses, itertools.count()))
    assert guessed == plain
    assert statistics.accepted_tokens > 0


def test_look_up_and_draft_model_of_a_trained_one_change_no_text_and_save_steps(trained):
    target, draft = trained
    plain, before = answers(target, itertools.repeat(None))
    looked, by_lookup = answers(target, (PromptLookup() for _ in itertools.count()))
    drafted, by_draft = answers(target, (DraftModel(draft, TOKENIZER.vocab_size) for _ in itertools.count()))
    assert looked == plain
    assert drafted == plain
    assert by_lookup.accepted_tokens > 0.1 * by_lookup.tokens
    assert by_draft.accepted_tokens > 0.4 * by_draft.tokens
    assert by_draft.steps < 0.8 * before.steps


def test_under_a_constraint(trained):
    target, draft = trained

    def constraint():
        return compile_constraint("regex", "(The (cat|dog) ){2,6}猫🙂", TOKENIZER)

    plain, _ = answers(target, itertools.repeat(None), constraint=constraint)
    drafted, _ = answers(
        target, (DraftModel(draft, TOKENIZER.vocab_size) for _ in itertools.count()), constraint=constraint
    )
    assert drafted == plain


# ---- guesses


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.integers(1, 12),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_look_up_is_a_search_for_the_latest_match(text, start, shortest, more):
    lookup = PromptLookup(shortest + more, shortest, 5)
    for end in range(min(start, len(text)), len(text) + 1):
        assert lookup(text[:end]) == slow_lookup(text[:end], shortest + more, shortest, 5)


def slow_lookup(tokens, longest, shortest, count):
    for length in range(longest, shortest - 1, -1):
        for place in range(len(tokens) - 1, length - 1, -1):
            if tokens[place - length : place] == tokens[len(tokens) - length :]:
                guess = list(tokens)
                for step in range(count):
                    guess.append(guess[place + step])
                return guess[len(tokens) :]
    return []


def test_a_draft_model_guesses_its_own_greedy_text_and_reads_each_token_once():
    model, fed = random_model(1), []
    reading = model.forward
    model.forward = lambda tokens, **rest: (fed.append(tokens.shape[1]), reading(tokens, **rest))[1]
    propose, text = DraftModel(model, 300, count=3), [5, 9, 7, 1, 4]
    chance = random.Random(1)
    for _ in range(8):
        expected = list(text)
        with torch.inference_mode():
            for _ in range(3):
                hidden = reading(torch.tensor([expected]))
                expected.append(int(model.logits(hidden)[0, -1, :300].argmax()))
        fed.clear()
        guess = propose(text)
        assert guess == expected[len(text) :]
        assert sum(fed) <= 3 + 2 or len(text) == 5  # what was right is not read again
        kept = chance.randrange(4)
        text += [*guess[:kept], chance.randrange(300)]


def test_a_draft_model_stops_where_its_context_ends():
    model = Decoder(DecoderConfig(300, 16, 1, 2, 1, 8, 16, 12)).eval()
    propose = DraftModel(model, 300, count=4)
    assert [len(propose(list(range(length)))) for length in (5, 8, 9, 10, 11, 12, 13, 20)] == [
        4,
        4,
        4,
        3,
        2,
        1,
        0,
        0,
    ]


def test_a_draft_model_with_another_vocabulary_is_refused():
    with pytest.raises(InputError, match="knows 200 tokens and the tokenizer has 300"):
        DraftModel(Decoder(DecoderConfig(200, 16, 1, 2, 1, 8, 16, 12)), 300)


# ---- whether it pays


class Machine:
    """An engine on paper: a plain step takes 1, one with a guess `cost`; each guessed token is right by `chance`."""

    def __init__(self, worth, chance=0.0, cost=1.0, asking=0.0):
        self.worth, self.chance, self.cost, self.asking = worth, chance, cost, asking
        self.time, self.asked, self.random = 0.0, 0, random.Random(0)

    def propose(self, tokens):
        self.asked += 1
        self.time += self.asking
        return [0] * 4

    def write(self, count):
        """The time that an answer of so many tokens takes, and the share of its steps that had a guess."""
        ask, tokens, began, asked, steps = (
            while_it_pays(self.propose, self.worth, lambda: self.time),
            [0],
            self.time,
            self.asked,
            0,
        )
        while len(tokens) <= count:
            guess = ask(tokens)
            right = 0
            while right < len(guess) and self.random.random() < self.chance:
                right += 1
            self.time += (self.cost if guess else 1.0) * self.random.uniform(0.9, 1.1)
            tokens += [0] * (right + 1)
            steps += 1
        return self.time - began, (self.asked - asked) / steps


def test_guessing_that_pays_is_kept():
    machine = Machine(Worth(), chance=0.8, cost=1.3)
    seconds, share = machine.write(2000)
    assert seconds < 0.55 * 2000
    assert share > 0.9
    assert machine.worth.gain > 1.8


@pytest.mark.parametrize(("chance", "cost", "asking"), [(0.0, 2.0, 0.0), (0.3, 1.6, 0.0), (0.8, 1.2, 3.0)])
def test_guessing_that_does_not_pay_is_stopped(chance, cost, asking):
    machine = Machine(Worth(), chance, cost, asking)
    seconds, share = machine.write(4000)
    assert seconds < 1.06 * 4000
    assert share < 0.05
    assert machine.worth.is_paused


def test_what_changes_is_noticed():
    machine = Machine(Worth(), chance=0.9, cost=1.3)
    machine.write(500)
    machine.chance = 0.0  # the next text repeats nothing
    seconds, _ = machine.write(2000)
    assert seconds < 1.1 * 2000
    machine.chance = 0.9
    seconds, share = machine.write(6000)
    assert seconds < 0.7 * 6000
    assert share > 0.5


def test_a_step_that_was_held_up_decides_nothing():
    machine = Machine(Worth(), chance=0.8, cost=1.3)
    machine.write(300)
    ask = while_it_pays(machine.propose, machine.worth, lambda: machine.time)
    ask([0])
    machine.time += 500.0
    ask([0, 0])
    assert not machine.worth.is_paused
    assert machine.worth.gain > 1.5


def test_what_one_answer_taught_serves_the_next():
    machine = Machine(Worth(), chance=0.0, cost=2.0)
    machine.write(100)
    before = machine.asked
    machine.write(20)
    assert machine.asked == before


def test_a_guesser_that_finds_nothing_is_no_guess():
    worth = Worth()
    clock = itertools.count()
    ask = while_it_pays(lambda tokens: [], worth, lambda: float(next(clock)))
    for length in range(1, 100):
        assert ask([0] * length) == []
    assert not worth.is_paused
    assert worth.gain == 1.0


def test_an_answer_that_pays_attention_only_while_it_pays_is_the_same(trained):
    target, _ = trained
    plain, _ = answers(target, itertools.repeat(None))
    worth = Worth()
    ticks = itertools.count()
    guessed, statistics = answers(
        target,
        (while_it_pays(PromptLookup(), worth, lambda: float(next(ticks))) for _ in itertools.count()),
    )
    assert guessed == plain
    assert statistics.accepted_tokens > 0
