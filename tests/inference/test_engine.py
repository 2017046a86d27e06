"""The engine: cached decoding is full recomputation, text comes whole, and it stops where it should."""

import gc
import math
import random
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.errors import InputError
from glasshouse.inference.engine import Engine, EngineThread, generate
from glasshouse.inference.request import EngineSettings, QueueFull, Request, StopFilter
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.text.tokenizer import train_tokenizer

TEXT = "The cat sat on the mat. 猫坐在垫子上。🙂 The dog ran to the cat, and the cat ran away. 狗跑了。\n"
GREEDY = GenerationConfig(temperature=0, max_new_tokens=24)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter([TEXT] * 4), 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return random_model(tokenizer.vocab_size)


def random_model(vocab_size, context_length=64):
    model = Decoder(DecoderConfig(vocab_size, 32, 2, 4, 2, 8, 48, context_length, tie_embeddings=False))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random) + (parameter.dim() == 1))
    return model.eval()


class ScriptedModel(Decoder):
    """Says given tokens, whatever it reads, and counts what it was fed."""

    def __init__(self, script, vocab_size, prompt_length=1):
        super().__init__(DecoderConfig(vocab_size, 8, 1, 1, 1, 8, 8, 1000))
        self.script, self.prompt_length, self.fed = script, prompt_length, []

    def forward(self, tokens, *, positions=None, documents=None, cache=None, tap=None):
        super().forward(tokens, positions=positions, cache=cache)
        self.fed.append(positions[0].tolist())
        return (positions[..., None] + 1.0 - self.prompt_length).expand(*tokens.shape, 8)

    def logits(self, hidden):
        places = hidden[..., 0].long().clamp(0, len(self.script) - 1)
        return 50.0 * torch.nn.functional.one_hot(torch.tensor(self.script)[places], self.config.vocab_size)


def scripted(tokenizer, script, **config):
    model = ScriptedModel([*script, tokenizer.end_of_document], tokenizer.vocab_size)
    return list(generate(model, tokenizer, [0], GenerationConfig(**{"temperature": 0, **config})))


def test_greedy_is_full_recomputation(model, tokenizer):
    prompt = tokenizer.encode("The cat")
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(24):
            tokens.append(int(model.logits(model(torch.tensor([tokens])))[0, -1].argmax()))
    found = [token.id for token in generate(model, tokenizer, prompt, GREEDY)]
    assert found == tokens[len(prompt) :][: len(found)]
    assert len(set(found)) > 3
    assert len(found) == 24 or found[-1] == tokenizer.end_of_document


def test_the_prompt_is_read_once_and_each_token_once(tokenizer):
    model = ScriptedModel([5, 6, 7, tokenizer.end_of_document], tokenizer.vocab_size, prompt_length=9)
    assert [token.id for token in generate(model, tokenizer, range(9), GREEDY)][:3] == [5, 6, 7]
    assert [max(positions) for positions in model.fed] == [
        8,
        9,
        10,
        11,
    ]  # shorter passes are padded with position 0
    assert [sum(place > 0 for place in positions) for positions in model.fed] == [8, 1, 1, 1]


def test_odds_are_the_models_own_whatever_the_rules(model, tokenizer):
    prompt = tokenizer.encode("The dog")
    config = GenerationConfig(0.5, top_k=5, repetition_penalty=1.5, seed=4, max_new_tokens=10)
    tokens = list(prompt)
    for token in generate(model, tokenizer, prompt, config, alternatives=3):
        with torch.inference_mode():
            expected = model.logits(model(torch.tensor([tokens])))[0, -1].softmax(-1)
        assert token.probability == pytest.approx(float(expected[token.id]), rel=1e-4)
        assert token.rank == 1 + int((expected > expected[token.id]).sum())
        assert token.entropy == pytest.approx(float(-(expected * expected.log()).sum()), rel=1e-4)
        top = expected.topk(3)
        assert [alternative.id for alternative in token.alternatives] == top.indices.tolist()
        assert [alternative.probability for alternative in token.alternatives] == pytest.approx(
            top.values.tolist(), rel=1e-4
        )
        shown = [alternative.text for alternative in token.alternatives]
        assert shown == [tokenizer.decode([i], keep_special=True) for i in top.indices.tolist()]
        tokens.append(token.id)


