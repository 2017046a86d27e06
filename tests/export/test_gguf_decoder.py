"""The layout of a decoder in a GGUF file, there and back, and what has no place in it."""

from dataclasses import replace

import pytest
import torch

from glasshouse.errors import InputError
from glasshouse.export.gguf_decoder import (
    Laid,
    architecture_of,
    config_from_fields,
    decoder_fields,
    decoder_tensors,
    rope_factors,
    usable_context,
)
from glasshouse.models.decoder import Decoder

LAYOUTS = ["qwen3", "qwen3 wide", "llama", "llama linear", "llama biased", "qwen2", "gpt2"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shape_is_read_back_from_the_file_alone(layout, configs):
    config = configs[layout]
    with torch.device("meta"):
        names = list(decoder_tensors(config, Decoder(config).state_dict()))
    fields = {"general.architecture": architecture_of(config), **decoder_fields(config)}
    assert config_from_fields(fields, names) == config


@pytest.mark.parametrize("layout", ["llama", "gpt2", "qwen2", "llama biased"])
def test_tensors_there_and_back(layout, configs):
    model = Decoder(configs[layout])
    state = model.state_dict()
    for name, laid in decoder_tensors(configs[layout], state).items():
        stored = laid.join(state)
        shapes = {part: tuple(state[part].shape) for part in laid.parts}
        for part, tensor in laid.split(stored, shapes).items():
            assert torch.equal(tensor, state[part]), name


def test_rows_are_turned_as_pairs():
    """Row i of a head and row i + d/2 become neighbours."""
    laid = Laid(("query",), heads=2)
    rows = torch.arange(12)[:, None]
    assert laid.join({"query": rows}).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_only_llama_turns_and_only_gpt2_fuses(configs):
    state = {name: list(Decoder(configs[name]).state_dict()) for name in ("llama", "qwen3", "gpt2")}
    laid = {name: decoder_tensors(configs[name], names) for name, names in state.items()}
    assert {name for name, tensor in laid["llama"].items() if tensor.heads} == {
        f"blk.{layer}.attn_{kind}.weight" for layer in range(3) for kind in "qk"
    }
    assert not any(tensor.heads for name in ("qwen3", "gpt2") for tensor in laid[name].values())
    assert laid["gpt2"]["blk.1.attn_qkv.bias"].parts == tuple(
        f"layers.1.attention.{kind}.bias" for kind in ("query", "key", "value")
    )


def test_context_ends_at_the_window(configs):
    assert usable_context(configs["mistral"]) == 48
    assert decoder_fields(configs["mistral"])["llama.context_length"] == 48
    assert usable_context(configs["llama"]) == 256


def test_factors_stand_for_the_scaling(configs):
    assert rope_factors(configs["llama"]) is None
    scaling = configs["llama scaled"].rope_scaling | {"original_max_position_embeddings": 64}
    factors = rope_factors(replace(configs["llama scaled"], rope_scaling=scaling))
    assert factors[0] == 1.0  # the fastest turn stays
    assert factors[-1] == pytest.approx(8.0)  # the slowest is stretched by the whole factor


@pytest.mark.parametrize(
    ("layout", "change", "named"),
    [
        ("llama", {"activation": "gelu_tanh"}, "activation"),
        ("gpt2", {"activation": "relu"}, "activation"),
        ("qwen2", {"head_dim": 32}, "head_dim"),
        ("qwen3", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(layout, change, named, configs):
    with pytest.raises(InputError, match=named):
        architecture_of(replace(configs[layout], **change))
