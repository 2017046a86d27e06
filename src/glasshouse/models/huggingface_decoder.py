"""The decoder families on disk: Qwen3, Llama, Mistral, Qwen2 and GPT-2; their config.json and the names of their tensors.

Pure: dicts and names; knows no files and no tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from glasshouse.errors import InputError
from glasshouse.models.decoder import DecoderConfig
from glasshouse.models.huggingface_config import (
    LIMITS,
    TRAINED,
    WHOLE,
    Layout,
    head_width,
    read_activation,
    read_flag,
    read_integer,
    read_number,
    refuse_unless,
    say_value,
)

ARCHITECTURES = {  # model_type: the classes that transformers opens it with; the first is the one written
    "qwen3": ("Qwen3ForCausalLM",),
    "llama": ("LlamaForCausalLM",),
    "mistral": ("MistralForCausalLM",),
    "qwen2": ("Qwen2ForCausalLM",),
    "gpt2": ("GPT2LMHeadModel",),
}
ROPE_SCALING_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
LLAMA_MODULES = {
    "embedding": "model.embed_tokens",
    "layers.N.attention_norm": "model.layers.N.input_layernorm",
    "layers.N.attention.query": "model.layers.N.self_attn.q_proj",
    "layers.N.attention.key": "model.layers.N.self_attn.k_proj",
    "layers.N.attention.value": "model.layers.N.self_attn.v_proj",
    "layers.N.attention.query_norm": "model.layers.N.self_attn.q_norm",
    "layers.N.attention.key_norm": "model.layers.N.self_attn.k_norm",
    "layers.N.attention.output": "model.layers.N.self_attn.o_proj",
    "layers.N.feed_forward_norm": "model.layers.N.post_attention_layernorm",
    "layers.N.feed_forward.gate": "model.layers.N.mlp.gate_proj",
    "layers.N.feed_forward.up": "model.layers.N.mlp.up_proj",
    "layers.N.feed_forward.down": "model.layers.N.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
GPT2_MODULES = {  # query, key and value are stored as one
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "layers.N.attention_norm": "transformer.h.N.ln_1",
    "layers.N.attention.query": "transformer.h.N.attn.c_attn",
    "layers.N.attention.key": "transformer.h.N.attn.c_attn",
    "layers.N.attention.value": "transformer.h.N.attn.c_attn",
    "layers.N.attention.output": "transformer.h.N.attn.c_proj",
    "layers.N.feed_forward_norm": "transformer.h.N.ln_2",
    "layers.N.feed_forward.up": "transformer.h.N.mlp.c_fc",
    "layers.N.feed_forward.down": "transformer.h.N.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
LLAMA = Layout(LLAMA_MODULES, "model.", constant=r"\.rotary_emb\.inv_freq$")
GPT2 = Layout(
    GPT2_MODULES,
    "transformer.",
    transposed=r"\.(c_attn|c_proj|c_fc)\.weight$",
    constant=r"\.attn\.(bias|masked_bias)$",
)


def decoder_layout(config: DecoderConfig) -> Layout:
    """The names and layout of a decoder's tensors on disk."""
    layout = GPT2 if decoder_family(config) == "gpt2" else LLAMA
    if not config.tie_embeddings:
        return layout
    return replace(layout, copies={"lm_head.weight": layout.modules["embedding"] + ".weight"})


# ---- config: theirs to ours


def read_decoder(facts: Mapping[str, Any], family: str) -> DecoderConfig:
    """The shape of the decoder that a `config.json` of a family describes; absent keys mean what transformers takes.

    Args:
        facts: the parsed file.
        family: its model_type.

    Raises:
        InputError: a value of the wrong kind or size, or a feature that is not supported. `where` is the key.
    """
    config = _gpt2_config(facts) if family == "gpt2" else _llama_config(facts, family)
    if config.num_heads % config.num_key_value_heads:
        raise InputError(
            f"{config.num_heads} query heads cannot share {config.num_key_value_heads} key/value heads",
            "num_key_value_heads",
            "give a divisor of num_attention_heads",
        )
    if config.position == "rotary" and config.head_dim % 2:
        raise InputError(
            f"rotary positions need an even head width, not {config.head_dim}", "head_dim", "give an even one"
        )
    return config


