"""The logit lens: its last layer is the model itself, its first knows only the last token."""

import pytest
import torch

from glasshouse.interpret.lens import layer_streams, lens_logits, likeliest_by_layer, logit_lens
from glasshouse.interpret.record import record
from glasshouse.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(60, 32, 3, 4, 2, 8, 48, 64, tie_embeddings=False)
TOKENS = torch.tensor([3, 14, 15, 9, 26, 5, 35, 8])


@pytest.fixture(scope="module")
def model() -> Decoder:
    decoder = Decoder(CONFIG)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random) + (parameter.dim() == 1))
    return decoder.eval()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_the_last_layer_is_the_model(model):
    logits = lens_logits(model, layer_streams(model, TOKENS))
    assert logits.shape == (4, 8, 60)
    torch.testing.assert_close(logits[-1], model.logits(model(TOKENS[None]))[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[-2], logits[-1], atol=0.1)


def test_a_layer_is_the_model_without_the_layers_after_it(model):
    """What layer 2 would say is what the model says when layer 3 writes nothing."""
    silent = record(
        model,
        TOKENS[None],
        replace={
            "layers.2.attention.output": torch.zeros_like,
            "layers.2.feed_forward.output": torch.zeros_like,
        },
    )
    logits = lens_logits(model, layer_streams(model, TOKENS))
    torch.testing.assert_close(logits[2], model.logits(silent.hidden)[0], rtol=1e-4, atol=1e-4)


def test_the_first_layer_sees_only_its_own_token(model):
    first = lens_logits(model, layer_streams(model, TOKENS, 4))[0]
    alone = model.logits(model.norm(model.embedding.weight[TOKENS[4]]))
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-4)


def test_likeliest_tokens_of_one_position(model):
    layers = logit_lens(model, TOKENS, 5, count=4)
    chances = model.logits(model(TOKENS[None]))[0, 5].softmax(-1)
    assert [layer.layer for layer in layers] == [0, 1, 2, 3]
    assert layers[-1].ids == chances.topk(4).indices.tolist()
    torch.testing.assert_close(
        torch.tensor(layers[-1].probabilities), chances.topk(4).values, rtol=1e-4, atol=1e-5
    )


def test_a_text_after_the_position_changes_nothing(model):
    cut = logit_lens(model, TOKENS[:4], 3)
    assert [layer.ids for layer in cut] == [layer.ids for layer in logit_lens(model, TOKENS, 3)]


def test_no_more_tokens_than_there_are():
    (layer,) = likeliest_by_layer(torch.tensor([[0.0, 1.0, -1.0]]), 50)
    assert layer.ids == [1, 0, 2]
    assert sum(layer.probabilities) == pytest.approx(1)
