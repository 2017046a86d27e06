"""The C++ kernels against plain PyTorch: every format, odd sizes, rows alone and together, any number of threads."""

import copy
import itertools
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from glasshouse.models import native
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.models.layers import (
    CODE_GROUP,
    FeedForward,
    QuantizedLinear,
    Tap,
    rotary_frequencies,
    rotary_table,
    rotate,
    swap_linears,
)
from glasshouse.models.native import HeadNorms, Matrices, Paged, Pages, Weight

needs_native = pytest.mark.skipif(
    not native.cpu_features() >= native.CPU_FEATURES or not native.build_command(),
    reason="needs a CPU with AVX-512, VNNI and bfloat16, and a C++ compiler",
)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
"""Largest error against float64, relative to the largest result: float32's rounding of sums, bfloat16's of results."""


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    assert found.dtype == dtype
    assert error <= factor * TOLERANCE[dtype], f"relative error {error:.2e}"


def multiply(hidden: Tensor, weights: Sequence[Weight], activation: str = "") -> Tensor:
    return native.linear(hidden, Matrices(weights, hidden.dtype, activation))


def rounded_activations(hidden: Tensor, bits: int) -> Tensor:
    """What the kernels make of activations: multiples of each group's largest / 127."""
    width = hidden.shape[-1]
    groups = functional.pad(hidden.float(), (0, -width % CODE_GROUP[bits])).unflatten(
        -1, (-1, CODE_GROUP[bits])
    )
    largest = groups.abs().amax(-1, keepdim=True)
    codes = (groups * torch.where(largest > 0, 127 / largest, 0.0)).round()
    return (codes.double() * (largest / 127).double()).flatten(-2)[..., :width]


# ---- linear


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "outputs"), [(1, 1), (16, 31), (33, 70), (100, 5), (768, 129), (67, 96)])
def test_plain_linear(dtype: torch.dtype, width: int, outputs: int):
    weight, bias = random(outputs, width, dtype=dtype), random(outputs, dtype=dtype, seed=2)
    for rows in (1, 2, 5, 6, 7, 13, 32, 33):
        hidden = random(rows, width, dtype=dtype, seed=rows)
        for added in (None, bias):
            found = multiply(hidden, (Weight(weight, None, added, outputs, width, 0),))
            expected = functional.linear(
                hidden.double(), weight.double(), None if added is None else added.double()
            )
            assert_close(found, expected, dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("width", "outputs"), [(1, 1), (16, 31), (33, 70), (100, 5), (768, 129), (67, 96)])
def test_quantized_linear(dtype: torch.dtype, bits: int, width: int, outputs: int):
    bias = random(outputs, dtype=dtype, seed=2)
    layer = QuantizedLinear.from_linear(random(outputs, width), bias, bits)
    for rows in (1, 2, 5, 6, 7, 33):
        hidden = random(rows, width, dtype=dtype, seed=rows)
        exact = rounded_activations(hidden, bits) @ layer.weight.double().T + bias.double()
        assert_close(multiply(hidden, (layer.native_weight(),)), exact, dtype)
        # Rounding activations costs little: 0.5 / 127 of a group's largest, at most, each time.
        plain = hidden.double() @ layer.weight.double().T + bias.double()
        assert (exact - plain).norm() <= 0.02 * plain.norm() + 1e-9


@needs_native
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_matrices_at_once_and_the_gate(bits: int, dtype: torch.dtype):
    width, sizes = 96, (64, 40, 33)
    matrices = [
        weight_of(random(size, width, seed=size), random(size, seed=1), bits, dtype) for size in sizes
    ]
    hidden = random(3, 4, width, dtype=dtype)
    together = multiply(hidden, matrices)
    assert together.shape == (3, 4, sum(sizes))
    assert torch.equal(together, torch.cat([multiply(hidden, (matrix,)) for matrix in matrices], -1))

    gate, up = (
        weight_of(random(72, width, seed=seed), random(72, seed=7), bits, torch.float32) for seed in (3, 4)
    )
    hidden = hidden.float()
    gated, upped = (multiply(hidden, (matrix,)).double() for matrix in (gate, up))
    activations = {
        "silu": functional.silu(gated), "relu": gated.relu(), "gelu_tanh": functional.gelu(gated, approximate="tanh"),
    }  # fmt: skip
    assert set(activations) | {""} == set(native.ACTIVATIONS)
    for name, activated in activations.items():
        assert_close(multiply(hidden, (gate, up), name), activated * upped, torch.float32, 2)
        assert_close(multiply(hidden, (gate,), name), activated, torch.float32, 2)


