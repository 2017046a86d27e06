"""An adapter folder in PEFT's layout, saved and opened: what transformers and vLLM put beside a base model.

Knows the names on disk and nothing of training; the adapters themselves are `models/lora`'s.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.files import MANIFEST, atomic_folder, read_json, verify_manifest, write_json
from glasshouse.models.huggingface import Model, ModelConfig, stored_tensors
from glasshouse.models.lora import AdapterConfig, adapt, adapted_layers, adapter_tensors, load_adapter

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ENDINGS = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""Our names of an adapter's parts, and PEFT's."""
REFUSED = {
    "bias": ("none", None), "use_rslora": (False, None), "rank_pattern": ({}, None), "alpha_pattern": ({}, None),
    "modules_to_save": ([], None), "fan_in_fan_out": (False, None), "lora_bias": (False, None),
    "layer_replication": (None,), "use_qalora": (False, None), "trainable_token_indices": (None,),
}  # fmt: skip
"""Settings of PEFT's that are opened at these values alone."""


def _names_on_disk(config: ModelConfig, layers: list[str]) -> dict[str, str]:
    """Our names of linear layers, and those of the family on disk.

    Raises:
        InputError: the family keeps several of them in one matrix.
    """
    found = {}
    for stored, tensor in stored_tensors(config, [f"{layer}.weight" for layer in layers]).items():
        if len(tensor.parts) != 1 or tensor.transposed:
            raise InputError(
                f"this family keeps {', '.join(tensor.parts)} in one matrix, which PEFT's layout has no adapter for",
                stored,
                "merge the adapter instead",
            )
        found[tensor.parts[0].removesuffix(".weight")] = stored.removesuffix(".weight")
    return found


def save_adapter(folder: Path, model: Model, config: AdapterConfig, base: str) -> None:
    """Write a model's adapters in PEFT's layout, in one step.

    Args:
        folder: where to.
        model: has adapters.
        config: their shape.
        base: names the model they belong to.

    Raises:
        InputError: the family's layout has no place for them, or the disk is full.
    """
    names = _names_on_disk(model.config, list(adapted_layers(model)))
    tensors = {}
    for name, value in adapter_tensors(model).items():
        layer, _, part = name.rpartition(".")
        tensors[f"{PREFIX}{names[layer]}.{ENDINGS[part]}"] = value.cpu().contiguous()
    facts = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.rank,
        "lora_alpha": config.alpha, "lora_dropout": config.dropout, "use_dora": config.magnitude, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in names.values()}), "fan_in_fan_out": False,
        "inference_mode": True,
    }  # fmt: skip
    with atomic_folder(folder) as temporary:
        try:
            save_file(tensors, temporary / WEIGHTS_FILE, {"format": "pt"})
        except SafetensorError as error:
            raise InputError(f"cannot write: {error}", str(folder), "free some space") from error
        write_json(temporary / CONFIG_FILE, facts)


def open_adapter(folder: Path, model: Model) -> AdapterConfig:
    """Put the adapters of a folder beside a model's layers, which are frozen.

    Args:
        folder: in PEFT's layout.
        model: the one they were trained on; changed in place.

    Returns:
        Their shape.

    Raises:
        InputError: there is none, it is torn, uses what is not supported, or does not fit the model.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        verify_manifest(folder)
    facts = read_json(folder / CONFIG_FILE)
    config = _read_config(facts, folder)
    tensors = _read_tensors(folder)
    inside = {name: _layer_on_disk(name, folder) for name in tensors}
    every = [name for name, _ in model.named_modules() if "layers." in name]
    known = _known_layers(model, every)
    missing = sorted(set(inside.values()) - set(known))
    if missing:
        raise InputError(
            f"the model has no layer {missing[0]!r}", str(folder), "use the base model it was trained on"
        )
    ours = {stored: known[stored] for stored in set(inside.values())}
    adapt(
        model,
        AdapterConfig(
            config.rank, config.alpha, tuple(sorted(ours.values())), config.dropout, config.magnitude
        ),
        0,
    )
    parts = {ending: part for part, ending in ENDINGS.items()}
    renamed = {
        f"{ours[inside[name]]}.{parts[name.removeprefix(f'{PREFIX}{inside[name]}.')]}": value.float()
        for name, value in tensors.items()
    }
    load_adapter(model, renamed)
    return config


def _known_layers(model: Model, layers: list[str]) -> dict[str, str]:
    """Names on disk of the layers that have a matrix of their own there, and ours."""
    weights = {name for name in model.state_dict() if name.endswith(".weight")}
    names = [f"{layer}.weight" for layer in layers if f"{layer}.weight" in weights]
    return {
        stored.removesuffix(".weight"): tensor.parts[0].removesuffix(".weight")
        for stored, tensor in stored_tensors(model.config, names).items()
        if len(tensor.parts) == 1 and not tensor.transposed
    }


def _layer_on_disk(name: str, folder: Path) -> str:
    for ending in ENDINGS.values():
        if name.startswith(PREFIX) and name.endswith(f".{ending}"):
            return name.removeprefix(PREFIX).removesuffix(f".{ending}")
    raise InputError(
        f"a tensor that is no part of an adapter: {name[:80]}", str(folder), "give a LoRA adapter of PEFT's"
    )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(
            "no adapter here", str(path), f"an adapter's folder holds {WEIGHTS_FILE}, never a pickle"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"the file is torn: {error}", str(path), "copy the adapter again") from error


def _read_config(facts: Any, folder: Path) -> AdapterConfig:
    where = str(folder / CONFIG_FILE)
    if not isinstance(facts, dict) or facts.get("peft_type") != "LORA":
        raise InputError("not a LoRA adapter", where, "give one made with LoRA or DoRA")
    for key, allowed in REFUSED.items():
        if facts.get(key) not in allowed:
            raise InputError(
                f"{key} = {str(facts[key])[:40]!r} is not supported here", where, "merge it with PEFT first"
            )
    rank, alpha = facts.get("r"), facts.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= 2**16 or not isinstance(alpha, int | float):
        raise InputError("r or lora_alpha is missing or no number", where, "copy the adapter again")
    return AdapterConfig(
        rank, float(alpha), ("all",), float(facts.get("lora_dropout") or 0.0), bool(facts.get("use_dora"))
    )