def test_same_seed_same_text(model, tokenizer):
    def ids(seed):
        config = GenerationConfig(1.0, seed=seed, max_new_tokens=20)
        return [token.id for token in generate(model, tokenizer, [5], config)]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)
    one, other = (
        generate(model, tokenizer, [5], GenerationConfig(1.0, seed=1, max_new_tokens=20)) for _ in "ab"
    )
    assert [(next(one).id, next(other).id) for _ in range(5)] == [
        (i, i) for i in ids(1)[:5]
    ]  # no shared state


@pytest.mark.parametrize("seed", range(6))
def test_pieces_joined_are_the_decoded_text(model, tokenizer, seed):
    """A random model writes bytes that are often no characters: the pieces must still be what `decode` says."""
    config = GenerationConfig(1.5, seed=seed, max_new_tokens=40)
    tokens = list(generate(model, tokenizer, [7], config))
    assert "".join(token.text for token in tokens) == tokenizer.decode([token.id for token in tokens])


def test_no_piece_holds_half_a_character(tokenizer):
    text = "垫子 🙂🙃 éa"
    script = [token for byte in text.encode() for token in tokenizer.encode_bytes(bytes([byte]))]
    pieces = [token.text for token in scripted(tokenizer, script)]
    assert "".join(pieces) == text
    assert len(script) == len(text.encode())
    assert sorted(filter(None, pieces)) == sorted(text)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("sat on",), "The cat "),
        (("。",), "The cat sat on the mat. 猫坐在垫子上"),
        (("子上。🙂 T",), "The cat sat on the mat. 猫坐在垫"),
        (("🙂",), "The cat sat on the mat. 猫坐在垫子上。"),
        (("dog", "mat."), "The cat sat on the "),
        (("The cat",), ""),
        (("nowhere", "🙃"), TEXT),
        (("\n",), TEXT[:-1]),
        ((TEXT + "more",), TEXT),
    ],
)
@pytest.mark.parametrize("by_byte", [False, True])
def test_stop_strings_across_tokens(tokenizer, stop, expected, by_byte):
    pieces = [bytes([byte]) for byte in TEXT.encode()] if by_byte else [TEXT.encode()]
    script = [token for piece in pieces for token in tokenizer.encode_bytes(piece)]
    tokens = scripted(tokenizer, script, stop=stop)
    assert "".join(token.text for token in tokens) == expected
    assert tokens[-1].finish == ("end" if expected == TEXT else "stop")
    assert all(not token.finish for token in tokens[:-1])


PIECES = st.lists(st.text("ab停🙂", max_size=3), max_size=12)
STOPS = st.lists(st.text("ab停🙂", min_size=1, max_size=5), max_size=3)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab停🙂", max_size=3), max_size=12),
    st.lists(st.text("ab停🙂", min_size=1, max_size=5), max_size=3),
)
def test_stop_filter_is_a_search_in_the_whole_text(pieces, stops):
    places: list[int] = []
    found, so_far, stop_filter = "", "", StopFilter(stops)
    for piece in pieces:
        found += stop_filter.push(piece)
        so_far += piece
        places = [place for place in map(so_far.find, stops) if place >= 0]
        if stop_filter.stopped:
            break  # as soon as one of them is complete, even where a longer one began before it
        # Nothing is held that could not still become a stop string.
        held = so_far[len(found) :]
        assert so_far == found + held
        assert not held or any(stop.startswith(held) for stop in stops)
    else:
        found += stop_filter.flush()
    assert stop_filter.stopped == bool(places)
    assert found == so_far[: min(places, default=len(so_far))]


def test_an_unfinished_character_is_shown_at_the_end(tokenizer):
    script = tokenizer.encode_bytes("ok 🙂".encode()[:-1])
    model = ScriptedModel(script, tokenizer.vocab_size)
    config = GenerationConfig(0, max_new_tokens=len(script))
    tokens = list(generate(model, tokenizer, [0], config))
    assert "".join(token.text for token in tokens) == "ok \ufffd"
    assert tokens[-1].finish == "length"


