"""GGUF files hold what was to be written: every field, every tensor, each in its number format."""

import numpy as np
import pytest
import torch

from glasshouse.errors import InputError
from glasshouse.export.gguf_file import (
    BITS,
    Entry,
    GGUFFile,
    check_gguf,
    encode,
    number_format_for,
    write_gguf,
)

FIELDS = {
    "general.architecture": "llama",
    "general.name": "Ünïcode 猫",
    "llama.block_count": 3,
    "llama.rope.freq_base": 5e5,
    "llama.epsilon": 1e-5,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["a", "Ġb", "<|x|>"],
    "tokenizer.ggml.token_type": [1, 1, 3],
}


def matrix(rows: int = 5, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def entries(**tensors: tuple[torch.Tensor, str]) -> dict[str, Entry]:
    return {
        name: Entry(tuple(tensor.shape), kind, lambda tensor=tensor: tensor)
        for name, (tensor, kind) in tensors.items()
    }


def test_fields_and_tensors_come_back(tmp_path):
    tensors = {kind: (matrix(), kind) for kind in BITS} | {"vector": (matrix()[0], "f32")}
    digests = write_gguf(tmp_path / "x.gguf", FIELDS, entries(**tensors))
    file = GGUFFile(tmp_path / "x.gguf")
    check_gguf(file, FIELDS, digests)
    assert file.names == list(tensors)
    assert file.fields()["tokenizer.ggml.tokens"] == FIELDS["tokenizer.ggml.tokens"]
    # Largest rounding error of a value near 3: float16 has 11 bits, bfloat16 8; a block of 32 has 256 or 16 steps,
    # and of the 16 one end is a step short.
    allowed = {"f32": 0.0, "f16": 1e-3, "bf16": 1e-2, "q8_0": 0.015, "q4_0": 0.45, "vector": 0.0}
    for name, values in file.tensors():
        expected = tensors[name][0]
        assert values.shape == expected.shape
        error = float((values - expected).abs().max())
        assert error <= allowed[name], name
        assert allowed[name] == 0.0 or error > allowed[name] / 10, name  # it was rounded, not copied


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"llama.block_count": 4}, "llama.block_count"),
        ({"llama.epsilon": 1.1e-5}, "llama.epsilon"),
        ({"new": 1}, "new"),
        ({"tokenizer.ggml.tokens": ["a"]}, "tokens"),
    ],
)
def test_a_field_that_differs_is_named(change, named, tmp_path):
    digests = write_gguf(tmp_path / "x.gguf", FIELDS, entries(one=(matrix(), "f16")))
    with pytest.raises(InputError, match=named):
        check_gguf(GGUFFile(tmp_path / "x.gguf"), FIELDS | change, digests)


def test_a_flipped_bit_is_seen(tmp_path):
    path = tmp_path / "x.gguf"
    digests = write_gguf(path, FIELDS, entries(one=(matrix(), "q8_0"), two=(matrix(), "f32")))
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="tensor"):
        check_gguf(GGUFFile(path), FIELDS, digests)


@pytest.mark.parametrize(
    ("wanted", "shape", "head", "expected"),
    [
        ("q4_0", (8, 64), False, "q4_0"),
        ("q4_0", (8, 64), True, "q8_0"),
        ("q8_0", (8, 64), True, "q8_0"),
        ("q8_0", (8, 48), False, "f16"),
        ("q4_0", (8, 48), True, "f16"),
        ("f16", (8, 48), True, "f16"),
        ("f32", (8, 48), True, "f32"),
        ("q4_0", (64,), False, "f32"),
        ("f16", (64,), False, "f32"),
    ],
)
def test_number_format_of_a_tensor(wanted, shape, head, expected):
    assert number_format_for(wanted, shape, head) == expected


@pytest.mark.parametrize("kind", BITS)
def test_sizes_are_known_before_writing(kind):
    assert Entry((5, 64), kind, matrix).nbytes == encode(matrix(), kind, "x").nbytes


def test_weights_that_do_not_fit_are_refused_by_name():
    large = torch.full((2, 32), 70000.0)
    with pytest.raises(InputError, match=r"blk\.0.*bf16"):
        encode(large, "f16", "blk.0")
    assert np.isfinite(encode(large, "f32", "blk.0")).all()
    for kind in BITS:
        with pytest.raises(InputError, match="not a finite number"):
            encode(torch.full((2, 32), float("nan")), kind, "blk.0")
