"""What is explained is what the engine saw when it wrote: odds, lens and attention, whatever the tokenizer cuts."""

import pytest
import torch

from glasshouse.artifact import Artifact
from glasshouse.errors import InputError
from glasshouse.inference.engine import generate
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.interpret.attention import attention_patterns
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.serve import explain as module
from glasshouse.serve.explain import ExplainRequest, explain, explain_routes, request_tokens, token_texts
from glasshouse.text.tokenizer import train_tokenizer

TEXT = "The cat sat on the mat. 猫坐在垫子上。🙂 The dog ran to the cat, and the cat ran away. 狗跑了。\n"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    tokenizer = train_tokenizer(iter([TEXT] * 4), 300)
    config = DecoderConfig(tokenizer.vocab_size + 20, 32, 3, 4, 2, 8, 48, 96, tie_embeddings=False)
    model = Decoder(config)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random) + (parameter.dim() == 1))
    return Artifact(model.eval(), tokenizer, config, {}, tmp_path_factory.mktemp("model"), "", False)


def test_odds_are_those_the_engine_saw_when_it_wrote(artifact):
    prompt = artifact.tokenizer.prompt("The cat 猫")
    config = GenerationConfig(temperature=1.5, seed=4, max_new_tokens=40)
    written = list(generate(artifact.model, artifact.tokenizer, prompt, config, alternatives=4))
    tokens = [*prompt, *(token.id for token in written)]
    found = explain(artifact, tokens, alternatives=4)["tokens"]
    assert [token["id"] for token in found] == tokens
    for token, expected in zip(found[len(prompt) :], written, strict=True):
        assert token["rank"] == expected.rank
        assert token["probability"] == pytest.approx(expected.probability, rel=1e-3, abs=1e-7)
        assert token["entropy"] == pytest.approx(expected.entropy, rel=1e-3)
        others = [(other["id"], other["text"]) for other in token["alternatives"]]
        assert others == [(other.id, other.text) for other in expected.alternatives]
        chances = [other["probability"] for other in token["alternatives"]]
        assert chances == pytest.approx([other.probability for other in expected.alternatives], rel=1e-3)
    assert len({token["rank"] for token in found}) > 5  # not always the likeliest


def test_the_first_token_has_no_odds(artifact):
    first = explain(artifact, [5, 6])["tokens"][0]
    assert (first["probability"], first["rank"], first["entropy"]) == (None, None, None)
    assert first["alternatives"] == []


def test_odds_do_not_depend_on_how_many_rows_are_computed_at_once(artifact, monkeypatch):
    tokens = artifact.tokenizer.encode(TEXT)[:50]
    whole = explain(artifact, tokens)["tokens"]
    for rows in (1, 7, 49, 50):
        monkeypatch.setattr(module, "ROWS", rows)
        parts = explain(artifact, tokens)["tokens"]
        assert [token["rank"] for token in parts] == [token["rank"] for token in whole]
        assert [token["text"] for token in parts] == [token["text"] for token in whole]


def test_texts_joined_are_the_text(artifact):
    tokenizer = artifact.tokenizer
    for text in (TEXT, "👩‍👩‍👧‍👦 ünï\u0301", "", "a\n\n b"):
        texts = token_texts(tokenizer, tokenizer.encode(text))
        assert "".join(texts) == text
    half = tokenizer.encode("鱼")[:-1]
    assert "".join(token_texts(tokenizer, half)) == "\ufffd"
    assert token_texts(tokenizer, [tokenizer.end_of_document]) == ["<|endoftext|>"]


def test_special_tokens_are_marked(artifact):
    tokens = artifact.tokenizer.prompt("cat")
    assert [token["special"] for token in explain(artifact, tokens)["tokens"]] == [True] + [False] * (
        len(tokens) - 1
    )