def test_text_held_for_a_stop_string_comes_at_the_end(tokenizer):
    tokens = scripted(tokenizer, tokenizer.encode("ran aw"), stop=("away",))
    assert "".join(token.text for token in tokens) == "ran aw"
    assert tokens[-1].text.endswith("aw")
    assert tokens[-1].finish == "end"


def test_the_end_of_a_document_ends_and_shows_nothing(tokenizer):
    tokens = scripted(tokenizer, tokenizer.encode("cat"))
    assert tokens[-1].id == tokenizer.end_of_document
    assert (tokens[-1].text, tokens[-1].finish) == ("", "end")
    assert "".join(token.text for token in tokens) == "cat"


def test_other_end_tokens(tokenizer):
    end = tokenizer.special["<|im_end|>"]
    model = ScriptedModel([5, end, 6], tokenizer.vocab_size)
    tokens = list(generate(model, tokenizer, [0], GREEDY, end_tokens=[end]))
    assert [token.id for token in tokens] == [5, end]
    assert tokens[-1].finish == "end"


def test_lengths(model, tokenizer):
    def finish(prompt_length, new):
        config = GenerationConfig(1.0, max_new_tokens=new, seed=11)
        tokens = list(generate(model, tokenizer, [9] * prompt_length, config))
        return len(tokens), tokens[-1].finish

    assert finish(3, 5) == (5, "length")
    assert finish(63, 5) == (1, "length")
    assert finish(60, 100) == (4, "length")


def test_an_empty_prompt_is_the_start_of_a_document(model, tokenizer):
    empty = [token.id for token in generate(model, tokenizer, [], GREEDY)]
    explicit = [token.id for token in generate(model, tokenizer, [tokenizer.end_of_document], GREEDY)]
    assert empty == explicit


def test_rows_of_the_embedding_that_are_no_tokens_never_come(tokenizer):
    padded = random_model(tokenizer.vocab_size + 200)
    config = GenerationConfig(50.0, max_new_tokens=60)  # nearly uniform
    ids = [token.id for token in generate(padded, tokenizer, [5], config)]
    assert max(ids) < tokenizer.vocab_size


def test_refusals_come_before_anything_is_generated(model, tokenizer):
    with pytest.raises(InputError, match=r"prompt has 64 tokens and the model reads at most 64"):
        generate(model, tokenizer, [5] * 64, GREEDY)
    with pytest.raises(InputError, match="token 300 in a vocabulary of 300"):
        generate(model, tokenizer, [5, 300], GREEDY)
    with pytest.raises(InputError, match="vocabulary"):
        generate(model, tokenizer, [-1], GREEDY)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_refused(tokenizer, temperature, value):
    broken = random_model(tokenizer.vocab_size)
    with torch.no_grad():
        broken.norm.weight.fill_(value)
    with pytest.raises(InputError, match="not finite"):
        list(generate(broken, tokenizer, [5], GenerationConfig(temperature)))


# ---- many requests at once


def mixed_requests(count, seed=0, context=200, guessing=False):
    """Requests of all kinds; half of them begin alike, and guesses are sometimes right."""
    draw = random.Random(seed)
    beginning = [draw.randrange(5, 290) for _ in range(100)]
    requests = []
    for number in range(count):
        shared = beginning[: draw.choice([0, 16, 40, 90])]
        prompt = (*shared, *(draw.randrange(5, 290) for _ in range(draw.choice([1, 5, 17, 40]))))
        config = GenerationConfig(
            draw.choice([0, 1.0]), seed=number, max_new_tokens=draw.randint(1, 40), top_k=draw.choice([0, 20]),
            repetition_penalty=draw.choice([1, 1.3]),
        )  # fmt: skip
        propose = (lambda tokens: [tokens[-1], tokens[-1], tokens[-2]]) if guessing and number % 2 else None
        requests.append(Request(prompt, config, alternatives=number % 3, propose=propose))
    return requests


