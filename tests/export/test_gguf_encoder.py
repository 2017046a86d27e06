"""The layout of an encoder in a GGUF file, there and back, and what has no place in it."""

from dataclasses import replace

import pytest
import torch

from glasshouse.errors import InputError
from glasshouse.export.gguf_encoder import (
    encoder_architecture,
    encoder_fields,
    encoder_from_fields,
    encoder_tensors,
)
from glasshouse.models.encoder import Encoder, EncoderConfig, HeadConfig

MODERN = EncoderConfig(300, 32, 4, 4, 48, 128, local_window=6, global_every=2, head=HeadConfig("none"))
BERT = replace(MODERN, position="learned", local_window=None, global_every=1, token_types=2, norm_place="after",
               gated=False, bias="all")  # fmt: skip


@pytest.mark.parametrize("config", [MODERN, BERT], ids=["modern-bert", "bert"])
def test_there_and_back(config):
    state = Encoder(config).state_dict()
    laid = encoder_tensors(config, state)
    assert {part for tensor in laid.values() for part in tensor.parts} == set(state)
    for tensor in laid.values():
        shapes = {part: tuple(state[part].shape) for part in tensor.parts}
        for part, piece in tensor.split(tensor.join(state), shapes).items():
            assert torch.equal(piece, state[part])
    fields = {"general.architecture": encoder_architecture(config), **encoder_fields(config)}
    assert encoder_from_fields(fields) == config


def test_modern_bert_is_fused_in_order():
    laid = encoder_tensors(MODERN, Encoder(MODERN).state_dict())
    assert laid["blk.2.attn_qkv.weight"].parts == tuple(
        f"layers.2.attention.{kind}.weight" for kind in ("query", "key", "value")
    )
    assert laid["blk.0.ffn_up.weight"].parts == tuple(
        f"layers.0.feed_forward.{kind}.weight" for kind in ("gate", "up")
    )
    assert encoder_fields(MODERN)["modern-bert.attention.sliding_window"] == 12  # six to either side


def test_the_head_is_left_out():
    masked = replace(MODERN, head=HeadConfig())
    state = Encoder(masked).state_dict()
    assert any(name.startswith("head.") for name in state)
    assert encoder_tensors(masked, state) == encoder_tensors(MODERN, Encoder(MODERN).state_dict())


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (MODERN, {"local_window": None}),
        (MODERN, {"activation": "silu"}),
        (MODERN, {"bias": "all"}),
        (BERT, {"position_offset": 2}),
        (BERT, {"token_types": 0}),
        (BERT, {"activation": "relu"}),
    ],
)
def test_other_shapes_are_refused(config, change):
    with pytest.raises(InputError, match="no layout of GGUF"):
        encoder_architecture(replace(config, **change))
