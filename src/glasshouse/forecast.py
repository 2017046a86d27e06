"""What a recipe will need, in words, before anything runs: the verb `plan`.

The model's real shape is timed for a few steps on this machine, or, for GPUs that are not here, worked out from their data sheet; nothing is
written. Where the corpus is not prepared
yet, its size is estimated from the files. Knows what is asked for and how to say it; `plan.py` does the arithmetic.
"""

from dataclasses import fields, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from glasshouse.corpus.documents import ReadCounts, ReadPolicy, read_documents
from glasshouse.device import Device, open_device
from glasshouse.errors import InputError
from glasshouse.text.packing import open_corpus
from glasshouse.text.prepare import PrepareConfig, choose_vocab_size
from glasshouse.training.plan import Plan, Prediction, ShapeRequest, power, predict, settle
from glasshouse.training.pretrain import PretrainConfig, chosen_optimization
from glasshouse.training.progress import clock

BYTES_PER_TOKEN = 3.2
"""Of a vocabulary chosen for the text, before it is known: what small English and Chinese corpora come to."""

READ_FOR_ESTIMATE = 64 * 2**20
"""Bytes of text counted before the rest of a large corpus is taken from the sizes of its files."""


def print_forecast(config: PretrainConfig, preparation: PrepareConfig | None, gpus: int) -> None:
    """Print what a pretraining run will need.

    Args:
        config: its settings; `corpus` is looked at only without `preparation`.
        preparation: how its corpus will be prepared, when that comes first.
        gpus: number of GPUs to plan for; 0 plans for the device of the settings.

    Raises:
        InputError: the settings, the text or the machine do not allow it.
    """
    if gpus and not torch.cuda.is_available():
        device = Device("cuda", "bfloat16", config.seed, config.threads)
    else:
        device = open_device("cuda" if gpus else config.device, config.dtype, config.seed, config.threads)
    if preparation is None:
        corpus = open_corpus(
            config.corpus / "corpus" if (config.corpus / "corpus").is_dir() else config.corpus
        )
        vocab_size, tokens, known = corpus.vocab_size, corpus.split("train").tokens, "as prepared"
    else:
        vocab_size, tokens = estimate_corpus(preparation)
        known = "estimated from the text, before cleaning"
    device = replace(device, world_size=max(1, gpus))
    optimization = chosen_optimization(config)
    request = ShapeRequest(**{item.name: getattr(config, item.name) for item in fields(ShapeRequest)})
    plan = settle(request, optimization, device, vocab_size, tokens)
    prediction = predict(plan, optimization, device)
    table = Table.grid(padding=(0, 3))
    for name, value in _rows(plan, prediction, tokens, known, power(device)).items():
        table.add_row(name, value)
    Console(highlight=False).print(table)


def estimate_corpus(preparation: PrepareConfig) -> tuple[int, int]:
    """Vocabulary size and training tokens that some text will have, from its length.

    Raises:
        InputError: the text cannot be read, or holds none.
    """
    policy = ReadPolicy(
        text_field=preparation.text_field, text_unit=preparation.text_unit, encoding=preparation.encoding
    )
    size = 0
    for document in read_documents(preparation.documents, policy, ReadCounts()):
        size += len(document.text.encode("utf-8", "replace"))
        if size > READ_FOR_ESTIMATE:
            size = max(size, sum(_file_bytes(Path(path)) for path in preparation.documents))
            break
    if not size:
        raise InputError("no text there", ", ".join(preparation.documents), "give other documents")
    tokens = int(size * (1 - preparation.validation_fraction) / BYTES_PER_TOKEN)
    return preparation.vocab_size or choose_vocab_size(size), tokens


def _file_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _rows(plan: Plan, prediction: Prediction, tokens: int, known: str, watts: float) -> dict[str, str]:
    shape, model = plan.shape, plan.shape.model
    return {
        "model": f"{prediction.parameters / 1e6:,.1f} M: {model.num_layers} layers of width {model.embedding_dim}, "
        f"{model.num_heads} heads, vocabulary {model.vocab_size:,}",
        "corpus": f"{tokens:,} tokens ({known})",
        "training": f"{shape.steps:,} steps of {shape.rows * shape.context:,} tokens: "
        f"{shape.tokens / tokens:.1f} passes over the corpus{', compiled' if plan.compiled else ''}",
        "time": clock(prediction.seconds),
        "memory": f"{prediction.memory / 1e9:.2f} GB, beside what Python and PyTorch hold themselves",
        "compute": f"{prediction.flops:.2e} floating-point operations",
        "energy": f"{prediction.joules / 3600:.1f} Wh at {watts:,.0f} W, assumed",
        "found by": prediction.method,
    }