def one_by_one(model, tokenizer, requests, **settings):
    """Each alone in an engine of its own."""
    settings = EngineSettings(**{"max_batch": 16, **settings})
    return [Engine(model, tokenizer, settings).complete([request])[0] for request in requests]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def large(request, tokenizer):
    """A model with room for longer texts, and what 17 requests get from it alone."""
    model = random_model(tokenizer.vocab_size, 256).to(getattr(torch, request.param))
    requests = mixed_requests(17)
    return model, requests, one_by_one(model, tokenizer, requests)


def test_company_changes_nothing(large, tokenizer):
    """Every token with its odds and alternatives, to the last bit, alone and among sixteen others."""
    model, requests, alone = large
    engine = Engine(model, tokenizer, EngineSettings(max_batch=16))
    assert engine.complete(requests) == alone
    assert engine.statistics.preemptions == 0
    assert any(len(tokens) > 10 for tokens in alone)


def test_reuse_changes_nothing(large, tokenizer):
    model, requests, alone = large
    engine = Engine(model, tokenizer, EngineSettings(max_batch=4))
    assert engine.complete(requests) == alone
    assert engine.statistics.reused_tokens > 100
    before = engine.statistics
    assert engine.complete(requests) == alone
    assert engine.statistics.prompt_tokens - before.prompt_tokens < before.prompt_tokens
    without = Engine(model, tokenizer, EngineSettings(max_batch=4, reuse=False))
    assert without.complete(requests) == alone
    assert without.statistics.reused_tokens == 0


def test_what_was_put_aside_goes_on_as_if_it_had_not_been(large, tokenizer):
    """Twelve answers grow in a cache that holds three of them: some are read again several times."""
    model, _, _ = large
    requests = [
        Request(
            tuple(range(number, number + 20)), GenerationConfig(number % 3, seed=number, max_new_tokens=60)
        )
        for number in range(5, 17)
    ]
    alone = one_by_one(model, tokenizer, requests)
    engine = Engine(model, tokenizer, EngineSettings(max_batch=16, cache_tokens=240))
    assert engine.complete(requests) == alone
    assert engine.statistics.preemptions > 1
    assert engine.statistics.cache_blocks_used == 0
    guessing = [replace(request, propose=lambda tokens: tokens[-3:]) for request in requests]
    assert engine.complete(guessing) == alone


def test_guesses_change_nothing_but_the_number_of_steps(large, tokenizer):
    model, requests, alone = large
    engine = Engine(model, tokenizer, EngineSettings(max_batch=16))
    assert engine.complete(mixed_requests(17, guessing=True)) == alone
    told = {
        request.prompt: [token.id for token in tokens]
        for request, tokens in zip(requests, alone, strict=True)
    }

    def right(prompt):
        return lambda tokens: told[prompt][len(tokens) - len(prompt) :]

    steps = engine.statistics.steps
    knowing = [replace(request, propose=right(request.prompt)) for request in requests]
    assert engine.complete(knowing) == alone
    assert engine.statistics.accepted_tokens > 100
    assert engine.statistics.steps - steps < steps / 2


def test_a_guess_of_what_is_no_token_is_ignored(model, tokenizer):
    plain = Request((5, 6), GREEDY)
    for guess in ([10**9], [-1, 5], []):
        found = Engine(model, tokenizer).complete([replace(plain, propose=lambda tokens, guess=guess: guess)])
        assert found == Engine(model, tokenizer).complete([plain])


def test_odds_of_the_prompt(model, tokenizer):
    prompt = tuple(tokenizer.encode(TEXT)[:50])
    engine = Engine(model, tokenizer, EngineSettings(chunk=16))
    events = []
    ticket = engine.submit(Request(prompt, GenerationConfig(0, max_new_tokens=1), prompt_odds=2))
    while not engine.is_idle:
        events += engine.step()
    [event] = events
    assert event.ticket == ticket
    assert [token.id for token in event.prompt] == list(prompt)
    assert "".join(token.text for token in event.prompt) == tokenizer.decode(prompt, keep_special=True)
    assert math.isnan(event.prompt[0].probability)
    assert event.prompt[0].rank == 0
    with torch.inference_mode():
        expected = model.logits(model(torch.tensor([prompt])))[0, :-1].softmax(-1)
    for token, row in zip(event.prompt[1:], expected, strict=True):
        assert token.probability == pytest.approx(float(row[token.id]), rel=1e-3)
        assert token.rank == 1 + int((row > row[token.id]).sum())
        assert [other.id for other in token.alternatives] == row.topk(2).indices.tolist()


