"""What the families on disk share: checked readers of a foreign config.json, and what a table of tensor names says.

A file from elsewhere is not trusted: every value is checked before anything is allocated, and what our models do not
compute is refused by name. Pure: dicts and names; knows no family, no tensors and no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glasshouse.errors import InputError
from glasshouse.models.layers import CODE_GROUP

ACTIVATION_NAMES = {  # theirs to ours; the last name of each is the one written
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
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
    "relative_attention_num_buckets": 2**16,
    "relative_attention_max_distance": 2**30,
}


WHOLE = "copy config.json again from where it came"
TRAINED = "give the value it was trained with"
NEVER = r"(?!)"
"""A pattern that nothing matches."""


@dataclass(frozen=True)
class Layout:
    """How the tensors of a family are named and laid out on disk.

    Args:
        modules: our module names to those on disk; N stands for the number of the layer. Several modules with one name
            on disk are stored as one, in this order.
        prefix: what a file saved without its head leaves out of every name.
        outside: how names begin that never have the prefix: those of the head.
        transposed: a pattern for the tensors that are stored transposed.
        constant: a pattern for stored tensors that are no weights of ours (masks, frequencies): never read.
        copies: names under which a file may hold a tensor once more (a tied head), to the name that counts.
        older: patterns of older spellings, and what replaces them.
    """

    modules: Mapping[str, str]
    prefix: str
    outside: tuple[str, ...] = ("lm_head.",)
    transposed: str = NEVER
    constant: str = NEVER
    copies: Mapping[str, str] = field(default_factory=dict)
    older: tuple[tuple[str, str], ...] = ()


# ---- values of a foreign config, checked one by one


def say_value(value: Any) -> str:
    """A value as an error shows it: short, whatever it is."""
    if isinstance(value, dict | list):  # may be nested too deeply to print
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_integer(facts: Mapping[str, Any], key: str, default: int | None = None, spelling: str = "") -> int:
    """A size of the config: from 1 to its entry in `LIMITS`.

    Args:
        facts: the parsed file.
        key: the usual name, which `LIMITS` knows.
        default: what an absent value means; None when it may not be absent.
        spelling: what this family calls it, where that is not `key`.

    Raises:
        InputError: it is absent, no whole number, or out of range.
    """
    spelling = spelling or key
    value = facts.get(spelling)
    value = default if value is None else value
    if value is None:
        raise InputError(f"the config lacks {spelling!r}", spelling, WHOLE)
    if type(value) is not int or not 1 <= value <= LIMITS[key]:
        raise InputError(
            f"{say_value(value)} is not a whole number from 1 to {LIMITS[key]:,}", spelling, TRAINED
        )
    return value


def read_number(facts: Mapping[str, Any], key: str, default: float, low: float, high: float) -> float:
    """A number from `low` to `high`.

    Raises:
        InputError: it is no number, or out of range.
    """
    value = facts.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not low <= value <= high:  # NaN is not between any two numbers
        raise InputError(f"{say_value(value)} is not a number from {low:g} to {high:g}", key, TRAINED)
    return float(value)


def read_flag(facts: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false.

    Raises:
        InputError: it is neither.
    """
    value = facts.get(key)
    value = default if value is None else value
    if type(value) is not bool:
        raise InputError(f"{say_value(value)} is neither true nor false", key, TRAINED)
    return value


def read_activation(facts: Mapping[str, Any], key: str, default: str) -> str:
    """Our name of an activation.

    Raises:
        InputError: it is unknown.
    """
    value = default if facts.get(key) is None else facts[key]
    if not isinstance(value, str) or value not in ACTIVATION_NAMES:
        raise InputError(
            f"unknown activation {say_value(value)}", key, f"known: {', '.join(ACTIVATION_NAMES)}"
        )
    return ACTIVATION_NAMES[value]


def refuse_unless(holds: bool, key: str, value: Any) -> None:
    """Refuse a value that says something our models do not compute.

    Raises:
        InputError: `holds` is False.
    """
    if not holds:
        raise InputError(
            f"{key} = {say_value(value)} is not supported here", key, "open it with transformers instead"
        )


def head_width(width: int, heads: int) -> int:
    """The width of a head where a family has no key for it.

    Raises:
        InputError: the heads do not divide the width.
    """
    if width % heads:
        raise InputError(
            f"{width} cannot be divided among {heads} heads", "num_attention_heads", "give head_dim as well"
        )
    return width // heads


# ---- weights of few bits


def quantization_config(bits: int, ignored: list[str]) -> dict[str, Any]:
    """What config.json says of weights in compressed-tensors' "pack-quantized" layout.

    Args:
        bits: 8 or 4.
        ignored: names on disk of linear modules that keep plain weights.
    """
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
        "strategy": "group" if bits == 4 else "channel", "group_size": CODE_GROUP[4] if bits == 4 else None,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ignored,
    }  # fmt: skip


def quantization_bits(config: Mapping[str, Any]) -> int | None:
    """The bits of a quantization_config, or None where it is not one that is written here."""
    try:
        (group,) = config["config_groups"].values()
        bits = group["weights"]["num_bits"]
        written = quantization_config(bits, [])
        alike = (
            config["format"] == written["format"]
            and group["targets"] == ["Linear"]
            and not group.get("input_activations")
        )
        (mine,) = written["config_groups"].values()
        return (
            bits
            if alike and all(group["weights"].get(key) == value for key, value in mine["weights"].items())
            else None
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return None