def weight_of(matrix: Tensor, bias: Tensor, bits: int, dtype: torch.dtype) -> Weight:
    if bits:
        return QuantizedLinear.from_linear(matrix, bias.to(dtype), bits).native_weight()
    return Weight(matrix.to(dtype), None, bias.to(dtype), *matrix.shape, 0)


@needs_native
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_rows_beside_it(bits: int, dtype: torch.dtype):
    matrix = weight_of(random(75, 200), random(75), bits, dtype)
    hidden = random(33, 200, dtype=dtype)
    alone = torch.cat([multiply(hidden[row : row + 1], (matrix,)) for row in range(33)])
    for rows in (*range(1, 34),):
        assert torch.equal(multiply(hidden[:rows].contiguous(), (matrix,)), alone[:rows])


@needs_native
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_the_same_numbers_for_any_number_of_threads(bits: int):
    matrix = weight_of(random(600, 300), random(600), bits, torch.bfloat16)
    hidden, before, found = random(9, 300, dtype=torch.bfloat16), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(multiply(hidden, (matrix,)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


@needs_native
def test_extremes_of_int8_do_not_overflow():
    layer = QuantizedLinear.from_linear(torch.full((32, 6400), -1.0), None, 8)
    for sign in (1.0, -1.0):
        hidden = torch.full((1, 6400), sign)
        assert_close(
            layer(hidden), torch.full((1, 32), -sign * 6400 * float(layer.weight[0, 0].abs())), torch.float32
        )


@needs_native
@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bits: int, bad: float):
    matrix = weight_of(random(40, 128), random(40), bits, torch.float32)
    hidden = random(2, 128)
    hidden[1, 77] = bad
    found = multiply(hidden, (matrix,))
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()
    gated = multiply(hidden, (matrix, matrix), "silu")
    assert not gated[1].isfinite().any()


@needs_native
def test_misuse_is_refused():
    matrix = weight_of(random(40, 64), random(40), 8, torch.float32)
    with pytest.raises(ValueError, match="contiguous"):
        multiply(random(64, 3).T, (matrix,))
    with pytest.raises(ValueError, match="fit"):
        multiply(random(3, 200), (matrix,))
    with pytest.raises(ValueError, match="fit"):
        multiply(random(3, 64), (Weight(random(40, 65), None, None, 40, 64, 0),))
    with pytest.raises(ValueError, match="format"):
        multiply(random(3, 64), (Weight(random(40, 64).double(), None, None, 40, 64, 0),))
    with pytest.raises(ValueError, match="kind"):
        multiply(random(3, 64), (matrix, Weight(random(40, 64), None, None, 40, 64, 0)))
    with pytest.raises(ValueError, match="bias"):
        multiply(random(3, 64).bfloat16(), (matrix,))
    with pytest.raises(ValueError, match="three"):
        multiply(random(3, 64), (matrix,) * 4)
    with pytest.raises(ValueError, match="one size"):
        multiply(random(3, 64), (matrix, weight_of(random(41, 64), random(41), 8, torch.float32)), "silu")


# ---- norm, rotation, attention


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 15, 64, 100])
def test_norm(dtype: torch.dtype, width: int):
    hidden, weight = random(3, 2, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    expected = functional.rms_norm(hidden.double(), (width,), weight.double(), 1e-5)
    assert_close(native.norm(hidden, weight, 1e-5), expected, dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 20, 64])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_heads(dtype: torch.dtype, width: int, normed: bool, rows: int):
    hidden = random(3, 5, 40, dtype=dtype)
    weights = [
        Weight(random(count * width, 40, dtype=dtype, seed=count), None, None, count * width, 40, 0)
        for count in (4, 2, 2)
    ]
    positions = torch.arange(rows * 5).view(rows, 5)
    table = rotary_table(positions, rotary_frequencies(width, 10000.0, None), dtype)
    norms = HeadNorms(random(width, dtype=dtype, seed=1), random(width, dtype=dtype, seed=2), 1e-6)
    expected = multiply(hidden, weights).double().unflatten(-1, (8, width)).transpose(1, 2)
    query, key, rest = expected.split([4, 2, 2], dim=1)
    if normed:
        query, key = (
            functional.rms_norm(part, (width,), weight.double(), 1e-6)
            for part, weight in zip((query, key), norms[:2], strict=True)
        )
    doubled = (table[0].double(), table[1].double())
    expected = torch.cat([rotate(query, doubled), rotate(key, doubled), rest], 1).transpose(1, 2)
    found = native.heads(hidden, Matrices(weights, dtype), (4, 2), norms if normed else None, table)
    assert_close(found, expected, dtype, 2 if normed else 1)  # bfloat16 between norm and rotation
    plain = native.heads(hidden, Matrices(weights, dtype), (4, 2), None, None)
    assert torch.equal(plain.flatten(2), multiply(hidden, weights))


