"""GGUF files through the `gguf` package: written one tensor at a time, and read back whole to see that it is so.

Knows number formats, fields and checksums; nothing of what the tensors mean.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.export.library import require_library

NUMBER_FORMATS = ("f32", "f16", "bf16", "q8_0", "q4_0")
BLOCK = 32
FLOAT16_LARGEST = 65504.0
BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
"""Bits that one weight takes; a block of 32 has a scale of 16."""


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Args:
        shape: its shape.
        number_format: one of `NUMBER_FORMATS`.
        read: gives the tensor when its turn comes.
    """

    shape: tuple[int, ...]
    number_format: str
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape) * BITS[self.number_format] / 8)


def number_format_for(wanted: str, shape: tuple[int, ...], keep_better: bool) -> str:
    """The number format of one tensor, given the one that was asked for.

    Vectors stay float32; rows that blocks of 32 do not fill, float16. With q4_0 what turns hidden vectors into logits
    is kept in q8_0: its errors reach every prediction.

    Args:
        wanted: what was asked for.
        shape: of the tensor.
        keep_better: whether it is the output matrix.
    """
    if len(shape) == 1:
        return "f32"
    if wanted.startswith("q") and shape[-1] % BLOCK:
        return "f16"
    return "q8_0" if wanted == "q4_0" and keep_better else wanted


def encode(tensor: Tensor, number_format: str, name: str) -> np.ndarray:
    """A tensor as the bytes of its number format; quantized by the `gguf` package's own rules.

    Raises:
        InputError: a value is too large for float16, or is no number.
    """
    gguf = require_library("gguf")
    values = tensor.detach().cpu().to(torch.float32).contiguous().numpy()
    if not np.isfinite(values).all():
        raise InputError("a weight is not a finite number", name, "the model is damaged or training diverged")
    if number_format == "f16" and np.abs(values).max(initial=0.0) > FLOAT16_LARGEST:
        raise InputError("a weight is too large for float16", name, "choose --type bf16 or f32")
    if number_format in ("f32", "f16"):
        return values.astype(np.float32 if number_format == "f32" else np.float16)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[number_format.upper()])


def write_gguf(path: Path, fields: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, str]:
    """Write a file, holding one tensor in memory at a time.

    Args:
        path: the file to make.
        fields: by full name: whole numbers, floats, booleans, strings, and lists of strings or of whole numbers;
            "general.architecture" among them.
        entries: the tensors, in order.

    Returns:
        The SHA-256 of every tensor's bytes.

    Raises:
        InputError: `gguf` is not installed, or a weight does not fit its number format.
        OSError: the disk is full.
    """
    gguf = require_library("gguf")
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    try:
        for name, value in fields.items():
            if name != "general.architecture":
                _add_field(writer, name, value)
        for name, entry in entries.items():
            kind = gguf.GGMLQuantizationType[entry.number_format.upper()]
            writer.add_tensor_info(name, entry.shape, np.dtype(np.float32), entry.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        digests = {}
        for name, entry in entries.items():
            data = encode(entry.read(), entry.number_format, name)
            digests[name] = hashlib.sha256(data.data).hexdigest()
            writer.write_tensor_data(data)
    finally:
        writer.close()
    return digests


def _add_field(writer: Any, name: str, value: Any) -> None:
    """One field in the type that llama.cpp reads it in."""
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


class GGUFFile:
    """A file that is read back.

    Args:
        path: the file.
    """

    def __init__(self, path: Path):
        self._reader = require_library("gguf").GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in the file's order."""
        return list(self._tensors)

    def fields(self) -> dict[str, Any]:
        """Every field but the file's own bookkeeping."""
        fields = self._reader.fields
        return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}

    def digest(self, name: str) -> str:
        """The SHA-256 of a tensor's bytes."""
        return hashlib.sha256(np.ascontiguousarray(self._tensors[name].data).data).hexdigest()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and values, float32, one at a time."""
        gguf = require_library("gguf")
        for name, tensor in self._tensors.items():
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            yield name, torch.from_numpy(np.array(values, dtype=np.float32))


def check_gguf(file: GGUFFile, fields: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Compare every field and every tensor of a file that was read back with what was to be written.

    Raises:
        InputError: one differs.
    """
    read = file.fields()
    expected = {name: _rounded(value) for name, value in fields.items()}
    for name in sorted(set(read) | set(expected)):
        if read.get(name) != expected.get(name):
            raise InputError("a field was not written as it is", name, "report it; the export was removed")
    if file.names != list(digests) or any(file.digest(name) != digests[name] for name in digests):
        raise InputError(
            "a tensor was not written as it is", "GGUF", "check the disk; the export was removed"
        )


def _rounded(value: Any) -> Any:
    return float(np.float32(value)) if isinstance(value, float) else value
