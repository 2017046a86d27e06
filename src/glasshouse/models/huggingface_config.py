"""The config.json of Hugging Face's decoder families, read into ours and written from it.

A file from elsewhere is not trusted: every value is checked before anything is allocated, and what our decoder does not
compute is refused by name, as is, in writing, what none of the families can say. Pure: dicts; knows no files.
"""

from collections.abc import Mapping
from typing import Any

from glasshouse.errors import InputError
from glasshouse.models.decoder import DecoderConfig

ARCHITECTURES = {  # model_type: the class that transformers opens it with
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
ACTIVATION_NAMES = {  # theirs to ours; the last name of each is the one written
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ROPE_SCALING_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
LIMITS = {  # far above any decoder ever made, far below what would exhaust a machine by itself
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "intermediate_size": 2**20,
    "max_position_embeddings": 2**30,
    "sliding_window": 2**30,
}


WHOLE = "copy config.json again from where it came"
TRAINED = "give the value it was trained with"


# ---- values of a foreign config, checked one by one


def _say(value: Any) -> str:
    if isinstance(value, dict | list):  # may be nested too deeply to print
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _integer(facts: Mapping[str, Any], key: str, default: int | None = None, spelling: str = "") -> int:
    spelling = spelling or key
    value = facts.get(spelling)
    value = default if value is None else value
    if value is None:
        raise InputError(f"the config lacks {spelling!r}", spelling, WHOLE)
    if type(value) is not int or not 1 <= value <= LIMITS[key]:
        raise InputError(f"{_say(value)} is not a whole number from 1 to {LIMITS[key]:,}", spelling, TRAINED)
    return value


def _number(facts: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = facts.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not low <= value <= high:  # NaN is not between any two numbers
        raise InputError(f"{_say(value)} is not a number from {low:g} to {high:g}", key, TRAINED)
    return float(value)


def _flag(facts: Mapping[str, Any], key: str, default: bool) -> bool:
    value = facts.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise InputError(f"{_say(value)} is neither true nor false", key, TRAINED)
    return value


def _activation(facts: Mapping[str, Any], key: str, default: str) -> str:
    value = default if facts.get(key) is None else facts[key]
    if not isinstance(value, str) or value not in ACTIVATION_NAMES:
        raise InputError(f"unknown activation {_say(value)}", key, f"known: {', '.join(ACTIVATION_NAMES)}")
    return ACTIVATION_NAMES[value]


def _refuse_unless(holds: bool, key: str, value: Any) -> None:
    if not holds:
        raise InputError(
            f"{key} = {_say(value)} is not supported here", key, "open it with transformers instead"
        )


# ---- config: theirs to ours


def family_of(facts: Any) -> str:
    """The family (`model_type`) that a Hugging Face config names.

    Raises:
        InputError: it names none or an unknown one, or needs code, quantization or a head that are not supported.
    """
    known = f"known families: {', '.join(ARCHITECTURES)}"
    if not isinstance(facts, dict):
        raise InputError("not a JSON object", "config.json", WHOLE)
    if facts.get("auto_map"):
        raise InputError("the model brings its own code, which is never run", "auto_map", known)
    family = facts.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise InputError(f"unknown model family {_say(family)}", "model_type", known)
    if facts.get("quantization_config"):
        raise InputError("the weights are quantized", "quantization_config", "open the unquantized model")
    architecture = ARCHITECTURES[family]
    named = facts.get("architectures")
    if named not in (None, [], [architecture]):
        named = named[0] if isinstance(named, list) else named
        raise InputError(f"{_say(named)} is not a language model", "architectures", f"give a {architecture}")
    return family


def config_from_huggingface(facts: Any) -> DecoderConfig:
    """The shape of the decoder that a Hugging Face `config.json` describes; absent keys mean what transformers takes.

    Args:
        facts: the parsed file.

    Raises:
        InputError: unknown family, a value of the wrong kind or size, or a feature that is not supported. `where` is
            the key.
    """
    family = family_of(facts)
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
    width, heads = _integer(facts, "hidden_size"), _integer(facts, "num_attention_heads")
    layers = _integer(facts, "num_hidden_layers")
    theta, scaling = _rope(facts)
    return DecoderConfig(
        vocab_size=_integer(facts, "vocab_size"),
        embedding_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=_integer(facts, "num_key_value_heads", heads),
        head_dim=_integer(facts, "head_dim", 128 if family == "qwen3" else _head_width(width, heads)),
        feed_forward_dim=_integer(facts, "intermediate_size"),
        context_length=_integer(facts, "max_position_embeddings"),
        position="rotary",
        rope_theta=theta,
        rope_scaling=scaling,
        norm="rms",
        norm_epsilon=_number(facts, "rms_norm_eps", 1e-6, 0.0, 1.0),
        activation=_activation(facts, "hidden_act", "silu"),
        gated=True,
        bias=_llama_bias(facts, family),
        query_key_norm=family == "qwen3",
        sliding_window=_sliding_window(facts, family, layers),
        tie_embeddings=_flag(facts, "tie_word_embeddings", False),
        dropout=_number(facts, "resid_pdrop", 0.0, 0.0, 0.99),
    )


def _head_width(width: int, heads: int) -> int:
    if width % heads:
        raise InputError(
            f"{width} cannot be divided among {heads} heads", "num_attention_heads", "give head_dim as well"
        )
    return width // heads


def _llama_bias(facts: Mapping[str, Any], family: str) -> str:
    if family == "qwen2":
        return "query_key_value"
    attention, feed_forward = _flag(facts, "attention_bias", False), _flag(facts, "mlp_bias", False)
    if family != "llama":
        _refuse_unless(not attention, "attention_bias", attention)
        return "none"
    _refuse_unless(attention == feed_forward, "mlp_bias", feed_forward)
    return "all" if attention else "none"


def _sliding_window(facts: Mapping[str, Any], family: str, layers: int) -> int | None:
    """The window of every layer; Qwen's configs can give some layers one and others none, which is refused."""
    if family == "llama" or facts.get("sliding_window", 4096) is None:
        return None
    window = _integer(facts, "sliding_window", 4096)
    if family == "mistral":
        return window
    if not _flag(facts, "use_sliding_window", False):
        return None
    kinds = facts.get("layer_types")
    if kinds is None:
        first = int(_number(facts, "max_window_layers", 28, 0, LIMITS["num_hidden_layers"]))
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if kinds == ["full_attention"] * layers:
        return None
    _refuse_unless(kinds == ["sliding_attention"] * layers, "layer_types", kinds)
    return window


def _rope(facts: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary frequencies, in either spelling: `rope_parameters` (transformers 5), or
    `rope_theta` with `rope_scaling`. A file with both must say the same in both."""
    new, old = facts.get("rope_parameters"), facts.get("rope_scaling")
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict | None):
            raise InputError(f"{_say(value)} is not an object", key, WHOLE)
    if new and old and _rope_scaling(new) != _rope_scaling(old):
        raise InputError("rope_parameters and rope_scaling disagree", "rope_scaling", TRAINED)
    bases = {
        _number(given, "rope_theta", 10000.0, 1.0, 1e12)
        for given in (facts, new, old)
        if given and given.get("rope_theta") is not None
    }
    if len(bases) > 1:
        raise InputError("rope_theta is given twice and differs", "rope_theta", TRAINED)
    _refuse_unless(facts.get("partial_rotary_factor") in (None, 1), "partial_rotary_factor", "part")
    return next(iter(bases), 10000.0), _rope_scaling(new or old or {})


def _rope_scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    _refuse_unless(parameters.get("partial_rotary_factor") in (None, 1), "partial_rotary_factor", "part")
    if kind in (None, "default"):
        unknown = set(parameters) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        _refuse_unless(not unknown, "rope_parameters", ", ".join(sorted(unknown)))
        return None
    if not isinstance(kind, str) or kind not in ROPE_SCALING_KEYS:
        raise InputError(
            f"unknown rotary scaling {_say(kind)}", "rope_type", f"known: {', '.join(ROPE_SCALING_KEYS)}"
        )
    lacking = [key for key in ROPE_SCALING_KEYS[kind] if parameters.get(key) is None]
    if lacking:
        raise InputError(f"{kind} rotary scaling lacks {lacking[0]!r}", "rope_parameters", WHOLE)
    scaling: dict[str, Any] = {"rope_type": kind}
    scaling |= {key: _number(parameters, key, 0.0, 1e-6, 2**30) for key in ROPE_SCALING_KEYS[kind]}
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
        _refuse_unless(_flag(facts, key, usual) is usual, key, not usual)
    facts = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257, **facts}
    width = _integer(facts, "hidden_size", spelling="n_embd")
    heads = _integer(facts, "num_attention_heads", spelling="n_head")
    return DecoderConfig(
        vocab_size=_integer(facts, "vocab_size"),
        embedding_dim=width,
        num_layers=_integer(facts, "num_hidden_layers", spelling="n_layer"),
        num_heads=heads,
        num_key_value_heads=heads,
        head_dim=_head_width(width, heads),
        feed_forward_dim=_integer(facts, "intermediate_size", 4 * width, "n_inner"),
        context_length=_integer(facts, "max_position_embeddings", spelling="n_positions"),
        position="learned",
        norm="layer",
        norm_epsilon=_number(facts, "layer_norm_epsilon", 1e-5, 0.0, 1.0),
        activation=_activation(facts, "activation_function", "gelu_new"),
        gated=False,
        bias="all",
        query_key_norm=False,
        tie_embeddings=_flag(facts, "tie_word_embeddings", True),
        dropout=_number(facts, "resid_pdrop", 0.1, 0.0, 0.99),
    )


# ---- config: ours to theirs


def family_for(config: DecoderConfig) -> str:
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


def config_to_huggingface(
    config: DecoderConfig, token_ids: Mapping[str, int | list[int] | None], dtype: str
) -> dict[str, Any]:
    """What `config.json` says of a decoder, in the spelling of transformers 5 and in the one that older readers know.

    Args:
        config: the decoder's shape.
        token_ids: "bos_token_id", "eos_token_id" and "pad_token_id"; None where there is none.
        dtype: number format of the weights: "float32", "bfloat16" or "float16".

    Raises:
        InputError: no family holds this shape.
    """
    family = family_for(config)
    shared = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_cache": True,
        **{key: token_ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
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
