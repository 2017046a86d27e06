"""The encoder-decoder families on disk: T5, Marian and BART; their config.json and the names of their tensors.

Pure: dicts and names; knows no files and no tensors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from glasshouse.errors import InputError
from glasshouse.models.encoder_decoder import EncoderDecoderConfig
from glasshouse.models.huggingface_config import (
    Layout,
    head_width,
    read_activation,
    read_flag,
    read_integer,
    read_number,
    refuse_unless,
)

ARCHITECTURES = {  # model_type: the class that transformers opens it with
    "t5": ("T5ForConditionalGeneration",),
    "marian": ("MarianMTModel",),
    "bart": ("BartForConditionalGeneration",),
}
LAYER_NORM_EPSILON = 1e-5  # of Marian and BART, whose configs have no word for it
USUAL_FLAGS = {  # words of older Marian and BART configs, and what our model computes
    "normalize_before": {"marian": False, "bart": False},
    "add_final_layer_norm": {"marian": False, "bart": False},
    "normalize_embedding": {"marian": False, "bart": True},
    "static_position_embeddings": {"marian": True, "bart": False},
    "share_encoder_decoder_embeddings": {"marian": True, "bart": True},
    "tie_word_embeddings": {"marian": True, "bart": True},
}


# ---- names of tensors


def _t5_modules() -> dict[str, str]:
    modules = {"embedding": "shared", "head": "lm_head"}
    for side in ("encoder", "decoder"):
        block, ours = f"{side}.block.N.layer", f"{side}.layers.N"
        modules[f"{side}.relative_bias"] = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"
        modules[f"{side}.norm"] = f"{side}.final_layer_norm"
        last = 1 if side == "encoder" else 2
        readings = [("attention", "0.SelfAttention"), ("cross_attention", "1.EncDecAttention")]
        for name, theirs in readings[:last]:
            for part in ("query", "key", "value", "output"):
                modules[f"{ours}.{name}.{part}"] = f"{block}.{theirs}.{part[0]}"
            modules[f"{ours}.{name}_norm"] = f"{block}.{theirs[0]}.layer_norm"
        for part, theirs in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            modules[f"{ours}.feed_forward.{part}"] = f"{block}.{last}.DenseReluDense.{theirs}"
        modules[f"{ours}.feed_forward_norm"] = f"{block}.{last}.layer_norm"
    return modules


def _bart_modules() -> dict[str, str]:
    modules = {"embedding": "model.shared", "logit_bias": "final_logits_bias"}
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
    for side in ("encoder", "decoder"):
        theirs, ours = f"model.{side}.layers.N", f"{side}.layers.N"
        modules[f"{side}.position_embedding"] = f"model.{side}.embed_positions"
        modules[f"{side}.embedding_norm"] = f"model.{side}.layernorm_embedding"
        for name, stored in (("attention", "self_attn"), ("cross_attention", "encoder_attn")):
            modules |= {f"{ours}.{name}.{part}": f"{theirs}.{stored}.{parts[part]}" for part in parts}
            modules[f"{ours}.{name}_norm"] = f"{theirs}.{stored}_layer_norm"
        modules |= {f"{ours}.feed_forward.up": f"{theirs}.fc1", f"{ours}.feed_forward.down": f"{theirs}.fc2"}
        modules[f"{ours}.feed_forward_norm"] = f"{theirs}.final_layer_norm"
    return modules


T5_MODULES, BART_MODULES = _t5_modules(), _bart_modules()
T5_COPIES = {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}
BART_COPIES = {f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in ("encoder", "decoder")}
BART = Layout(
    BART_MODULES,
    "model.",
    outside=("lm_head.", "final_logits_bias"),
    copies=BART_COPIES | {"lm_head.weight": "model.shared.weight"},
)
MARIAN = replace(BART, constant=r"(^|\.)embed_positions\.weight$")


def encoder_decoder_layout(config: EncoderDecoderConfig) -> Layout:
    """The names of a model's tensors on disk."""
    family = encoder_decoder_family(config)
    if family != "t5":
        return BART if family == "bart" else MARIAN
    modules = T5_MODULES
    if not config.gated:
        modules = {name: theirs.replace(".wi_1", ".wi") for name, theirs in modules.items()}
    copies = T5_COPIES if config.output == "untied" else T5_COPIES | {"lm_head.weight": "shared.weight"}
    return Layout(modules, "", copies=copies)


# ---- config: theirs to ours