def tiny_layers() -> Iterator[FeedForward]:
    yield FeedForward(32, 64, "silu", True, False)
    quantized = FeedForward(32, 64, "silu", True, True)
    swap_linears(quantized, lambda layer: QuantizedLinear.from_linear(layer.weight, layer.bias, 8))
    yield quantized


@needs_native
@torch.inference_mode(False)
def test_weights_that_are_replaced_moved_or_changed_are_seen():
    for layer in tiny_layers():
        hidden = random(3, 32)
        with torch.no_grad():
            before = layer(hidden)
            twin = copy.deepcopy(layer)
            assert torch.equal(pickle.loads(pickle.dumps(layer))(hidden), before)
            for tensor in (*twin.parameters(), *twin.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(2)
            changed = twin(hidden)
            assert not torch.equal(changed, before)
            assert torch.equal(layer(hidden), before)
            layer.load_state_dict(twin.state_dict())
            assert torch.equal(layer(hidden), changed)
            for tensor in (*layer.parameters(), *layer.buffers()):
                tensor.data = tensor.data.clone()
            assert torch.equal(layer(hidden), changed)
            layer.down = FeedForward(32, 64, "silu", True, False).down
            assert not torch.equal(layer(hidden), changed)


@needs_native
@torch.inference_mode(False)
def test_gradients_are_pytorchs():
    layer, hidden = FeedForward(32, 64, "silu", True, False), random(3, 32).requires_grad_()
    layer(hidden).sum().backward()
    assert hidden.grad is not None
    assert layer.gate is not None
    assert layer.gate.weight.grad is not None


@needs_native
def test_rows_of_one_text_see_each_other():
    query, keys, values = (random(3, 2, 16, seed=seed) for seed in range(3))
    pool = [torch.full((2, 8, 2, 16), math.nan) for _ in range(2)]
    tables, lengths = torch.zeros(3, 1, dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    found = native.attend_paged(query, Pages(*pool, tables, lengths), (keys, values))
    expected = functional.scaled_dot_product_attention(
        *(part.double().transpose(0, 1)[None] for part in (query, keys, values)), is_causal=True
    )
    assert_close(found, expected[0].transpose(0, 1), torch.float32)


def paged(keys: Tensor, block_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """[B, S, G, d] scattered over a pool of blocks in random order: the pool and its tables."""
    batch, length, groups, width = keys.shape
    blocks = -(-length // block_size)
    order = torch.randperm(batch * blocks + 3, generator=torch.Generator().manual_seed(seed))
    tables = order[: batch * blocks].view(batch, blocks).to(torch.int32)
    pool = torch.full((len(order), block_size, groups, width), math.nan, dtype=keys.dtype)
    for row, position in itertools.product(range(batch), range(length)):
        pool[tables[row, position // block_size], position % block_size] = keys[row, position]
    return pool, tables


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 16), (6, 2, 24), (8, 1, 64), (2, 2, 200)])
@pytest.mark.parametrize("window", [None, 7])
def test_paged_attention(dtype: torch.dtype, heads: int, groups: int, width: int, window: int | None):
    batch, length = 3, 37
    query = random(batch, heads, width, dtype=dtype)
    keys, values = (random(batch, length, groups, width, dtype=dtype, seed=seed) for seed in (1, 2))
    lengths = torch.tensor([36, 0, 16], dtype=torch.int32)
    (pool_keys, tables), (pool_values, _) = paged(keys, 8, 5), paged(values, 8, 5)
    new = tuple(torch.stack([part[row, lengths[row]] for row in range(batch)]) for part in (keys, values))
    for row in range(batch):  # the new token's own place is empty until it is kept
        for pool in (pool_keys, pool_values):
            pool[tables[row, lengths[row] // 8], lengths[row] % 8] = math.nan
    pages = Pages(pool_keys, pool_values, tables, lengths)
    found = native.attend_paged(query, pages, (new[0], new[1]), window)
    again = native.attend_paged(query, pages, None, window, width**-0.5)
    assert torch.equal(found, again), "the new token was kept at its place"
    for row in range(batch):
        end = int(lengths[row]) + 1
        start = 0 if window is None else max(0, end - window)
        part = [tensor[row, start:end].double().transpose(0, 1) for tensor in (keys, values)]
        expected = functional.scaled_dot_product_attention(
            query[row, :, None].double(), *part, enable_gqa=True
        )[:, 0]
        assert_close(found[row], expected, dtype, 2)
        pages = Pages(pool_keys, pool_values, tables[row : row + 1].contiguous(), lengths[row : row + 1])
        alone = native.attend_paged(query[row : row + 1], pages, None, window)
        assert torch.equal(alone[0], found[row])


@needs_native
def test_a_contiguous_cache_is_one_block_a_row():
    query = random(2, 4, 16)
    keys, values = (random(2, 2, 50, 16, seed=seed) for seed in (1, 2))  # [B, G, S, d]
    lengths = torch.tensor([49, 20], dtype=torch.int32)
    tables = torch.arange(2, dtype=torch.int32)[:, None].contiguous()
    found = native.attend_paged(query, Pages(keys.transpose(1, 2), values.transpose(1, 2), tables, lengths))
    pools = [paged(part.transpose(1, 2), 16, 3) for part in (keys, values)]
    assert torch.equal(
        found, native.attend_paged(query, Pages(pools[0][0], pools[1][0], pools[0][1], lengths))
    )


@needs_native
def test_large_scores_do_not_overflow():
    query, keys, values = random(1, 1, 16) * 300, random(1, 40, 1, 16, seed=1), random(1, 40, 1, 16, seed=2)
    tables, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([39], dtype=torch.int32)
    found = native.attend_paged(query, Pages(keys, values, tables, lengths))
    expected = functional.scaled_dot_product_attention(
        query[:, :, None].double(), keys.transpose(1, 2).double(), values.transpose(1, 2).double()
    )[:, :, 0]
    assert_close(
        found, expected, torch.float32, 20
    )  # scores of hundreds carry float32's error into the exponent


# ---- building


def run_python(code: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    values = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=values, capture_output=True, text=True, check=True
    )


ASK = "from glasshouse.models import native; print(native.available())"


@needs_native
def test_built_in_the_background_and_found_by_the_next_process(tmp_path: Path):
    code = """
import time
from glasshouse.models import native
assert not native.available()
target = native.library_path(native.build_command())
for _ in range(6000):
    if target.exists():
        break
    time.sleep(0.02)
print(native.available())
"""
    first = run_python(code, tmp_path)
    assert first.stdout.strip() == "False", "the answer never changes within a process"
    assert first.stderr == ""
    assert run_python(ASK, tmp_path).stdout.strip() == "True"
    assert run_python(ASK, tmp_path, GLASSHOUSE_NATIVE="0").stdout.strip() == "False"
    assert [path.suffix for path in (tmp_path / "glasshouse").iterdir()] == [".so"]


@needs_native
def test_a_failed_build_is_remembered_and_said_once(tmp_path: Path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho no luck >&2\nexit 1\n")
    compiler.chmod(0o755)
    native_path = native.library_path([str(compiler), *native.build_command()[1:]])
    code = "from glasshouse.models import native; native.build(native.library_path(native.build_command()), native.build_command())"
    run_python(code, tmp_path, CXX=str(compiler))
    failed = tmp_path / "glasshouse" / f"{native_path.name}.failed"
    assert failed.read_text() == "no luck\n"
    answers = [run_python(ASK, tmp_path, CXX=str(compiler)) for _ in range(2)]
    assert [answer.stdout.strip() for answer in answers] == ["False", "False"]
    assert ["did not compile" in answer.stderr for answer in answers] == [True, False]


@needs_native
def test_without_a_compiler_or_a_place_to_keep_it(tmp_path: Path):
    answers = [run_python(ASK, tmp_path, PATH="", CXX="") for _ in range(2)]
    assert [answer.stdout.strip() for answer in answers] == ["False", "False"]
    assert ["no C++ compiler" in answer.stderr for answer in answers] == [True, False]
    (tmp_path / "file").touch()
    assert run_python(ASK, tmp_path / "file").stdout.strip() == "False"


# ---- whole blocks

SHAPES = {
    "llama": DecoderConfig(40, 48, 2, 6, 2, 16, 80, 64, query_key_norm=False),
    "qwen": DecoderConfig(40, 48, 2, 6, 3, 16, 80, 64, query_key_norm=True, sliding_window=5),
    "biased": DecoderConfig(
        40, 48, 2, 4, 4, 12, 80, 64, bias="all", activation="gelu_tanh", query_key_norm=False
    ),
}


class Texts(Paged):
    """Some texts as a cache; without `pages` what a test compares with."""

    length = 0

    def __init__(self, config: DecoderConfig, batch: int, dtype: torch.dtype):
        shape = (config.num_layers, 2, batch + 1, 64, config.num_key_value_heads, config.head_dim)
        self.memory = torch.zeros(shape, dtype=dtype)
        self.tables = torch.arange(1, batch + 1, dtype=torch.int32)[:, None].contiguous()
        self.lengths = torch.zeros(batch, dtype=torch.int32)

    def pages(self, layer: int) -> Pages:
        return Pages(*self.memory[layer], self.tables, self.lengths)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        tap: Tap | None,
        name: str,
    ) -> Tensor:
        found = torch.zeros_like(query)
        for row, length in enumerate(self.lengths.tolist()):
            for kept, new in zip(self.memory[layer], (key, value), strict=True):
                kept[row + 1, length] = new[0, :, row]
            start = 0 if window is None else max(0, length + 1 - window)
            keys, values = (kept[row + 1, start : length + 1].transpose(0, 1) for kept in self.memory[layer])
            found[0, :, row] = functional.scaled_dot_product_attention(
                query[0, :, row, None], keys, values, enable_gqa=True
            )[:, 0]
        return found


@needs_native
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_block_is_its_parts_and_pytorchs(
    shape: str, dtype: torch.dtype, bits: int, monkeypatch: pytest.MonkeyPatch
):
    config = SHAPES[shape]
    with torch.inference_mode(False), torch.no_grad():
        model = Decoder(config).to(dtype).eval()
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed) * (0.3 if parameter.dim() > 1 else 1.0))
        if bits:
            swap_linears(model, lambda layer: QuantizedLinear.from_linear(layer.weight, layer.bias, bits))
    assert all(layer.native_parts(dtype) is not None for layer in model.layers)
    found: dict[str, list[Tensor]] = {"block": [], "parts": [], "torch": []}
    for way, hiddens in found.items():
        cache = Texts(config, 3, dtype)
        if way == "parts":
            monkeypatch.setattr(type(model.layers[0]), "_native_block", lambda self, hidden: None)
        elif way == "torch":
            monkeypatch.setattr(native, "available", lambda: False)
        for position in range(9):
            cache.lengths.copy_(torch.tensor([position, position // 2, 2 * position]))
            tokens = (torch.arange(4) * 7 + position)[None] % 40  # the fourth is padding
            hiddens.append(
                model(tokens, positions=torch.cat([cache.lengths, cache.lengths[:1]])[None], cache=cache)[
                    0, :3
                ]
            )
    block, parts, pytorch = (torch.stack(hiddens) for hiddens in found.values())
    assert_close(block, parts, dtype, 10)  # attention is another's: the rest is bit-equal
    limit = 0.05 if bits else 100 * TOLERANCE[dtype] / 20
    assert (block.float() - pytorch.float()).norm() <= limit * pytorch.float().norm()


@needs_native
@torch.inference_mode(False)
@torch.no_grad()
def test_block_sees_replaced_and_moved_weights():
    config = SHAPES["llama"]
    model = Decoder(config).eval()

    def read() -> Tensor:
        positions = torch.zeros(1, 1, dtype=torch.int64)
        return model(
            torch.ones(1, 1, dtype=torch.int64),
            positions=positions,
            cache=Texts(config, 1, model.norm.weight.dtype),
        )

    before = read()
    copied = copy.deepcopy(model)
    model.layers[1].attention.output.weight.mul_(2)
    assert not torch.equal(read(), before)
    model.load_state_dict(copied.state_dict())
    assert torch.equal(read(), before)
    model.layers[0].feed_forward.up = copy.deepcopy(model.layers[0].feed_forward.gate)
    changed = read()
    assert not torch.equal(changed, before)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(read(), changed)
    assert (model.bfloat16(), read())[1].dtype == torch.bfloat16
    model.layers[0].attention.output = torch.nn.Identity()  # of a kind that is not known
    assert model.layers[0].native_parts(torch.bfloat16) is None
