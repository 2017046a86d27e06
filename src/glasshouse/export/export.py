"""The verb `export`: a model in, a folder in another tool's format out, proved by replaying prompts through it.

The folder is written under a temporary name and takes its own only when the exported model, read back from the file,
says what the model says. Knows which formats there are; how each is laid out is the business of its module.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glasshouse.artifact import (
    CONFIG_FILE,
    GENERATION_FILE,
    TOKENIZER_FILES,
    Artifact,
    open_artifact,
)
from glasshouse.errors import InputError
from glasshouse.export.gguf_file import BITS, NUMBER_FORMATS
from glasshouse.export.gguf_model import (
    exportable,
    gguf_remarks,
    open_gguf,
    plan_tensors,
    readable_context,
    save_gguf,
)
from glasshouse.export.gguf_tokenizer import tokenizer_remarks
from glasshouse.export.modelfile import modelfile
from glasshouse.export.onnx_model import save_graphs
from glasshouse.export.onnx_session import ExportedModel
from glasshouse.export.replay import (
    Comparison,
    compare_rows,
    predicts_tokens,
    read_rows,
    replayed_texts,
    require_close,
)
from glasshouse.files import (
    MANIFEST,
    atomic_folder,
    read_json,
    recover_folder,
    require_free,
    write_atomic,
    write_json,
)
from glasshouse.inference.quantization import KINDS, save_quantized
from glasshouse.models.decoder import Decoder
from glasshouse.models.layers import QuantizedLinear

FORMATS = ("gguf", "onnx", *KINDS)
RECORD = "export.json"
BESIDE = (CONFIG_FILE, GENERATION_FILE, *TOKENIZER_FILES)
"""Files of the model that lie beside its graphs."""
LIMITS = {"f32": 1e-5, "f16": 0.01, "bf16": 0.1, "q8_0": 0.2, "q4_0": 1.0, "int8": 0.2, "int4": 1.0}
"""The typical logit difference allowed, as a share of the logits' spread, by number format: wide enough for weights
drawn at random, which rounding hurts most; two models that have nothing to do with each other are 1.4 apart."""


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and how.

    Args:
        model: a run, a model folder, or a folder in Hugging Face layout.
        to: "gguf", "onnx", "int8" or "int4"; the last two are model folders of weights with few bits.
        number_format: of the matrices in a GGUF file; empty for float16. ONNX is float32.
        out: the folder to make; None for exports/NAME-FORMAT.
        limit: the typical logit difference allowed, as a share of the logits' spread; None for the format's own.
    """

    model: str
    to: str
    number_format: str = ""
    out: Path | None = None
    limit: float | None = None


def export_model(settings: ExportSettings) -> Path:
    """Export a model, print what was compared, and return the folder.

    A folder that an earlier export made is replaced in one step; it stays whole when the new export fails.

    Raises:
        InputError: the format cannot hold the model, a library is missing, something else is in the way, the disk is
            full, or the exported model says something else than the model. Nothing is left behind.
    """
    number_format = _checked_format(settings)
    artifact = open_artifact(settings.model)
    _refuse_quantized(artifact)
    name = _name(settings.model, artifact)
    label = f"{settings.to}-{number_format}" if settings.to == "gguf" else settings.to
    folder = settings.out or Path("exports") / f"{name}-{label}"
    _refuse_occupied(folder)
    recover_folder(folder)
    weights = sum(tensor.numel() for tensor in artifact.model.state_dict().values())
    require_free(folder, int(weights * BITS.get(number_format, 16.0) / 8) + 2**20)
    limit = LIMITS[number_format] if settings.limit is None else settings.limit
    with atomic_folder(folder) as temporary:
        if settings.to == "gguf":
            comparison, remarks = _export_gguf(temporary, settings, artifact, name, number_format)
        elif settings.to == "onnx":
            comparison, remarks = _export_onnx(temporary, settings)
        else:
            comparison, remarks = _export_quantized(temporary, settings, artifact)
        require_close(comparison, limit, f"the {label} export")
        facts = {"format": 1, "to": settings.to, "type": number_format, "model": settings.model}
        facts |= {"digest": artifact.digest, "limit": limit, "replay": comparison.facts()}
        write_json(temporary / RECORD, facts)
    print("\n".join([*remarks, f"wrote {folder}"]))
    return folder


def _checked_format(settings: ExportSettings) -> str:
    if settings.to not in FORMATS:
        raise InputError(f"unknown format {settings.to!r}", "--to", f"choose one of {', '.join(FORMATS)}")
    known = {"gguf": NUMBER_FORMATS, "onnx": ("f32",)}.get(settings.to, (settings.to,))
    number_format = settings.number_format or ("f16" if settings.to == "gguf" else known[0])
    if number_format not in known:
        raise InputError(
            f"unknown type {number_format!r} for {settings.to}", "--type", f"choose one of {', '.join(known)}"
        )
    if settings.limit is not None and not 0 < settings.limit < float("inf"):
        raise InputError(f"{settings.limit} is no limit", "--limit", "give a number above 0")
    return number_format