def read_encoder_decoder(facts: Mapping[str, Any], family: str) -> EncoderDecoderConfig:
    """The shape of the model that a `config.json` of a family describes; absent keys mean what transformers takes.

    Args:
        facts: the parsed file.
        family: its model_type.

    Raises:
        InputError: a value of the wrong kind or size, or a feature that is not supported. `where` is the key.
    """
    return _t5_config(facts) if family == "t5" else _bart_config(facts, family)


def _t5_config(facts: Mapping[str, Any]) -> EncoderDecoderConfig:
    layers = read_integer(facts, "num_hidden_layers", 6, "num_layers")
    buckets = read_integer(facts, "relative_attention_num_buckets", 32)
    furthest = read_integer(facts, "relative_attention_max_distance", 128)
    refuse_unless(buckets >= 4 and furthest > buckets // 2, "relative_attention_num_buckets", buckets)
    activation, gated = _t5_feed_forward(facts)
    return EncoderDecoderConfig(
        vocab_size=read_integer(facts, "vocab_size", 32128),
        embedding_dim=read_integer(facts, "hidden_size", 512, "d_model"),
        num_encoder_layers=layers,
        num_decoder_layers=read_integer(facts, "num_hidden_layers", layers, "num_decoder_layers"),
        num_heads=read_integer(facts, "num_attention_heads", 8, "num_heads"),
        head_dim=read_integer(facts, "head_dim", 64, "d_kv"),
        feed_forward_dim=read_integer(facts, "intermediate_size", 2048, "d_ff"),
        context_length=read_integer(facts, "max_position_embeddings", 512, "n_positions"),
        position="relative",
        relative_buckets=(buckets, furthest),
        norm="rms",
        norm_epsilon=read_number(facts, "layer_norm_epsilon", 1e-6, 0.0, 1.0),
        norm_place="before",
        activation=activation,
        gated=gated,
        bias="none",
        output=_t5_output(facts),
        dropout=read_number(facts, "dropout_rate", 0.1, 0.0, 0.99),
    )


def _t5_feed_forward(facts: Mapping[str, Any]) -> tuple[str, bool]:
    """Activation and gate; "gated-gelu" has always meant the approximation by tanh."""
    name = facts.get("feed_forward_proj")
    name = "relu" if name is None else name
    gated = isinstance(name, str) and name.startswith("gated-")
    word = "gelu_new" if name == "gated-gelu" else name.removeprefix("gated-") if gated else name
    return read_activation({"feed_forward_proj": word}, "feed_forward_proj", "relu"), gated


def _t5_output(facts: Mapping[str, Any]) -> str:
    """The original T5 ties the head and scales, v1.1 does neither; transformers 5 writes v1.1 as tied and unscaled, and
    leaves it to the file whether there is a head (see `with_head`)."""
    tied = read_flag(facts, "tie_word_embeddings", True)
    scaled = read_flag(facts, "scale_decoder_outputs", tied)
    refuse_unless(tied or not scaled, "scale_decoder_outputs", scaled)
    return "scaled" if scaled else "tied" if tied else "untied"


def with_head(config: EncoderDecoderConfig, names: Iterable[str]) -> EncoderDecoderConfig:
    """The shape with the head that the file holds, where transformers 5 has written a head of its own as a tied one."""
    is_open = config.position == "relative" and config.output == "tied"
    return replace(config, output="untied") if is_open and "lm_head.weight" in set(names) else config


def _bart_config(facts: Mapping[str, Any], family: str) -> EncoderDecoderConfig:
    for key, usual in USUAL_FLAGS.items():
        refuse_unless(read_flag(facts, key, usual[family]) is usual[family], key, not usual[family])
    vocab_size = read_integer(facts, "vocab_size", 58101 if family == "marian" else 50265)
    target_size = read_integer(facts, "vocab_size", vocab_size, "decoder_vocab_size")
    refuse_unless(target_size == vocab_size, "decoder_vocab_size", target_size)
    width = read_integer(facts, "hidden_size", 1024, "d_model")
    heads = _same(facts, "num_attention_heads", 16, "encoder_attention_heads", "decoder_attention_heads")
    return EncoderDecoderConfig(
        vocab_size=vocab_size,
        embedding_dim=width,
        num_encoder_layers=read_integer(facts, "num_hidden_layers", 12, "encoder_layers"),
        num_decoder_layers=read_integer(facts, "num_hidden_layers", 12, "decoder_layers"),
        num_heads=heads,
        head_dim=head_width(width, heads),
        feed_forward_dim=_same(facts, "intermediate_size", 4096, "encoder_ffn_dim", "decoder_ffn_dim"),
        context_length=read_integer(facts, "max_position_embeddings", 1024),
        position="sinusoidal" if family == "marian" else "learned",
        norm="layer",
        norm_epsilon=LAYER_NORM_EPSILON,
        norm_place="after",
        activation=read_activation(facts, "activation_function", "gelu"),
        gated=False,
        bias="all",
        embedding_scale=width**0.5 if read_flag(facts, "scale_embedding", False) else 1.0,
        output="tied",
        dropout=read_number(facts, "dropout", 0.1, 0.0, 0.99),
    )


def _same(facts: Mapping[str, Any], key: str, default: int, encoder: str, decoder: str) -> int:
    """A number that the two stacks have in common."""
    number, other = read_integer(facts, key, default, encoder), read_integer(facts, key, default, decoder)
    if number != other:
        what = f"{encoder} = {number} and {decoder} = {other} differ, which is not supported here"
        raise InputError(what, decoder, "open it with transformers instead")
    return number


# ---- config: ours to theirs


def encoder_decoder_family(config: EncoderDecoderConfig) -> str:
    """The family (`model_type`) that holds this model on disk.

    Raises:
        InputError: none of them can say what the config says.
    """
    style = (config.norm, config.norm_place, config.bias)
    if config.position == "relative" and style == ("rms", "before", "none") and config.embedding_scale == 1.0:
        _t5_word(config)
        return "t5"
    whole = config.num_heads * config.head_dim == config.embedding_dim
    plain = not config.gated and config.output == "tied" and config.norm_epsilon == LAYER_NORM_EPSILON
    scaled = config.embedding_scale in (1.0, config.embedding_dim**0.5)
    if whole and plain and scaled and style == ("layer", "after", "all"):
        if config.position == "sinusoidal":
            return "marian"
        if config.position == "learned":
            return "bart"
    raise InputError(
        "no family on disk holds this combination of position, norm, norm_place, bias, gated, embedding_scale and output",
        "model config",
        "use the values of one of " + ", ".join(ARCHITECTURES),
    )


def _t5_word(config: EncoderDecoderConfig) -> str:
    """Activation and gate as T5 says them."""
    if config.gated and config.activation == "gelu":
        what = "T5 has no word for a gated exact gelu"
        raise InputError(what, "activation", 'use "gelu_tanh"')
    if config.gated:
        return "gated-gelu" if config.activation == "gelu_tanh" else f"gated-{config.activation}"
    return "gelu_new" if config.activation == "gelu_tanh" else config.activation


def write_encoder_decoder(
    config: EncoderDecoderConfig, token_ids: Mapping[str, int | list[int] | None]
) -> dict[str, Any]:
    """What `config.json` says of a model beside what it says of every model.

    Args:
        config: its shape.
        token_ids: as in generation_config.json; the decoder starts with "decoder_start_token_id", else with padding.

    Raises:
        InputError: no family holds this shape.
    """
    family = encoder_decoder_family(config)
    start = token_ids.get("decoder_start_token_id", token_ids.get("pad_token_id"))
    shared = {"is_encoder_decoder": True, "use_cache": True, "decoder_start_token_id": start}
    return shared | (_t5_facts(config) if family == "t5" else _bart_facts(config, family))


def _t5_facts(config: EncoderDecoderConfig) -> dict[str, Any]:
    return {
        "d_model": config.embedding_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.feed_forward_dim,
        "n_positions": config.context_length,
        "relative_attention_num_buckets": config.relative_buckets[0],
        "relative_attention_max_distance": config.relative_buckets[1],
        "layer_norm_epsilon": config.norm_epsilon,
        "feed_forward_proj": _t5_word(config),
        "tie_word_embeddings": config.output != "untied",
        "scale_decoder_outputs": config.output == "scaled",
        "dropout_rate": config.dropout,
    }


def _bart_facts(config: EncoderDecoderConfig, family: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "d_model": config.embedding_dim,
        "encoder_layers": config.num_encoder_layers,
        "decoder_layers": config.num_decoder_layers,
        "max_position_embeddings": config.context_length,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else config.activation,
        "scale_embedding": config.embedding_scale != 1.0,
        "tie_word_embeddings": True,
        "dropout": config.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "forced_eos_token_id": None,
    }
    for side in ("encoder", "decoder"):
        facts[f"{side}_attention_heads"] = config.num_heads
        facts[f"{side}_ffn_dim"] = config.feed_forward_dim
    if family == "marian":
        facts |= {"decoder_vocab_size": config.vocab_size, "share_encoder_decoder_embeddings": True}
    return facts
