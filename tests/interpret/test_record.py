"""Recorded activations are those of a forward pass by hand; a replaced one is what everything after it reads."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from glasshouse.errors import InputError
from glasshouse.interpret.record import record
from glasshouse.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(60, 32, 3, 4, 2, 8, 48, 64, query_key_norm=False, tie_embeddings=False)
TOKENS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])


def random_decoder(config: DecoderConfig = CONFIG) -> Decoder:
    model = Decoder(config)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random) + (parameter.dim() == 1))
    return model.eval()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def normed(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden / (hidden.pow(2).mean(-1, keepdim=True) + CONFIG.norm_epsilon).sqrt() * weight


def by_hand(model: Decoder) -> dict[str, Tensor]:
    """The stream and the feed-forward networks of a Llama, from its weights and the recorded attention outputs."""
    outputs = record(model, TOKENS, lambda name: name.endswith("attention.output")).activations
    stream = model.embedding.weight[TOKENS]
    found = {"embedding": stream}
    for number, layer in enumerate(model.layers):
        found[f"layers.{number}.residual_before"] = stream
        stream = stream + outputs[f"layers.{number}.attention.output"]
        found[f"layers.{number}.residual_middle"] = stream
        inner = normed(stream, layer.feed_forward_norm.weight)
        gate, up = inner @ layer.feed_forward.gate.weight.T, inner @ layer.feed_forward.up.weight.T
        found[f"layers.{number}.feed_forward.hidden"] = gate * torch.sigmoid(gate) * up
        written = found[f"layers.{number}.feed_forward.hidden"] @ layer.feed_forward.down.weight.T
        found[f"layers.{number}.feed_forward.output"] = written
        stream = found[f"layers.{number}.residual_after"] = stream + written
    found["norm"] = normed(stream, model.norm.weight)
    return found


def test_recorded_activations_are_those_computed_by_hand():
    model = random_decoder()
    expected = by_hand(model)
    recording = record(model, TOKENS, expected)
    assert recording.activations.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(recording.activations[name], value, rtol=1e-4, atol=1e-4)
    assert torch.equal(recording.hidden, recording.activations["norm"])


def test_attention_by_hand():
    """Scores, pattern and what is read, from the recorded queries, keys and values."""
    model = random_decoder()
    parts = ("query", "key", "value", "scores", "pattern", "read")
    found = record(model, TOKENS, [f"layers.1.attention.{part}" for part in parts]).activations
    query, key, value, scores, pattern, read = (found[f"layers.1.attention.{part}"] for part in parts)
    key, value = (heads.repeat_interleave(2, dim=1) for heads in (key, value))
    raw = query @ key.transpose(-1, -2) / CONFIG.head_dim**0.5
    hidden = torch.ones(8, 8).triu(1).bool()
    torch.testing.assert_close(scores, raw.masked_fill(hidden, float("-inf")), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pattern, functional.softmax(scores, -1))
    mixed = (pattern @ value).transpose(1, 2).reshape(1, 8, -1)
    torch.testing.assert_close(read, mixed, rtol=1e-4, atol=1e-4)


def test_the_same_value_put_back_changes_no_bit():
    model = random_decoder()
    plain = record(model, TOKENS, lambda name: True)
    for name in plain.activations:
        again = record(model, TOKENS, replace={name: torch.clone})
        assert torch.equal(again.hidden, plain.hidden), name


def test_every_activation_replaced_changes_what_comes_out():
    model = random_decoder()
    plain = record(model, TOKENS, lambda name: True)
    for name in plain.activations:
        changed = record(model, TOKENS, [name], replace={name: lambda value: value * 0.5 + 0.1})
        assert not torch.allclose(changed.hidden, plain.hidden, atol=1e-3), name
        assert (
            torch.equal(changed.activations[name], plain.activations[name] * 0.5 + 0.1)
            or "layers.0" not in name
        )


def test_a_patched_activation_carries_over_what_depends_on_it():
    """The whole stream of one text put into the pass over another gives the first text's answer."""
    model = random_decoder()
    other = TOKENS.flip(1)
    source = record(model, other, ["layers.1.residual_after"])
    patched = record(
        model,
        TOKENS,
        replace={"layers.1.residual_after": lambda _: source.activations["layers.1.residual_after"]},
    )
    assert torch.equal(patched.hidden, source.hidden)


@pytest.mark.parametrize("part", ["attention", "feed_forward"])
def test_ablation_equals_weights_of_zero(part: str):
    model, ablated = random_decoder(), random_decoder()
    written = record(model, TOKENS, replace={f"layers.1.{part}.output": torch.zeros_like})
    layer = ablated.layers[1]
    (layer.attention.output if part == "attention" else layer.feed_forward.down).weight.zero_()
    assert torch.equal(written.hidden, record(ablated, TOKENS).hidden)
    assert not torch.allclose(written.hidden, record(model, TOKENS).hidden, atol=1e-2)


def test_a_head_ablated_equals_its_columns_of_zero():
    model, ablated = random_decoder(), random_decoder()

    def silence(read: Tensor) -> Tensor:
        return torch.cat([read[..., :8], torch.zeros_like(read[..., 8:16]), read[..., 16:]], dim=-1)

    written = record(model, TOKENS, replace={"layers.0.attention.read": silence})
    ablated.layers[0].attention.output.weight[:, 8:16] = 0
    torch.testing.assert_close(written.hidden, record(ablated, TOKENS).hidden, rtol=1e-5, atol=1e-5)


def test_gradients_flow_where_they_are_wanted():
    model = random_decoder()
    with torch.enable_grad():
        recording = record(model, TOKENS, ["layers.0.residual_after"])
        recording.hidden.sum().backward(inputs=list(model.layers[0].parameters()))
    assert recording.activations["layers.0.residual_after"].requires_grad
    assert model.layers[0].attention.query.weight.grad.abs().sum() > 0


def test_keep_takes_a_part():
    model = random_decoder()
    whole = record(model, TOKENS, ["norm"]).activations["norm"]
    part = record(model, TOKENS, ["norm"], keep=lambda value: value[:, -1]).activations["norm"]
    assert torch.equal(part, whole[:, -1])


def test_other_inputs_are_given_beforehand():
    model = random_decoder()
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    recording = record(partial(model, documents=documents), TOKENS, ["layers.0.attention.pattern"])
    pattern = recording.activations["layers.0.attention.pattern"]
    assert pattern[0, :, 3:, :3].abs().max() == 0
    assert not torch.allclose(recording.hidden, record(model, TOKENS).hidden, atol=1e-3)


def test_every_layout_is_read():
    gpt2 = replace(
        CONFIG, position="learned", norm="layer", gated=False, bias="all", activation="gelu_tanh",
        num_key_value_heads=4,
    )  # fmt: skip
    for config in (CONFIG, gpt2, replace(CONFIG, sliding_window=3)):
        model = random_decoder(config)
        found = record(model, TOKENS, lambda name: name.endswith("pattern"))
        assert len(found.activations) == 3
        torch.testing.assert_close(found.hidden, model(TOKENS), rtol=1e-4, atol=1e-4)


def test_refusals():
    model = random_decoder()
    with pytest.raises(
        InputError, match=r"no activation 'layers.1.attention.patern'.*layers.1.attention.pattern"
    ):
        record(model, TOKENS, ["layers.1.attention.patern"])
    with pytest.raises(InputError, match=r"no activation 'layers.7.residual_after'"):
        record(model, TOKENS, replace={"layers.7.residual_after": torch.zeros_like})
    with pytest.raises(InputError, match="same shape"):
        record(model, TOKENS, replace={"norm": lambda value: value[:, -1:]})
