"""A decoder as llama.cpp lays it out in a GGUF file: the names of its tensors and the fields of its shape, both ways.

Pure: tensors, names and values in and out; knows no files and no tokenizer. What llama.cpp would compute differently,
or not at all, is refused here by name.
Source: the architectures of llama.cpp, github.com/ggml-org/llama.cpp (src/llama-model.cpp, src/models), and the GGUF
specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.models.decoder import DecoderConfig
from glasshouse.models.huggingface import family_for
from glasshouse.models.layers import rotary_frequencies

MODULES = {  # three modules with one name in the file are stored as one, in this order
    "embedding": "token_embd",
    "position_embedding": "position_embd",
    "layers.N.attention_norm": "blk.N.attn_norm",
    "layers.N.attention.query": "blk.N.attn_q",
    "layers.N.attention.key": "blk.N.attn_k",
    "layers.N.attention.value": "blk.N.attn_v",
    "layers.N.attention.query_norm": "blk.N.attn_q_norm",
    "layers.N.attention.key_norm": "blk.N.attn_k_norm",
    "layers.N.attention.output": "blk.N.attn_output",
    "layers.N.feed_forward_norm": "blk.N.ffn_norm",
    "layers.N.feed_forward.gate": "blk.N.ffn_gate",
    "layers.N.feed_forward.up": "blk.N.ffn_up",
    "layers.N.feed_forward.down": "blk.N.ffn_down",
    "norm": "output_norm",
    "head": "output",
}
FUSED = dict.fromkeys((f"layers.N.attention.{kind}" for kind in ("query", "key", "value")), "blk.N.attn_qkv")
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
"""Our families by the name of the architecture that computes them in llama.cpp."""
ROPE_FACTORS = "rope_freqs.weight"
ELSEWHERE = "llama.cpp computes something else; serve this model with glasshouse or vLLM"


@dataclass(frozen=True)
class Laid:
    """One tensor of the file.

    Args:
        parts: our names of the tensors it holds, one after another along their first dimension.
        heads: how many heads its rows are of, where llama.cpp turns neighbours (2i, 2i+1) by an angle instead of
            (i, i + d/2); 0 where rows stay in order.
    """

    parts: tuple[str, ...]
    heads: int = 0

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our tensors to the one in the file."""
        parts = [tensors[name] for name in self.parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.heads:
            whole = whole.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return whole

    def split(self, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The tensor of the file to ours, given our shapes."""
        if self.heads:
            tensor = tensor.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return dict(zip(self.parts, tensor.split([shapes[name][0] for name in self.parts]), strict=True))


def architecture_of(config: DecoderConfig) -> str:
    """The architecture of llama.cpp that computes this decoder.

    Raises:
        InputError: none does.
    """
    family = family_for(config)
    activation = "gelu_tanh" if family == "gpt2" else "silu"
    if config.activation != activation:
        raise InputError(
            f"the {family} layout of GGUF means the activation {activation}, not {config.activation}",
            "activation",
            ELSEWHERE,
        )
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "llama3" and ARCHITECTURES[family] != "llama":
        raise InputError(
            f"the {family} layout of GGUF has no place for llama3 rotary scaling", "rope_scaling", ELSEWHERE
        )
    if family == "qwen2" and config.num_heads * config.head_dim != config.embedding_dim:
        raise InputError(
            f"{config.num_heads} heads of {config.head_dim} do not make the width {config.embedding_dim}",
            "head_dim",
            ELSEWHERE,
        )
    return ARCHITECTURES[family]


def usable_context(config: DecoderConfig) -> int:
    """How many positions llama.cpp computes as we do: its loaders of these families know no sliding window."""
    return min(config.context_length, config.sliding_window or config.context_length)


def decoder_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields of the file that give the shape: whole numbers, floats and strings, by their full names."""
    architecture = architecture_of(config)
    fields: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": usable_context(config),
        "embedding_length": config.embedding_dim,
        "feed_forward_length": config.feed_forward_dim,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
    }
    if architecture == "gpt2":
        fields["attention.layer_norm_epsilon"] = config.norm_epsilon
    else:
        fields["attention.layer_norm_rms_epsilon"] = config.norm_epsilon
        fields["rope.dimension_count"] = config.head_dim
        fields["rope.freq_base"] = config.rope_theta
    if (config.rope_scaling or {}).get("rope_type") == "linear":
        fields["rope.scaling.type"] = "linear"
        fields["rope.scaling.factor"] = float((config.rope_scaling or {})["factor"])
    return {f"{architecture}.{name}": value for name, value in fields.items()}


def decoder_tensors(config: DecoderConfig, names: Iterable[str]) -> dict[str, Laid]:
    """The tensors of the file, by name, that hold a decoder's.

    Args:
        config: the decoder's shape.
        names: the names in its `state_dict`; a tied head is not among them, and llama.cpp takes the embedding for it.
    """
    architecture = architecture_of(config)
    modules = MODULES | (FUSED if architecture == "gpt2" else {})
    order = {module: index for index, module in enumerate(modules)}
    parts: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        module, _, kind = name.rpartition(".")
        layer = re.match(r"layers\.(\d+)\.", module)
        template = module.replace(f"layers.{layer[1]}.", "layers.N.", 1) if layer else module
        stored = modules[template].replace(".N.", f".{layer[1]}.") if layer else modules[template]
        parts.setdefault(f"{stored}.{kind}", []).append((order[template], name))
    turned = {"attn_q": config.num_heads, "attn_k": config.num_key_value_heads}
    heads = turned if architecture == "llama" else {}
    return {
        stored: Laid(tuple(name for _, name in sorted(found)), heads.get(stored.split(".")[-2], 0))
        for stored, found in parts.items()
    }


def rope_factors(config: DecoderConfig) -> Tensor | None:
    """What each rotary frequency is divided by, float32 [d / 2], where a tensor of the file has to say it."""
    if (config.rope_scaling or {}).get("rope_type") != "llama3":
        return None
    plain = rotary_frequencies(config.head_dim, config.rope_theta, None)
    return plain / rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def config_from_fields(fields: Mapping[str, Any], names: Iterable[str]) -> DecoderConfig:
    """The shape that a file describes, read from the file alone: the inverse of `decoder_fields`.

    The scaling that a tensor of rotary factors stands for is not among the fields, and so not in the result.

    Args:
        fields: every field, as read.
        names: the names of every tensor.
    """
    architecture, names = fields["general.architecture"], set(names)
    shape = {
        name.removeprefix(f"{architecture}."): value
        for name, value in fields.items()
        if name.startswith(f"{architecture}.")
    }
    learned = architecture == "gpt2"
    factor = shape.get("rope.scaling.factor")
    biased = "blk.0.ffn_up.bias" in names
    return DecoderConfig(
        vocab_size=shape["vocab_size"],
        embedding_dim=shape["embedding_length"],
        num_layers=shape["block_count"],
        num_heads=shape["attention.head_count"],
        num_key_value_heads=shape["attention.head_count_kv"],
        head_dim=shape["attention.key_length"],
        feed_forward_dim=shape["feed_forward_length"],
        context_length=shape["context_length"],
        position="learned" if learned else "rotary",
        rope_theta=shape.get("rope.freq_base", 10000.0),
        rope_scaling={"rope_type": "linear", "factor": factor} if factor else None,
        norm="layer" if learned else "rms",
        norm_epsilon=shape[f"attention.layer_norm_{'' if learned else 'rms_'}epsilon"],
        activation="gelu_tanh" if learned else "silu",
        gated=not learned,
        bias="all" if biased else "query_key_value" if "blk.0.attn_q.bias" in names else "none",
        query_key_norm="blk.0.attn_q_norm.weight" in names,
        tie_embeddings="output.weight" not in names,
    )
