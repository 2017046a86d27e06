"""The model families on disk, in Hugging Face's layout, both ways: config.json, and what each tensor is called.

Each family's own tables are in its own module; here its config.json is sent to them, and a tensor is renamed, cut or
joined at the file boundary, and nowhere else. Pure: dicts, names and tensors; knows no files.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.models import huggingface_decoder, huggingface_encoder, huggingface_encoder_decoder
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.models.encoder import Encoder, EncoderConfig
from glasshouse.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from glasshouse.models.huggingface_config import (
    NEVER,
    WHOLE,
    Layout,
    quantization_bits,
    quantization_config,
    say_value,
)
from glasshouse.models.huggingface_decoder import decoder_family, decoder_layout, read_decoder, write_decoder
from glasshouse.models.huggingface_encoder import (
    encoder_architecture,
    encoder_family,
    encoder_layout,
    read_encoder,
    without_pooler,
    write_encoder,
)
from glasshouse.models.huggingface_encoder_decoder import (
    encoder_decoder_family,
    encoder_decoder_layout,
    read_encoder_decoder,
    with_head,
    write_encoder_decoder,
)
from glasshouse.models.layers import QuantizedLinear, swap_linears

ModelConfig = DecoderConfig | EncoderConfig | EncoderDecoderConfig
Model = Decoder | Encoder | EncoderDecoder
ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    **huggingface_decoder.ARCHITECTURES,
    **huggingface_encoder.ARCHITECTURES,
    **huggingface_encoder_decoder.ARCHITECTURES,
}
"""model_type: the classes that transformers opens it with and that are opened here."""


# ---- config


def family_of(facts: Any) -> tuple[str, str]:
    """The family (`model_type`) that a Hugging Face config names, and the class (the first of its `architectures`).

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
        raise InputError(f"unknown model family {say_value(family)}", "model_type", known)
    if facts.get("quantization_config") and bits_of(facts) is None:
        raise InputError("the weights are quantized", "quantization_config", "open the unquantized model")
    known_classes = ARCHITECTURES[family]
    named = facts.get("architectures")
    if named in (None, []):
        named = [known_classes[0]]
    if not isinstance(named, list) or len(named) != 1 or named[0] not in known_classes:
        named = named[0] if isinstance(named, list) else named
        raise InputError(
            f"{say_value(named)} is not a model that is opened here",
            "architectures",
            f"give a {' or '.join(known_classes)}",
        )
    return family, named[0]


def bits_of(facts: Any) -> int | None:
    """The bits of the weights that a config.json describes, if they are few and laid out as they are here; else None."""
    return quantization_bits(facts["quantization_config"]) if facts.get("quantization_config") else None


def config_from_huggingface(facts: Any) -> ModelConfig:
    """The shape of the model that a Hugging Face `config.json` describes; absent keys mean what transformers takes.

    Args:
        facts: the parsed file.

    Raises:
        InputError: unknown family, a value of the wrong kind or size, or a feature that is not supported. `where` is
            the key.
    """
    family, architecture = family_of(facts)
    if family in huggingface_encoder.ARCHITECTURES:
        return read_encoder(facts, family, architecture)
    if family in huggingface_encoder_decoder.ARCHITECTURES:
        return read_encoder_decoder(facts, family)
    return read_decoder(facts, family)


