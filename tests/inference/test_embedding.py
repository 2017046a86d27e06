"""Vectors of texts: the same alone and in a batch, of length one, near where texts are near, for every family."""

import dataclasses

import pytest
import torch

from glasshouse.artifact import open_artifact, save_artifact
from glasshouse.errors import InputError
from glasshouse.inference import embedding
from glasshouse.inference.embedding import embed, embed_texts, embed_tokens
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.models.encoder import Encoder, EncoderConfig, HeadConfig
from glasshouse.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from glasshouse.text.reading import read_text
from glasshouse.text.tokenizer import train_tokenizer

TEXTS = ["The cat sat on the mat.", "猫坐在垫子上。", "", "a", "The cat sat on the mat!", "1234567 🙂 " * 3]
TOKENIZER = train_tokenizer(iter(TEXTS * 4), 290)
MODELS = {
    "decoder": lambda: Decoder(DecoderConfig(300, 32, 2, 4, 2, 8, 48, 64)),
    "encoder": lambda: Encoder(
        EncoderConfig(
            vocab_size=300,
            embedding_dim=32,
            num_layers=2,
            num_heads=4,
            feed_forward_dim=48,
            context_length=64,
            head=HeadConfig("none"),
        )
    ),
    "encoder-decoder": lambda: EncoderDecoder(EncoderDecoderConfig(300, 32, 2, 2, 4, 8, 48, 64)),
}


@pytest.fixture(params=MODELS)
def artifact(request, tmp_path):
    model = MODELS[request.param]()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random) + (parameter.dim() == 1))
    save_artifact(tmp_path / "model", model.eval(), TOKENIZER)
    return open_artifact(tmp_path / "model", dtype=torch.float32)


def test_together_is_alone_and_of_length_one(artifact, monkeypatch):
    monkeypatch.setattr(embedding, "BATCH_TOKENS", 60)
    together = embed_texts(artifact, TEXTS)
    assert together.shape == (len(TEXTS), 32)
    assert together.dtype == torch.float32
    alone = torch.cat([embed_texts(artifact, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(TEXTS)))


def test_it_is_the_mean_of_the_hidden_vectors(artifact):
    tokens = torch.tensor([read_text(artifact.tokenizer, TEXTS[0]).ids])
    model = artifact.model
    with torch.inference_mode():
        hidden = model.encode(tokens) if isinstance(model, EncoderDecoder) else model(tokens)
    mean = hidden[0].sum(0) / tokens.shape[1]
    torch.testing.assert_close(embed_texts(artifact, TEXTS[:1])[0], mean / mean.square().sum().sqrt())


def test_what_stands_at_padding_does_not_matter(artifact):
    tokens = torch.tensor([[5, 6, 7, 0, 0], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    other = tokens.masked_fill(~mask, 99)
    torch.testing.assert_close(embed(artifact.model, tokens, mask), embed(artifact.model, other, mask))


def test_like_texts_are_nearer(artifact):
    vectors = embed_texts(artifact, TEXTS)
    assert vectors[0] @ vectors[4] > max(vectors[0] @ vectors[other] for other in (1, 2, 3, 5))


def test_half_precision_vectors_are_close(artifact):
    exact = embed_texts(artifact, TEXTS)
    coarse = embed_texts(dataclasses.replace(artifact, model=artifact.model.to(torch.bfloat16)), TEXTS)
    assert coarse.dtype == torch.float32
    assert (exact * coarse).sum(1).min() > 0.99


def test_refusals(artifact):
    with pytest.raises(InputError, match="text 1 has 65 tokens and the model reads 1 to 64"):
        embed_tokens(artifact.model, [[5], [5] * 65])
    with pytest.raises(InputError, match="text 0 has 0 tokens"):
        embed_tokens(artifact.model, [[]])
    with pytest.raises(InputError, match="outside the vocabulary of 300"):
        embed_tokens(artifact.model, [[300]])
    with torch.no_grad():
        next(artifact.model.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        embed_texts(artifact, ["a"])


def test_no_texts_and_half_characters(artifact):
    assert embed_texts(artifact, []).shape == (0, 32)
    assert torch.isfinite(embed_texts(artifact, ["a\ud800b"])).all()
