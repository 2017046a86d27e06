"""Models with weights of 8 or 4 bits: made from any model, kept on disk, and what the lost precision costs, measured.

Rounded to nearest without any data (`models/layers.py` says how). A decoder's head is always int8: of all matrices it is
the one where 4 bits cost most. Knows models and artifacts; nothing of terminals.
"""

import copy
import gzip
import json
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from glasshouse.artifact import Artifact, save_artifact
from glasshouse.errors import InputError
from glasshouse.models.decoder import Decoder, quantize_head
from glasshouse.models.layers import QuantizedLinear, swap_linears
from glasshouse.text.tokenizer import Tokenizer

KINDS = {"int8": 8, "int4": 4}
SAMPLE_FILES = ("books_en.jsonl.gz", "primer_zh.jsonl", "primer_en.jsonl")
SAMPLE_TOKENS = 1024
"""Tokens on which the price of quantization is measured: a second's work for a model of 100 million parameters."""
DOCUMENT_TOKENS = 128
LARGE_PAGE = 2**21
AnyModel = TypeVar("AnyModel", bound=nn.Module)


def quantize(model: AnyModel, kind: str) -> AnyModel:
    """A copy of a model with the linear layers of its blocks in 8 or 4 bits, and a decoder's head in 8.

    Embeddings and norms are shared with the model, not copied.

    Args:
        model: in evaluation mode, on any device.
        kind: a key of `KINDS`.

    Raises:
        InputError: an unknown kind, or a model that is quantized already.
    """
    made = _with_rounded_blocks(model, kind)
    if isinstance(made, Decoder):
        quantize_head(made)
    return made


def quantize_artifact(artifact: Artifact, kind: str) -> tuple[Artifact, str]:
    """The same with weights of 8 or 4 bits, and what that costs, measured where the model predicts text.

    Raises:
        InputError: an unknown kind, or a model that is quantized already.
    """
    model, made = artifact.model, quantize(artifact.model, kind)
    price = ""
    if isinstance(model, Decoder) and isinstance(made, Decoder):
        price = str(quantization_price(model, made, kind, artifact.tokenizer))
    return replace(artifact, model=made), price


def _with_rounded_blocks(model: AnyModel, kind: str) -> AnyModel:
    if kind not in KINDS:
        raise InputError(f"unknown quantization {kind!r}", "--quantize", f"use {' or '.join(KINDS)}")
    if any(isinstance(layer, QuantizedLinear) for layer in model.modules()):
        raise InputError("the model is quantized already", "--quantize", "leave it out")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, shared)
    swap_linears(made, lambda layer: QuantizedLinear.from_linear(layer.weight, layer.bias, KINDS[kind]))
    return made


def save_quantized(folder: Path, artifact: Artifact, kind: str) -> str:
    """Write a model folder with weights of few bits, in the layout of compressed-tensors, which vLLM and transformers read.

    The embedding and the head keep their format on disk; the head becomes int8 when the folder is opened here.

    Args:
        folder: where.
        artifact: a model of plain weights.
        kind: a key of `KINDS`.

    Returns:
        The digest of its manifest.

    Raises:
        InputError: an unknown kind, a quantized model, or a family whose layout has no place for such weights.
    """
    made = _with_rounded_blocks(artifact.model, kind)
    return save_artifact(folder, made, artifact.tokenizer, generation=artifact.generation)


# ---- what it costs