def test_cancelled_requests_free_their_place_at_once(model, tokenizer):
    engine = Engine(model, tokenizer, EngineSettings(max_batch=2))
    tickets = [engine.submit(Request((5, 6, number), GenerationConfig(1.0, seed=number, max_new_tokens=40)))
               for number in range(3)]  # fmt: skip
    engine.step()
    assert (engine.statistics.running, engine.statistics.queued) == (2, 1)
    engine.cancel(tickets[0])
    events = engine.step()
    assert {event.ticket for event in events} == {tickets[1], tickets[2]}
    engine.cancel(tickets[1])
    engine.cancel(tickets[2])
    engine.cancel(999)
    assert engine.step() == []
    assert engine.is_idle
    assert engine.statistics.cache_blocks_used == 0


def test_a_hundred_streams_of_which_half_are_left_leave_nothing_behind(model, tokenizer):
    engine, draw = (
        Engine(model, tokenizer, EngineSettings(max_batch=32, cache_tokens=1024, chunk=256)),
        random.Random(1),
    )
    living = []
    for number in range(10):
        tickets = [engine.submit(replace(request, prompt=request.prompt[:20]))
                   for request in mixed_requests(100, seed=number)]  # fmt: skip
        left = set(draw.sample(tickets, 50))
        heard = set()
        while not engine.is_idle:
            for ticket in [ticket for ticket in left if draw.random() < 0.3]:
                engine.cancel(ticket)
                left.remove(ticket)
                heard.add(ticket)
            assert not {event.ticket for event in engine.step()} & heard
        assert engine.statistics.cache_blocks_used == 0
        gc.collect()
        living.append(len(gc.get_objects()))
    assert living[-1] <= living[1] + 200


def test_streams_may_be_read_in_turns_and_left(model, tokenizer):
    engine = Engine(model, tokenizer)
    requests = [
        Request((number + 5,), GenerationConfig(1.0, seed=number, max_new_tokens=12)) for number in range(3)
    ]
    alone = one_by_one(model, tokenizer, requests)
    one, other, third = (engine.stream(request) for request in requests)
    assert [next(third)] == alone[2][:1]
    third.close()
    assert next(one) == alone[0][0]
    assert list(other) == alone[1]
    assert list(one) == alone[0][1:]
    assert engine.step() == []
    assert engine.is_idle


# ---- faults


class Broken:
    """A constraint that allows everything until it raises."""

    def __init__(self, vocab_size, after):
        self.left, self.everything = after, torch.ones(vocab_size, dtype=torch.bool)

    def allowed(self):
        return self.everything

    def advance(self, token):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("broken")


def raise_error(tokens):
    raise RuntimeError("broken")


def run(engine):
    """All that happens until nothing is left: tokens and error of each ticket."""
    tokens, errors = {}, {}
    while not engine.is_idle:
        for event in engine.step():
            if event.token is None:
                errors[event.ticket] = event.error
            else:
                tokens.setdefault(event.ticket, []).append(event.token)
    return tokens, errors


@pytest.mark.parametrize("fault", ["constraint", "guess", "numbers"])
def test_a_fault_in_one_request_fails_that_request_alone(tokenizer, fault):
    model = random_model(tokenizer.vocab_size, 256)
    config = GenerationConfig(1.0, max_new_tokens=15, logit_bias={299: -100})
    requests = [Request((5, number), replace(config, seed=number)) for number in range(10, 16)]
    alone = one_by_one(model, tokenizer, requests)
    with torch.no_grad():
        model.embedding.weight[299] = torch.nan  # whoever reads token 299 has numbers no more
    broken = {
        "constraint": lambda: Request((5, 6), GREEDY, constraint=Broken(tokenizer.vocab_size, 3)),
        "guess": lambda: Request((5, 6), GREEDY, propose=raise_error),
        "numbers": lambda: Request((5, 6, 299), GREEDY),
    }[fault]
    engine = Engine(model, tokenizer, EngineSettings(cache_tokens=256))
    for _ in range(3):  # the blocks of those that failed are used again
        good = [engine.submit(request) for request in requests[:3]]
        bad = engine.submit(broken())
        good += [engine.submit(request) for request in requests[3:]]
        tokens, errors = run(engine)
        assert [tokens[ticket] for ticket in good] == alone
        assert list(errors) == [bad]
        assert ("not finite" if fault == "numbers" else "broken") in str(errors[bad])
        assert engine.statistics.cache_blocks_used == 0