def _name(model: str, artifact: Artifact) -> str:
    """A run's or a folder's own name."""
    path = Path(model) if Path(model).is_dir() else artifact.path
    path = path.resolve()
    return path.parent.name if path.name == "model" and (path.parent / "run.json").exists() else path.name


def _refuse_occupied(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not folder.exists():
        return
    made = (folder / RECORD).is_file() and read_json(folder / MANIFEST).get("files", {})
    if not made or {path.name for path in folder.iterdir()} - set(made) - {MANIFEST}:
        raise InputError("something else is there", str(folder), "choose another --out")


def _refuse_quantized(artifact: Artifact) -> None:
    if any(isinstance(layer, QuantizedLinear) for layer in artifact.model.modules()):
        raise InputError(
            "the model's weights have few bits already",
            str(artifact.path),
            "export the model it was made from",
        )


def _converses(artifact: Artifact) -> bool:
    """Whether the model was trained on conversations. A pretrained one was not, though it has a template."""
    record = artifact.path.parent / "run.json"
    if artifact.path.name == "model" and record.is_file():
        return read_json(record).get("stage") != "pretrain"
    return bool(artifact.tokenizer.chat_template)


def _export_gguf(
    folder: Path, settings: ExportSettings, artifact: Artifact, name: str, number_format: str
) -> tuple[Comparison, list[str]]:
    """Write the file with its Modelfile; say how far what is read back is from the model."""
    file, model, tokenizer = folder / f"{name}.gguf", exportable(artifact.model), artifact.tokenizer
    save_gguf(file, artifact, name, number_format)
    context = readable_context(model)
    if isinstance(model, Decoder):
        text = modelfile(file.name, tokenizer, artifact.generation, context, _converses(artifact))
        write_atomic(folder / "Modelfile", text)
    texts, expected = _model_says(settings.model, context)
    exported = open_gguf(file, model.config.rope_scaling if isinstance(model, Decoder) else None)
    spelled = tokenizer if isinstance(model, Decoder) else None
    comparison = compare_rows(texts, expected, lambda tokens: read_rows(exported, tokens), spelled)
    entries = plan_tensors(model, tokenizer.vocab_size, number_format)
    remarks = comparison.lines("the file as read back, in float32")
    remarks += tokenizer_remarks(read_json(artifact.path / "tokenizer.json"))
    return comparison, [*remarks, *gguf_remarks(artifact.model, number_format, entries)]


def _export_onnx(folder: Path, settings: ExportSettings) -> tuple[Comparison, list[str]]:
    """Write the graphs with the tokenizer's files; say how far what onnxruntime computes is from the model."""
    artifact = open_artifact(settings.model, dtype=torch.float32, verify=False)
    for name in BESIDE:
        if (artifact.path / name).is_file():
            shutil.copyfile(artifact.path / name, folder / name)
    save_graphs(folder, artifact.model)
    texts = replayed_texts(artifact, artifact.config.context_length)
    expected = [read_rows(artifact.model, tokens) for tokens in texts]
    tokenizer = artifact.tokenizer if predicts_tokens(artifact.model) else None
    comparison = compare_rows(texts, expected, ExportedModel(folder).rows, tokenizer)
    return comparison, comparison.lines("onnxruntime")


def _export_quantized(
    folder: Path, settings: ExportSettings, artifact: Artifact
) -> tuple[Comparison, list[str]]:
    """Write a model folder with weights of few bits; say how far it is from the model when it is opened."""
    saved = folder / "saved"
    save_quantized(saved, artifact, settings.to)
    (saved / MANIFEST).unlink()  # the export has one of its own, with its record in it
    for path in saved.iterdir():
        path.rename(folder / path.name)
    saved.rmdir()
    source = open_artifact(settings.model, dtype=torch.float32, verify=False)
    texts = replayed_texts(source, source.config.context_length)
    expected = [read_rows(source.model, tokens) for tokens in texts]
    exported = open_artifact(folder, dtype=torch.float32, verify=False).model
    tokenizer = source.tokenizer if predicts_tokens(source.model) else None
    comparison = compare_rows(texts, expected, lambda tokens: read_rows(exported, tokens), tokenizer)
    return comparison, comparison.lines("the folder as opened again")


def _model_says(path: str, context: int) -> tuple[list[list[int]], list[Tensor]]:
    """The replayed texts, and what the exported part of the model says of each, computed in float32."""
    artifact = open_artifact(path, dtype=torch.float32, verify=False)
    texts, model = replayed_texts(artifact, context), exportable(artifact.model)
    rows = [read_rows(model, tokens) for tokens in texts]
    return texts, [
        row[:, : artifact.tokenizer.vocab_size] if isinstance(model, Decoder) else row for row in rows
    ]