def _llama_config(facts: Mapping[str, Any], family: str) -> DecoderConfig:
    width, heads = read_integer(facts, "hidden_size"), read_integer(facts, "num_attention_heads")
    layers = read_integer(facts, "num_hidden_layers")
    theta, scaling = _rope(facts)
    return DecoderConfig(
        vocab_size=read_integer(facts, "vocab_size"),
        embedding_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=read_integer(facts, "num_key_value_heads", heads),
        head_dim=read_integer(facts, "head_dim", 128 if family == "qwen3" else head_width(width, heads)),
        feed_forward_dim=read_integer(facts, "intermediate_size"),
        context_length=read_integer(facts, "max_position_embeddings"),
        position="rotary",
        rope_theta=theta,
        rope_scaling=scaling,
        norm="rms",
        norm_epsilon=read_number(facts, "rms_norm_eps", 1e-6, 0.0, 1.0),
        activation=read_activation(facts, "hidden_act", "silu"),
        gated=True,
        bias=_llama_bias(facts, family),
        query_key_norm=family == "qwen3",
        sliding_window=_sliding_window(facts, family, layers),
        tie_embeddings=read_flag(facts, "tie_word_embeddings", False),
        dropout=read_number(facts, "resid_pdrop", 0.0, 0.0, 0.99),
    )


def _llama_bias(facts: Mapping[str, Any], family: str) -> str:
    if family == "qwen2":
        return "query_key_value"
    attention, feed_forward = read_flag(facts, "attention_bias", False), read_flag(facts, "mlp_bias", False)
    if family != "llama":
        refuse_unless(not attention, "attention_bias", attention)
        return "none"
    refuse_unless(attention == feed_forward, "mlp_bias", feed_forward)
    return "all" if attention else "none"


def _sliding_window(facts: Mapping[str, Any], family: str, layers: int) -> int | None:
    """The window of every layer; Qwen's configs can give some layers one and others none, which is refused."""
    if family == "llama" or facts.get("sliding_window", 4096) is None:
        return None
    window = read_integer(facts, "sliding_window", 4096)
    if family == "mistral":
        return window
    if not read_flag(facts, "use_sliding_window", False):
        return None
    kinds = facts.get("layer_types")
    if kinds is None:
        first = int(read_number(facts, "max_window_layers", 28, 0, LIMITS["num_hidden_layers"]))
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if kinds == ["full_attention"] * layers:
        return None
    refuse_unless(kinds == ["sliding_attention"] * layers, "layer_types", kinds)
    return window