def test_a_pass_that_fails_is_repeated_one_by_one(tokenizer):
    class Refusing(Decoder):
        def forward(self, tokens, *, positions=None, documents=None, cache=None, tap=None):
            if (tokens == 299).any():
                raise RuntimeError("refused")
            return super().forward(tokens, positions=positions, cache=cache)

    model = random_model(tokenizer.vocab_size)
    refusing = Refusing(model.config).eval()
    refusing.load_state_dict(model.state_dict())
    requests = [Request((5, number), GenerationConfig(0, max_new_tokens=5)) for number in range(10, 14)]
    alone = one_by_one(model, tokenizer, requests)
    engine = Engine(refusing, tokenizer)
    bad = engine.submit(Request((299,), GREEDY))
    good = [engine.submit(request) for request in requests]
    tokens, errors = run(engine)
    assert [tokens[ticket] for ticket in good] == alone
    assert list(errors) == [bad]


def test_a_constraint_is_obeyed_and_told(model, tokenizer):
    class Alternating:
        def __init__(self):
            self.told = []

        def allowed(self):
            mask = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)
            mask[[20, 21] if len(self.told) % 2 else [30, 31]] = True
            return mask

        def advance(self, token):
            self.told.append(token)

    for temperature in (0, 1.0):
        plain, guessed = Alternating(), Alternating()
        config = GenerationConfig(temperature, max_new_tokens=8)
        engine = Engine(model, tokenizer)
        [tokens] = engine.complete([Request((5,), config, constraint=plain)])
        assert [token.id in ((20, 21) if place % 2 else (30, 31)) for place, token in enumerate(tokens)] == [
            True
        ] * 8
        assert plain.told == [token.id for token in tokens]
        told = list(plain.told)
        right = Request(
            (5,), config, constraint=guessed, propose=lambda text, told=told: told[len(text) - 1 :]
        )
        assert engine.complete([right]) == [tokens]
        assert guessed.told == told
        assert engine.statistics.accepted_tokens > 3


# ---- order


def test_first_come_first_served(model, tokenizer):
    engine = Engine(model, tokenizer, EngineSettings(max_batch=1))
    tickets = [engine.submit(Request((5, number), GenerationConfig(max_new_tokens=3))) for number in range(5)]
    order = []
    while not engine.is_idle:
        order += [event.ticket for event in engine.step() if event.is_last]
    assert order == tickets


def test_a_short_request_does_not_wait_for_a_long_prompt(tokenizer):
    model = random_model(tokenizer.vocab_size, 1024)
    engine = Engine(model, tokenizer, EngineSettings(chunk=16))
    long = engine.submit(Request(tuple(range(5, 205)) * 4, GenerationConfig(max_new_tokens=1)))
    writing = engine.submit(Request((5,), GenerationConfig(max_new_tokens=60)))
    for _ in range(3):
        engine.step()
    shorts = []
    for number in range(10):
        short = engine.submit(Request((7, number), GenerationConfig(max_new_tokens=1)))
        heard = [event.ticket for event in engine.step() + engine.step()]
        shorts.append(short in heard)
        assert heard.count(writing) == 2  # answers being written gain a token in every step
    assert all(shorts)
    before = engine.statistics.prompt_tokens
    for number in range(20):  # nor does a stream of short ones keep the long one waiting
        engine.submit(Request((7, number), GenerationConfig(max_new_tokens=1)))
        engine.step()
    assert engine.statistics.prompt_tokens - before >= 9 * 16
    assert long not in [event.ticket for event in engine.step()]