def config_to_huggingface(
    config: ModelConfig, token_ids: Mapping[str, int | list[int] | None], dtype: str
) -> dict[str, Any]:
    """What `config.json` says of a model, in the spelling of transformers 5 and in the one that older readers know.

    Args:
        config: the model's shape.
        token_ids: "bos_token_id", "eos_token_id" and "pad_token_id", and "decoder_start_token_id" of an
            encoder-decoder; None where there is none.
        dtype: number format of the weights: "float32", "bfloat16" or "float16".

    Raises:
        InputError: no family holds this shape.
    """
    family = family_for(config)
    is_encoder = isinstance(config, EncoderConfig)
    architecture = encoder_architecture(config) if is_encoder else ARCHITECTURES[family][0]
    shared = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "dtype": dtype,
        "torch_dtype": dtype,
        **{key: token_ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    if isinstance(config, EncoderDecoderConfig):
        return shared | write_encoder_decoder(config, token_ids)
    return shared | (write_encoder(config, token_ids) if is_encoder else write_decoder(config))


def family_for(config: ModelConfig) -> str:
    """The family (`model_type`) that holds this model on disk.

    Raises:
        InputError: none of them can say what the config says.
    """
    if isinstance(config, EncoderDecoderConfig):
        return encoder_decoder_family(config)
    return encoder_family(config) if isinstance(config, EncoderConfig) else decoder_family(config)


def layout_for(config: ModelConfig) -> Layout:
    """The layout of the family that holds this model on disk."""
    if isinstance(config, EncoderDecoderConfig):
        return encoder_decoder_layout(config)
    return encoder_layout(config) if isinstance(config, EncoderConfig) else decoder_layout(config)


def build_model(config: ModelConfig, bits: int | None = None) -> Model:
    """A model of this shape, its weights as yet without meaning, in 8 or 4 bits where that is asked for."""
    if isinstance(config, EncoderDecoderConfig):
        model = EncoderDecoder(config)
    else:
        model = Encoder(config) if isinstance(config, EncoderConfig) else Decoder(config)
    if bits is not None:
        swap_linears(
            model,
            lambda layer: QuantizedLinear(
                layer.in_features, layer.out_features, bits, layer.bias, layer.weight.device
            ),
        )
    return model


def quantization_facts(model: Model) -> dict[str, Any]:
    """What config.json says, beside the rest, of a model with weights of few bits; nothing of another.

    Raises:
        InputError: its family on disk has no place for such weights.
    """
    bits = {layer.bits for name, layer in _quantized(model).items() if name != "head"}
    if not bits:
        return {}
    narrow = [name for name, layer in _quantized(model).items() if layer.in_features % 32]
    if (
        not isinstance(model, Decoder)
        or layout_for(model.config).transposed != NEVER
        or narrow
        or len(bits) > 1
    ):
        raise InputError(
            "int8 and int4 are saved for decoders in the layouts of Llama, Mistral and Qwen, of widths that 32 divides",
            narrow[0] if narrow else family_for(model.config),
            "save the model as it is, and quantize it when it is opened",
        )
    return {"quantization_config": quantization_config(bits.pop(), ["lm_head"])}


def state_to_store(model: Model) -> dict[str, Tensor]:
    """What is written of a model, by our names: all of its state but a head of int8, which is made anew on opening.

    Raises:
        InputError: that head was made from a matrix that is not there any more.
    """
    if not isinstance(model, Decoder) or "head" not in _quantized(model):
        return model.state_dict()
    if not model.config.tie_embeddings:
        raise InputError("the head is quantized", "head", "save from the model that is not quantized yet")
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}


def _quantized(model: Model) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def fit_to_tensors(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """The shape of the model that a file with these tensors holds, where its config leaves that open."""
    if isinstance(config, EncoderDecoderConfig):
        return with_head(config, names)
    return without_pooler(config, names) if isinstance(config, EncoderConfig) else config


# ---- tensors


@dataclass(frozen=True)
class Stored:
    """One tensor on disk.

    Args:
        parts: our names of the tensors it holds, one after another along their first dimension.
        transposed: whether rows and columns are exchanged on disk (GPT-2's Conv1D).
    """

    parts: tuple[str, ...]
    transposed: bool

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our tensors to the one on disk; a view of ours where nothing has to move."""
        parts = [tensors[name] for name in self.parts]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.t() if self.transposed else whole

    def split(self, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The tensor on disk to ours, given our shapes; views of it where nothing has to move."""
        whole = tensor.t() if self.transposed else tensor
        pieces = whole.split([shapes[name][0] for name in self.parts])
        return dict(zip(self.parts, pieces, strict=True))

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape on disk, given our shapes."""
        whole = (sum(shapes[name][0] for name in self.parts), *shapes[self.parts[0]][1:])
        return whole[::-1] if self.transposed else whole


def stored_tensors(config: ModelConfig, names: Iterable[str]) -> dict[str, Stored]:
    """The tensors on disk, by name, that hold a model's.

    Args:
        config: the model's shape.
        names: the names in its `state_dict`. A tied head is not among them, and so is not on disk.

    Raises:
        InputError: the family has no place for one of them.
    """
    layout = layout_for(config)
    order = {module: index for index, module in enumerate(layout.modules)}
    parts: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        module, _, kind = name.rpartition(
            "."
        )  # a parameter of the model itself has no module: its name is the key
        layer = re.search(r"\blayers\.(\d+)\.", module)
        template = module.replace(f"layers.{layer[1]}.", "layers.N.", 1) if layer else module or kind
        if template not in layout.modules:
            raise InputError(
                f"the {family_for(config)} layout has no place for a tensor",
                name,
                "save it as another family",
            )
        stored = layout.modules[template]
        stored = stored.replace(".N.", f".{layer[1]}.") if layer else stored
        stored = f"{stored}.{kind}" if module else stored
        parts.setdefault(stored, []).append((order[template], name))
    return {
        stored: Stored(
            tuple(name for _, name in sorted(found)), re.search(layout.transposed, stored) is not None
        )
        for stored, found in parts.items()
    }


def canonical_name(config: ModelConfig, name: str) -> str | None:
    """The full name of a stored tensor, whether or not the file left the family's prefix out or uses an older
    spelling; None for a constant."""
    layout = layout_for(config)
    if re.search(layout.constant, name):
        return None
    for pattern, replacement in layout.older:
        name = re.sub(pattern, replacement, name)
    return name if name.startswith((layout.prefix, *layout.outside)) else layout.prefix + name


def copied_tensors(config: ModelConfig) -> Mapping[str, str]:
    """Names under which a file may hold a tensor once more, as some tools write a tied head: to the name that counts."""
    return layout_for(config).copies
