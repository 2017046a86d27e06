"""An encoder as llama.cpp lays it out in a GGUF file, where it makes vectors of texts: names and fields, both ways.

What an encoder makes of its vectors (scores of tokens or labels) has no place there and is left out.
Pure: names and values in and out; knows no files and no tokenizer.
Source: the architectures modern-bert and bert of llama.cpp, github.com/ggml-org/llama.cpp.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from glasshouse.errors import InputError
from glasshouse.export.gguf_decoder import Laid
from glasshouse.models.encoder import EncoderConfig, HeadConfig

MEAN_POOLING = 1
TYPE_COUNT = "tokenizer.ggml.token_type_count"
MODULES = {  # several modules with one name in the file are stored as one, in this order
    "modern-bert": {
        "embedding": "token_embd",
        "embedding_norm": "token_embd_norm",
        "layers.N.attention_norm": "blk.N.attn_norm",
        "layers.N.attention.query": "blk.N.attn_qkv",
        "layers.N.attention.key": "blk.N.attn_qkv",
        "layers.N.attention.value": "blk.N.attn_qkv",
        "layers.N.attention.output": "blk.N.attn_output",
        "layers.N.feed_forward_norm": "blk.N.ffn_norm",
        "layers.N.feed_forward.gate": "blk.N.ffn_up",
        "layers.N.feed_forward.up": "blk.N.ffn_up",
        "layers.N.feed_forward.down": "blk.N.ffn_down",
        "norm": "output_norm",
    },
    "bert": {
        "embedding": "token_embd",
        "position_embedding": "position_embd",
        "token_type_embedding": "token_types",
        "embedding_norm": "token_embd_norm",
        "layers.N.attention.query": "blk.N.attn_q",
        "layers.N.attention.key": "blk.N.attn_k",
        "layers.N.attention.value": "blk.N.attn_v",
        "layers.N.attention.output": "blk.N.attn_output",
        "layers.N.attention_norm": "blk.N.attn_output_norm",
        "layers.N.feed_forward.up": "blk.N.ffn_up",
        "layers.N.feed_forward.down": "blk.N.ffn_down",
        "layers.N.feed_forward_norm": "blk.N.layer_output_norm",
    },
}
ELSEWHERE = "llama.cpp computes something else; export it --to onnx"


def encoder_architecture(config: EncoderConfig) -> str:
    """The architecture of llama.cpp that computes this encoder.

    Raises:
        InputError: none does.
    """
    if (
        config.position == "rotary"
        and config.norm_place == "before"
        and config.gated
        and config.bias == "none"
    ):
        _require(config.local_window is not None, "local_window", config.local_window)
        _require(config.activation == "gelu", "activation", config.activation)
        return "modern-bert"
    _require(config.position == "learned" and config.norm_place == "after", "position", config.position)
    _require(not config.gated and config.bias == "all", "bias", config.bias)
    _require(config.position_offset == 0, "position_offset", config.position_offset)
    _require(config.activation == "gelu", "activation", config.activation)
    _require(config.token_types > 0, "token_types", config.token_types)
    return "bert"


def _require(holds: bool, field: str, value: Any) -> None:
    if not holds:
        raise InputError(f"no layout of GGUF holds an encoder with {field} {value!r}", field, ELSEWHERE)


def encoder_fields(config: EncoderConfig) -> dict[str, Any]:
    """The fields of the file that give the shape, by their full names."""
    architecture = encoder_architecture(config)
    fields: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.context_length,
        "embedding_length": config.embedding_dim,
        "feed_forward_length": config.feed_forward_dim,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_heads,
        "attention.layer_norm_epsilon": config.norm_epsilon,
        "attention.causal": False,
        "pooling_type": MEAN_POOLING,
    }
    if architecture == "modern-bert":
        fields |= {
            "attention.sliding_window": 2 * (config.local_window or 0),  # both sides together
            "attention.sliding_window_pattern": config.global_every,
            "rope.freq_base": config.rope_theta,
            "rope.freq_base_swa": config.local_rope_theta,
            "rope.scaling.type": "none",
        }
    named = {f"{architecture}.{name}": value for name, value in fields.items()}
    return named if architecture == "modern-bert" else named | {TYPE_COUNT: config.token_types}


def encoder_tensors(config: EncoderConfig, names: Iterable[str]) -> dict[str, Laid]:
    """The tensors of the file, by name, that hold an encoder's; its head's have no place and are left out."""
    modules = MODULES[encoder_architecture(config)]
    order = {module: index for index, module in enumerate(modules)}
    parts: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        if name.startswith("head."):
            continue
        module, _, kind = name.rpartition(".")
        layer = re.match(r"layers\.(\d+)\.", module)
        template = module.replace(f"layers.{layer[1]}.", "layers.N.", 1) if layer else module
        stored = modules[template].replace(".N.", f".{layer[1]}.") if layer else modules[template]
        parts.setdefault(f"{stored}.{kind}", []).append((order[template], name))
    return {stored: Laid(tuple(name for _, name in sorted(found))) for stored, found in parts.items()}


def encoder_from_fields(fields: Mapping[str, Any]) -> EncoderConfig:
    """The shape that a file describes, read from its fields alone: the inverse of `encoder_fields`."""
    architecture = fields["general.architecture"]
    shape = {
        name.removeprefix(f"{architecture}."): value
        for name, value in fields.items()
        if name.startswith(f"{architecture}.")
    }
    modern = architecture == "modern-bert"
    return EncoderConfig(
        vocab_size=shape["vocab_size"],
        embedding_dim=shape["embedding_length"],
        num_layers=shape["block_count"],
        num_heads=shape["attention.head_count"],
        feed_forward_dim=shape["feed_forward_length"],
        context_length=shape["context_length"],
        position="rotary" if modern else "learned",
        rope_theta=shape.get("rope.freq_base", 160_000.0),
        local_rope_theta=shape.get("rope.freq_base_swa", 10_000.0),
        local_window=shape["attention.sliding_window"] // 2 if modern else None,
        global_every=shape.get("attention.sliding_window_pattern", 1),
        token_types=fields.get(TYPE_COUNT, 0),
        norm_place="before" if modern else "after",
        norm_epsilon=shape["attention.layer_norm_epsilon"],
        gated=modern,
        bias="none" if modern else "all",
        head=HeadConfig("none"),
    )