def test_the_queue_is_bounded(model, tokenizer):
    engine = Engine(model, tokenizer, EngineSettings(max_batch=2, max_queue=3))
    tickets = [engine.submit(Request((5,), GREEDY)) for _ in range(5)]
    with pytest.raises(QueueFull):
        engine.submit(Request((5,), GREEDY))
    engine.cancel(tickets[4])
    engine.step()
    engine.submit(Request((5,), GREEDY))
    assert len(engine.complete([Request((5,), GREEDY)] * 20)) == 20


def test_a_prompt_that_the_cache_cannot_hold_is_refused(model, tokenizer):
    engine = Engine(model, tokenizer, EngineSettings(cache_tokens=32))
    with pytest.raises(InputError, match="reads at most 32"):
        engine.submit(Request((5,) * 32, GREEDY))
    [tokens] = engine.complete([Request((5,) * 30, GenerationConfig(1.0, seed=2, max_new_tokens=30))])
    assert (len(tokens), tokens[-1].finish) == (2, "length")


@pytest.mark.parametrize("name", ["cache_tokens", "block_size", "max_batch", "chunk", "max_queue"])
def test_settings_out_of_range_are_refused(name):
    for value in (-1, 1.5, True):
        with pytest.raises(InputError, match=name):
            EngineSettings(**{name: value})


# ---- the thread


class Listener:
    def __init__(self, fail_at=None):
        self.events, self.done, self.fail_at = [], threading.Event(), fail_at

    def __call__(self, event):
        self.events.append(event)
        if event.is_last:
            self.done.set()
        if len(self.events) == self.fail_at:
            raise RuntimeError("a listener that breaks")

    @property
    def tokens(self):
        return [event.token for event in self.events]


def test_the_thread_answers_everyone(model, tokenizer):
    requests = mixed_requests(12)
    requests = [replace(request, prompt=request.prompt[:20]) for request in requests]
    alone = one_by_one(model, tokenizer, requests)
    thread = EngineThread(Engine(model, tokenizer, EngineSettings(max_batch=16)))
    thread.start()
    listeners, broken = [Listener() for _ in requests], Listener(fail_at=2)
    thread.submit(Request((5,), GenerationConfig(1.0, max_new_tokens=50)), broken)
    for request, listener in zip(requests, listeners, strict=True):
        thread.submit(request, listener)
    assert all(listener.done.wait(60) for listener in listeners)
    assert [listener.tokens for listener in listeners] == alone
    assert thread.stop(60)
    assert len(broken.events) == 2
    assert thread.engine.statistics.cache_blocks_used == 0
    with pytest.raises(QueueFull):
        thread.submit(requests[0], Listener())


def test_a_stopped_thread_tells_those_it_leaves(model, tokenizer):
    thread = EngineThread(Engine(model, tokenizer, EngineSettings(max_batch=1)))
    waiting, cancelled = Listener(), Listener()
    thread.submit(Request((5,), GREEDY), waiting)
    ticket = thread.submit(Request((5,), GREEDY), cancelled)
    thread.cancel(ticket)
    thread.start()
    assert waiting.done.wait(60)
    blocked = threading.Event()
    slow = Listener()

    def block(event):
        slow(event)
        blocked.wait(60)

    thread.submit(Request((5,), GenerationConfig(1.0, max_new_tokens=60)), block)
    threading.Timer(0.2, blocked.set).start()
    assert not thread.stop(0)
    assert isinstance(slow.events[-1].error, InputError) or slow.events[-1].token.finish
    assert cancelled.events == []


def test_a_thread_survives_an_engine_that_breaks(model, tokenizer):
    engine = Engine(model, tokenizer)
    thread, listener, next_one = EngineThread(engine), Listener(), Listener()
    step, engine.step = engine.step, lambda: raise_error(())
    thread.submit(Request((5,), GREEDY), listener)
    thread.start()
    assert listener.done.wait(60)
    assert "broken" in str(listener.events[-1].error)
    engine.step = step
    thread.submit(Request((5,), GREEDY), next_one)
    assert next_one.done.wait(60)
    assert next_one.tokens == one_by_one(model, tokenizer, [Request((5,), GREEDY)])[0]
    thread.stop(60)