def test_lens_and_odds_agree_on_the_last_layer(artifact):
    tokens = artifact.tokenizer.encode(TEXT)[:30]
    for position in (0, 11, 28):
        found = explain(artifact, tokens, position=position, lens=True)
        assert [layer["layer"] for layer in found["lens"]] == [0, 1, 2, 3]
        last, odds = found["lens"][-1]["top"], found["tokens"][position + 1]["alternatives"]
        assert [other["id"] for other in last] == [other["id"] for other in odds]
        assert last[0]["probability"] == pytest.approx(odds[0]["probability"], rel=1e-3)
        assert found["attention"] is None


def test_after_the_last_token_the_lens_says_what_would_come(artifact):
    tokens = artifact.tokenizer.encode("The cat")
    found = explain(artifact, tokens, lens=True)
    (likeliest,) = generate(
        artifact.model, artifact.tokenizer, tokens, GenerationConfig(temperature=0, max_new_tokens=1)
    )
    assert found["position"] == len(tokens) - 1
    assert found["lens"][-1]["top"][0]["id"] == likeliest.id


def test_attention_is_the_pattern_of_that_position(artifact):
    tokens = artifact.tokenizer.encode(TEXT)[:20]
    weights = torch.tensor(explain(artifact, tokens, position=9, attention=True)["attention"])
    with torch.no_grad():
        expected = attention_patterns(artifact.model, torch.tensor(tokens))[:, :, 9, :10]
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4), rtol=0, atol=1e-4)


def test_rows_of_the_embedding_that_are_no_tokens_are_never_shown(artifact):
    found = explain(artifact, [5, 6, 7], alternatives=50, lens=True)
    shown = [other["id"] for token in found["tokens"] for other in token["alternatives"]]
    shown += [other["id"] for layer in found["lens"] for other in layer["top"]]
    assert max(shown) < artifact.tokenizer.vocab_size


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        ([], {}, "the text is empty"),
        ([5] * 97, {}, "97 tokens where the model reads at most 96"),
        ([5, 100_000], {}, "not all ids are tokens"),
        ([-1], {}, "not all ids are tokens"),
        ([5, 6], {"position": 2}, "position is 2.*give 0 to 1"),
        ([5, 6], {"position": -1}, "position is -1"),
        ([5, 6], {"alternatives": 51}, "alternatives is 51"),
    ],
)
def test_refusals(artifact, tokens, settings, message):
    with pytest.raises(InputError, match=message):
        explain(artifact, tokens, **settings)


def test_a_request_names_its_text_once(artifact):
    tokenizer = artifact.tokenizer
    assert request_tokens(tokenizer, ExplainRequest(model="m", prompt="The cat")) == tokenizer.prompt(
        "The cat"
    )
    assert request_tokens(tokenizer, ExplainRequest(model="m", token_ids=[3, 1])) == [3, 1]
    messages = [{"role": "user", "content": "<|im_end|> hi"}]
    assert request_tokens(tokenizer, ExplainRequest(model="m", messages=messages)) == tokenizer.encode_chat(
        messages, add_generation_prompt=False
    )
    for fields in ({}, {"prompt": "a", "token_ids": [1]}, {"messages": messages, "prompt": ""}):
        with pytest.raises(ValueError, match="exactly one"):
            ExplainRequest(model="m", **fields)


def test_the_route_answers_for_the_named_model(artifact):
    (route,) = explain_routes({"mine": artifact}.__getitem__).routes
    assert (route.path, route.methods) == ("/v1/explain", {"POST"})
    answer = route.endpoint(
        ExplainRequest(model="mine", prompt="The cat", lens=True, position=1, attention=True)
    )
    assert answer["model"] == "mine"
    expected = explain(artifact, artifact.tokenizer.prompt("The cat"), position=1, lens=True, attention=True)
    assert answer == {"object": "explanation", "model": "mine"} | expected
    assert len(answer["lens"]) == 4
    assert len(answer["attention"][0][0]) == 2
    with pytest.raises(KeyError):
        route.endpoint(ExplainRequest(model="other", prompt="x"))
