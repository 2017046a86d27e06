"""The tensor names on disk: every parameter has one place, and comes back from it bit for bit."""

import pytest
import torch

from glasshouse.errors import InputError
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.models.huggingface import canonical_name, stored_tensors

SIZES = {"vocab_size": 40, "embedding_dim": 24, "num_layers": 12, "num_heads": 4, "feed_forward_dim": 36,
         "context_length": 32, "head_dim": 6}  # fmt: skip
QWEN3 = DecoderConfig(**SIZES, num_key_value_heads=2, query_key_norm=True, tie_embeddings=True)
LLAMA = DecoderConfig(**SIZES, num_key_value_heads=2, query_key_norm=False, tie_embeddings=False)
BIASED = DecoderConfig(**SIZES, num_key_value_heads=1, query_key_norm=False, bias="all")
MISTRAL = DecoderConfig(**SIZES, num_key_value_heads=2, query_key_norm=False, sliding_window=8)
QWEN2 = DecoderConfig(**SIZES, num_key_value_heads=2, query_key_norm=False, bias="query_key_value")
GPT2 = DecoderConfig(
    **SIZES, num_key_value_heads=4, query_key_norm=False, bias="all", position="learned", norm="layer", gated=False,
    activation="gelu_tanh",
)  # fmt: skip
FAMILIES = {
    "qwen3": QWEN3,
    "llama": LLAMA,
    "biased": BIASED,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "gpt2": GPT2,
}


def random_tensors(config: DecoderConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_join_and_split_are_inverse_and_lose_nothing(family):
    config = FAMILIES[family]
    tensors = random_tensors(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stored = stored_tensors(config, reversed(list(tensors)))  # whatever order the names come in
    assert sorted(name for entry in stored.values() for name in entry.parts) == sorted(tensors)
    back = {}
    for entry in stored.values():
        whole = entry.join(tensors)
        assert tuple(whole.shape) == entry.shape(shapes)
        back |= entry.split(whole.clone(), shapes)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_names_of_qwen3():
    stored = stored_tensors(QWEN3, random_tensors(QWEN3))
    assert stored["model.layers.11.self_attn.q_norm.weight"].parts == (
        "layers.11.attention.query_norm.weight",
    )
    assert stored["model.layers.1.mlp.down_proj.weight"].parts == ("layers.1.feed_forward.down.weight",)
    assert stored["model.norm.weight"].parts == ("norm.weight",)
    assert "lm_head.weight" not in stored  # tied
    assert "lm_head.weight" in stored_tensors(LLAMA, random_tensors(LLAMA))


def test_gpt2_is_fused_in_order_and_transposed():
    tensors = random_tensors(GPT2)
    stored = stored_tensors(GPT2, tensors)
    fused = stored["transformer.h.3.attn.c_attn.weight"].join(tensors)
    assert fused.shape == (24, 72)
    names = [f"layers.3.attention.{part}.weight" for part in ("query", "key", "value")]
    for index, name in enumerate(names):
        assert torch.equal(fused[:, 24 * index : 24 * index + 24], tensors[name].t())
    assert stored["transformer.h.3.attn.c_attn.bias"].join(tensors).shape == (72,)
    assert stored["transformer.h.3.mlp.c_proj.weight"].transposed
    assert not stored["transformer.wte.weight"].transposed
    assert not stored["transformer.h.3.ln_1.weight"].transposed


def test_joining_copies_nothing_that_need_not_move():
    tensors = random_tensors(QWEN3)
    for entry in stored_tensors(QWEN3, tensors).values():
        assert entry.join(tensors).data_ptr() == tensors[entry.parts[0]].data_ptr()


def test_a_tensor_without_a_place_is_refused_by_name():
    for name in (
        "layers.0.attention.lora.weight",
        "extra",
        "position_embedding.weight",
        "layers.x.attention.query.weight",
    ):
        with pytest.raises(InputError, match=name):
            stored_tensors(QWEN3, [name])


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        (GPT2, "h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
        (GPT2, "transformer.wte.weight", "transformer.wte.weight"),
        (GPT2, "lm_head.weight", "lm_head.weight"),
        (GPT2, "h.0.attn.bias", None),
        (GPT2, "transformer.h.0.attn.masked_bias", None),
        (GPT2, "h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.bias"),
        (LLAMA, "model.layers.0.self_attn.rotary_emb.inv_freq", None),
        (LLAMA, "layers.0.input_layernorm.weight", "model.layers.0.input_layernorm.weight"),
        (LLAMA, "model.norm.weight", "model.norm.weight"),
    ],
)
def test_canonical_names(config, name, expected):
    assert canonical_name(config, name) == expected
