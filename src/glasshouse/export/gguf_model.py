"""A model as one GGUF file: written, read back field by field, and loaded again into a model of ours to replay prompts.

Knows which family is laid out how; nothing of folders, and nothing of llama.cpp but its file.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.artifact import Artifact
from glasshouse.errors import InputError
from glasshouse.export.gguf_decoder import (
    ROPE_FACTORS,
    Laid,
    architecture_of,
    config_from_fields,
    decoder_fields,
    decoder_tensors,
    rope_factors,
    usable_context,
)
from glasshouse.export.gguf_encoder import (
    encoder_architecture,
    encoder_fields,
    encoder_from_fields,
    encoder_tensors,
)
from glasshouse.export.gguf_file import Entry, GGUFFile, check_gguf, number_format_for, write_gguf
from glasshouse.export.gguf_tokenizer import tokenizer_fields
from glasshouse.export.library import require_library
from glasshouse.files import read_json
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.models.encoder import Encoder, EncoderConfig, HeadConfig, with_head
from glasshouse.models.encoder_decoder import EncoderDecoder
from glasshouse.models.huggingface import Model
from glasshouse.models.layers import rotary_frequencies

FILE_TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
QUANTIZATION_VERSION = 2
Exportable = Decoder | Encoder


def exportable(model: Model) -> Exportable:
    """The part of a model that a GGUF file holds: a decoder, or an encoder without its head.

    Raises:
        InputError: it is an encoder-decoder.
    """
    if isinstance(model, EncoderDecoder):
        raise InputError(
            "a GGUF file of an encoder-decoder needs a SentencePiece tokenizer, which this model has not",
            "--to",
            "choose --to onnx, or serve it with glasshouse",
        )
    return model if isinstance(model, Decoder) else with_head(model, HeadConfig("none"), 0)


def readable_context(model: Exportable) -> int:
    """How many positions llama.cpp computes as we do."""
    if isinstance(model, Decoder):
        return usable_context(model.config)
    return model.config.context_length


def _shape_fields(config: DecoderConfig | EncoderConfig) -> dict[str, Any]:
    if isinstance(config, DecoderConfig):
        return {"general.architecture": architecture_of(config), **decoder_fields(config)}
    return {"general.architecture": encoder_architecture(config), **encoder_fields(config)}


def _laid_tensors(config: DecoderConfig | EncoderConfig, names: Mapping[str, Any]) -> dict[str, Laid]:
    if isinstance(config, DecoderConfig):
        return decoder_tensors(config, names)
    return encoder_tensors(config, names)


def save_gguf(path: Path, artifact: Artifact, name: str, number_format: str) -> None:
    """Write a model with its tokenizer, and read every field and tensor back.

    Args:
        path: the file to make.
        artifact: the model.
        name: what the file says its name is.
        number_format: of the matrices: "f32", "f16", "bf16", "q8_0" or "q4_0".

    Raises:
        InputError: llama.cpp cannot compute this model or read its tokenizer; a weight does not fit the number format;
            or what is read back is not what was written.
        OSError: the disk is full.
    """
    model, gguf = exportable(artifact.model), require_library("gguf")
    config = replace(model.config, vocab_size=artifact.tokenizer.vocab_size)
    parts = read_json(artifact.path / "tokenizer.json")
    fields: dict[str, Any] = {
        "general.name": name,
        "general.file_type": int(gguf.LlamaFileType[FILE_TYPES[number_format]]),
        "general.quantization_version": QUANTIZATION_VERSION,
        **_shape_fields(config),
        **tokenizer_fields(parts, artifact.tokenizer),
    }
    digests = write_gguf(path, fields, plan_tensors(model, config.vocab_size, number_format))
    check_gguf(GGUFFile(path), fields, digests)


def plan_tensors(model: Exportable, tokens: int, number_format: str) -> dict[str, Entry]:
    """Every tensor of the file, each joined only when its turn comes.

    An embedding may have more rows than there are tokens, to make its size round: llama.cpp would say them, so they are
    left out, as our engine leaves them out.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors |= {
        name: tensors[name][:tokens] for name in ("embedding.weight", "head.weight") if name in tensors
    }
    head = "head.weight" if "head.weight" in tensors else "embedding.weight"
    entries = {}
    for name, laid in _laid_tensors(model.config, tensors).items():
        rows = sum(tensors[part].shape[0] for part in laid.parts)
        shape = (rows, *tensors[laid.parts[0]].shape[1:])
        added = {"position_embedding.weight", "token_type_embedding.weight"} & set(laid.parts)
        kept = "f32" if added else number_format_for(number_format, shape, head in laid.parts)
        entries[name] = Entry(shape, kept, lambda laid=laid: laid.join(tensors))
    factors = rope_factors(model.config) if isinstance(model, Decoder) else None
    if factors is not None:
        entries[ROPE_FACTORS] = Entry(tuple(factors.shape), "f32", lambda: factors)
    return entries


def open_gguf(path: Path, scaling: Mapping[str, Any] | None) -> Exportable:
    """A model of ours with the shape and the weights that a file holds, dequantized to float32.

    Args:
        path: a file that `save_gguf` wrote.
        scaling: the rotary scaling that its tensor of factors, where it has one, must stand for.

    Raises:
        InputError: the factors are not those of the scaling.
    """
    file = GGUFFile(path)
    config = _read_shape(file, scaling)
    with torch.device("meta"):
        model = Decoder(config) if isinstance(config, DecoderConfig) else Encoder(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    laid, state = _laid_tensors(config, shapes), dict[str, Tensor]()
    for name, tensor in file.tensors():
        if name == ROPE_FACTORS and isinstance(config, DecoderConfig):
            _check_factors(tensor, config)
        else:
            state |= laid[name].split(tensor, shapes)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read_shape(file: GGUFFile, scaling: Mapping[str, Any] | None) -> DecoderConfig | EncoderConfig:
    fields = file.fields()
    if fields["general.architecture"] in ("modern-bert", "bert"):
        return encoder_from_fields(fields)
    config = config_from_fields(fields, [name for name in file.names if name != ROPE_FACTORS])
    return replace(config, rope_scaling=scaling) if ROPE_FACTORS in file.names else config


def _check_factors(factors: Tensor, config: DecoderConfig) -> None:
    plain = rotary_frequencies(config.head_dim, config.rope_theta, None)
    scaled = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    if not torch.allclose(plain / factors, scaled, rtol=1e-6):
        raise InputError("the rotary factors are not those of the model", ROPE_FACTORS, "report it")


def gguf_remarks(model: Model, number_format: str, entries: Mapping[str, Entry]) -> list[str]:
    """What a person should know of the file beside its name: what was kept finer, and what it cannot say."""
    remarks = []
    kept: dict[str, int] = {}
    for entry in entries.values():
        if len(entry.shape) > 1 and entry.number_format != number_format:
            kept[entry.number_format] = kept.get(entry.number_format, 0) + 1
    for finer, count in kept.items():
        remarks.append(f"{count} {'matrix' if count == 1 else 'matrices'} kept in {finer}")
    if isinstance(model, Decoder) and usable_context(model.config) < model.config.context_length:
        remarks.append(
            f"context cut from {model.config.context_length:,} to the sliding window of "
            f"{model.config.sliding_window:,}: llama.cpp knows no window in this layout, and up to there it computes the same"
        )
    if isinstance(model, Encoder) and model.head is not None:
        remarks.append(
            "the head is left out: llama.cpp makes vectors of texts with it (the mean of its tokens')"
        )
    return remarks
