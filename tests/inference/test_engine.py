"""The engine: cached decoding is full recomputation, text comes whole, and it stops where it should."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.errors import InputError
from glasshouse.inference.engine import generate
from glasshouse.inference.request import StopFilter
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