@dataclass(frozen=True)
class Price:
    """What quantization costs and saves.

    Args:
        kind: "int8" or "int4".
        bits_before: bits per byte of the sample under the model.
        bits_after: the same under the quantized model.
        bytes_before: memory of the model's weights.
        bytes_after: memory of the quantized model's weights.
        tokens: tokens that were predicted, by both.
    """

    kind: str
    bits_before: float
    bits_after: float
    bytes_before: int
    bytes_after: int
    tokens: int

    @property
    def increase(self) -> float:
        """By how much the bits per byte rise, as a share."""
        return self.bits_after / self.bits_before - 1

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.bits_after:.4f} bits per byte instead of {self.bits_before:.4f} ({self.increase:+.2%}), "
            f"measured on {self.tokens:,} tokens; {_size(self.bytes_after)} of weights instead of {_size(self.bytes_before)}"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def quantization_price(
    model: Decoder,
    quantized: Decoder,
    kind: str,
    tokenizer: Tokenizer,
    texts: Sequence[str] | None = None,
    tokens: int = SAMPLE_TOKENS,
) -> Price:
    """Measure both models on the same text.

    Args:
        model: before.
        quantized: after.
        kind: of the quantization.
        tokenizer: of both.
        texts: the sample; None for text that comes with the package, of several kinds and two languages.
        tokens: about how many tokens to predict; of each text the first ones.
    """
    documents, size = _documents(tokenizer, sample_texts() if texts is None else texts, model, tokens)
    before, after = (sum(_nats(one, document) for document in documents) for one in (model, quantized))
    count = sum(len(document) - 1 for document in documents)
    bits = [nats / math.log(2) / size for nats in (before, after)]
    return Price(kind, bits[0], bits[1], weight_bytes(model), weight_bytes(quantized), count)


def sample_texts() -> list[str]:
    """A fixed sample of the text that comes with the package: stories, and descriptions in English and Chinese."""
    folder = Path(__file__).parent.parent / "data"
    by_file = [list(_every(folder / name, 40)) for name in SAMPLE_FILES]
    return [texts[number] for number in range(min(map(len, by_file))) for texts in by_file]


def _every(path: Path, step: int) -> Iterator[str]:
    content = path.read_bytes()
    lines = (gzip.decompress(content) if path.suffix == ".gz" else content).decode().splitlines()
    yield from (json.loads(line)["text"] for line in lines[::step])


def _documents(
    tokenizer: Tokenizer, texts: Sequence[str], model: Decoder, most: int
) -> tuple[list[list[int]], int]:
    """The first tokens of texts, each after its start, until there are enough; and the bytes that they spell."""
    documents, size, count = [], 0, 0
    for text in texts:
        document = tokenizer.prompt(text)[: min(DOCUMENT_TOKENS, model.config.context_length)]
        if count < most and len(document) > 1:
            documents.append(document)
            size += len(tokenizer.decode(document[1:]).encode())
            count += len(document) - 1
    if not documents:
        raise InputError("no text to measure on", "texts", "give some that is longer than a token")
    return documents, size


@torch.inference_mode()
def _nats(model: Decoder, document: list[int]) -> float:
    """What the tokens after the first cost, in nats."""
    tokens = torch.tensor(document, device=model.embedding.weight.device)
    logits = model.logits(model(tokens[None, :-1])[0]).float()
    return functional.cross_entropy(logits, tokens[1:], reduction="sum").item()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and codes; what is shared between layers counts once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


# ---- where weights lie


def settle(model: nn.Module) -> None:
    """Move a model's weights on the CPU into large memory pages: decoding reads them all for every token, and with small
    pages spends a quarter of the time looking addresses up. Weights mapped from a file are read in by it. Elsewhere than
    on Linux nothing is done."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    wanted = [tensor for tensor in tensors.values() if tensor.device.type == "cpu" and tensor.is_contiguous()]
    room = sum(-(-tensor.nbytes // 64) * 64 for tensor in wanted)
    if room < 4 * LARGE_PAGE or getattr(mmap, "MADV_HUGEPAGE", None) is None:
        return
    arena = _large_pages(room)
    start = 0
    for tensor in wanted:
        place = arena[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor.detach())
        tensor.data = place
        start += -(-tensor.nbytes // 64) * 64


def _large_pages(size: int) -> Tensor:
    """Bytes that begin on a large page and lie in such where the system has them."""
    length = -(-size // LARGE_PAGE) * LARGE_PAGE + LARGE_PAGE
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % LARGE_PAGE :][:size]