def _rope(facts: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary frequencies, in either spelling: `rope_parameters` (transformers 5), or
    `rope_theta` with `rope_scaling`. A file with both must say the same in both."""
    new, old = facts.get("rope_parameters"), facts.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict | None):
            raise InputError(f"{say_value(value)} is not an object", key, WHOLE)
    if new and old and _rope_scaling(new) != _rope_scaling(old):
        raise InputError("rope_parameters and rope_scaling disagree", "rope_scaling", TRAINED)
    bases = {
        read_number(given, "rope_theta", 10000.0, 1.0, 1e12)
        for given in (facts, new, old)
        if given and given.get("rope_theta") is not None
    }
    if len(bases) > 1:
        raise InputError("rope_theta is given twice and differs", "rope_theta", TRAINED)
    refuse_unless(facts.get("partial_rotary_factor") in (None, 1), "partial_rotary_factor", "part")
    return next(iter(bases), 10000.0), _rope_scaling(new or old or {})


def _rope_scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    refuse_unless(parameters.get("partial_rotary_factor") in (None, 1), "partial_rotary_factor", "part")
    if kind in (None, "default"):
        unknown = set(parameters) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        refuse_unless(not unknown, "rope_parameters", ", ".join(sorted(unknown)))
        return None
    if not isinstance(kind, str) or kind not in ROPE_SCALING_KEYS:
        raise InputError(
            f"unknown rotary scaling {say_value(kind)}", "rope_type", f"known: {', '.join(ROPE_SCALING_KEYS)}"
        )
    lacking = [key for key in ROPE_SCALING_KEYS[kind] if parameters.get(key) is None]
    if lacking:
        raise InputError(f"{kind} rotary scaling lacks {lacking[0]!r}", "rope_parameters", WHOLE)
    scaling: dict[str, Any] = {"rope_type": kind}
    scaling |= {key: read_number(parameters, key, 0.0, 1e-6, 2**30) for key in ROPE_SCALING_KEYS[kind]}
    if kind == "llama3":
        scaling["original_max_position_embeddings"] = int(scaling["original_max_position_embeddings"])
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise InputError("low_freq_factor is not below high_freq_factor", "rope_parameters", WHOLE)
    return scaling


def _gpt2_config(facts: Mapping[str, Any]) -> DecoderConfig:
    usual_flags = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    for key, usual in usual_flags.items():
        refuse_unless(read_flag(facts, key, usual) is usual, key, not usual)
    facts = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257, **facts}
    width = read_integer(facts, "hidden_size", spelling="n_embd")
    heads = read_integer(facts, "num_attention_heads", spelling="n_head")
    return DecoderConfig(
        vocab_size=read_integer(facts, "vocab_size"),
        embedding_dim=width,
        num_layers=read_integer(facts, "num_hidden_layers", spelling="n_layer"),
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_width(width, heads),
        feed_forward_dim=read_integer(facts, "intermediate_size", 4 * width, "n_inner"),
        context_length=read_integer(facts, "max_position_embeddings", spelling="n_positions"),
        position="learned",
        norm="layer",
        norm_epsilon=read_number(facts, "layer_norm_epsilon", 1e-5, 0.0, 1.0),
        activation=read_activation(facts, "activation_function", "gelu_new"),
        gated=False,
        bias="all",
        query_key_norm=False,
        tie_embeddings=read_flag(facts, "tie_word_embeddings", True),
        dropout=read_number(facts, "resid_pdrop", 0.1, 0.0, 0.99),
    )


# ---- config: ours to theirs


def decoder_family(config: DecoderConfig) -> str:
    """The family (`model_type`) that holds this decoder on disk.

    Raises:
        InputError: none of them can say what the config says.
    """
    rotary = config.position == "rotary" and config.norm == "rms" and config.gated
    if rotary and config.query_key_norm and config.bias == "none":
        return "qwen3"
    if rotary and not config.query_key_norm:
        if config.bias == "query_key_value":
            return "qwen2"
        if config.sliding_window is None:
            return "llama"
        if config.bias == "none":
            return "mistral"
    one_head_kind = config.num_key_value_heads == config.num_heads
    plain = not (config.gated or config.query_key_norm or config.sliding_window)
    fits = one_head_kind and plain and config.num_heads * config.head_dim == config.embedding_dim
    if fits and (config.position, config.norm, config.bias) == ("learned", "layer", "all"):
        return "gpt2"
    raise InputError(
        "no family on disk holds this combination of position, norm, bias, gated, query_key_norm and sliding_window",
        "model config",
        "use the values of one of " + ", ".join(ARCHITECTURES),
    )


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """What `config.json` says of a decoder beside what it says of every model.

    Raises:
        InputError: no family holds this shape.
    """
    family = decoder_family(config)
    shared = {"tie_word_embeddings": config.tie_embeddings, "use_cache": True}
    return shared | (_gpt2_facts(config) if family == "gpt2" else _llama_facts(config, family))


def _written_activation(config: DecoderConfig, gelu_tanh: str) -> str:
    return gelu_tanh if config.activation == "gelu_tanh" else config.activation


def _gpt2_facts(config: DecoderConfig) -> dict[str, Any]:
    return {
        "n_embd": config.embedding_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.feed_forward_dim,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": _written_activation(config, "gelu_new"),
        "resid_pdrop": config.dropout,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _llama_facts(config: DecoderConfig, family: str) -> dict[str, Any]:
    scaling = dict(config.rope_scaling) if config.rope_scaling else None
    facts = {
        "hidden_size": config.embedding_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.feed_forward_dim,
        "max_position_embeddings": config.context_length,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": _written_activation(config, "gelu_pytorch_tanh"),
        "attention_bias": config.bias == "all",
        "attention_dropout": 0.0,
    }
    if family == "llama":
        facts["mlp_bias"] = config.bias == "all"
    if family == "mistral":
        facts["sliding_window"] = config.sliding_window
    if family in ("qwen3", "qwen2"):
        slides = config.sliding_window is not None
        facts |= {
            "sliding_window": config.sliding_window,
            "use_sliding_window": slides,
            "max_window_layers": 0,
        }
        facts["layer_types"] = ["sliding_attention" if slides else "full_attention"] * config.num_layers
    if config.dropout:
        facts["resid_pdrop"] = config.dropout  # GPT-2's word, which transformers ignores in these families
    return facts
