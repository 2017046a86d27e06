"""The inner loops of decoding in C++ (native.cpp), where the machine has a compiler and a CPU with AVX-512 and VNNI.

PyTorch's own operators serve everywhere; on such a CPU these serve small batches at the speed of memory. The library is
compiled once, in the background, by a process that nobody waits for, while PyTorch answers; the next process finds it in
`$XDG_CACHE_HOME/glasshouse`. Within a process the answer of `available` never changes, so its numbers do not either.
GLASSHOUSE_NATIVE=0 switches it off. A row's result depends neither on the rows beside it nor on the number of threads.
Knows shapes and raw memory; nothing of models.
"""

import ctypes
import functools
import hashlib
import operator
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC", "-Wl,--as-needed")
CPU_FEATURES = {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}
SWITCH = "GLASSHOUSE_NATIVE"
FORMATS = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"": 0, "silu": 1, "gelu_tanh": 2, "relu": 3}
MOST_ROWS = 32
"""Rows up to which plain weights are multiplied here; above, PyTorch's matrix library is faster."""
MOST_HEAD_DIM = 256
PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors whose memory is what it seems: not a piece of one that lies on several machines."""


class Weight(NamedTuple):
    """A matrix to multiply by.

    Args:
        data: [outputs, width] in the activations' number format; or codes, as `QuantizedLinear` lays them out.
        scale: bfloat16 scales of the codes; None for plain weights.
        bias: [outputs] in the activations' number format, or None.
        outputs: number of outputs.
        width: number of inputs.
        bits: 8 or 4 for codes, 0 for plain weights.
    """

    data: Tensor
    scale: Tensor | None
    bias: Tensor | None
    outputs: int
    width: int
    bits: int


def _fields(**kinds: str) -> tuple[tuple[str, type], ...]:
    """Fields of a C structure: names by kind, in order."""
    types = {
        "pointers": ctypes.c_void_p,
        "integers": ctypes.c_int64,
        "numbers": ctypes.c_int,
        "reals": ctypes.c_float,
    }
    return tuple((name, types[kind]) for kind, names in kinds.items() for name in names.split())


class _Matrix(ctypes.Structure):
    _fields_ = _fields(pointers="weight scale bias", integers="outputs")


class _Matrices(ctypes.Structure):
    _fields_ = (*_fields(numbers="format bits count activation", integers="width"), ("matrix", _Matrix * 3))


class _Turn(ctypes.Structure):
    _fields_ = _fields(
        integers="query_heads turned_heads head_width table_rows",
        pointers="query_norm key_norm cosine sine",
        reals="epsilon",
    )


class _Pages(ctypes.Structure):
    _fields_ = (
        *_fields(pointers="keys values", integers="block_size block_stride position_stride head_stride"),
        *_fields(pointers="tables lengths", integers="table_width"),
    )


class BlockStructure(ctypes.Structure):
    """A decoder's block, as native.cpp has it."""

    _fields_ = _fields(
        pointers="heads output first second attention_norm feed_forward_norm",
        integers="groups window",
        reals="scale epsilon",
    )


# ---- building


def cpu_features() -> frozenset[str]:
    """What /proc/cpuinfo calls the flags of the first CPU; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next(
        (frozenset(line.split(":")[1].split()) for line in lines if line.startswith("flags")), frozenset()
    )


def cache_folder() -> Path:
    """Where the compiled library is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glasshouse"


def build_command() -> list[str]:
    """The compiler's command line, without the name of the output; empty where there is no compiler.

    The library shares PyTorch's copy of the OpenMP runtime: two would fight over the cores.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        return []
    runtimes = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return [compiler, *FLAGS, str(SOURCE), *map(str, runtimes)]


def library_path(command: Sequence[str]) -> Path:
    """The compiled library's place: its name changes with the source, the command, PyTorch and the CPU."""
    facts = [SOURCE.read_text(), *command, torch.__version__, *sorted(cpu_features())]
    return cache_folder() / f"native-{hashlib.sha256(chr(10).join(facts).encode()).hexdigest()[:20]}.so"


# Compiles under a name of its own and renames: two processes at once both succeed, and no half-written library is seen.
_BUILD = """
target=$1; shift
if "$@" -o "$target.$$" 2> "$target.$$.log" < /dev/null; then rm -f "$target.$$.log"; mv "$target.$$" "$target"
else mv "$target.$$.log" "$target.failed"; fi
"""


def build(target: Path, command: Sequence[str]) -> None:
    """Compile and wait; leaves the library at `target`, or what the compiler said at `target`.failed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["/bin/sh", "-c", _BUILD, "sh", str(target), *command], check=False)


def _build_in_background(target: Path, command: Sequence[str]) -> None:
    """Compile in a process that outlives this one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    arguments = ["nice", "/bin/sh", "-c", _BUILD, "sh", str(target), *command]
    quiet = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in (0, 1, 2)]
    os.posix_spawnp("nice", arguments, os.environ, file_actions=quiet, setsid=True)


def _say_once(marker: Path, reason: str) -> None:
    """Tell the person at this machine, once and not at every start."""
    if not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        print(f"decoding without the C++ kernels: {reason}", file=sys.stderr)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled library; None, for the rest of this process, where it is not there."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return _find_library()
    except OSError:  # a home that cannot be written, a library of another machine: PyTorch serves
        return None


def _find_library() -> ctypes.CDLL | None:
    lacking = sorted(CPU_FEATURES - cpu_features())
    if lacking or platform.machine() != "x86_64":
        _say_once(
            cache_folder() / "no-avx512", f"the CPU has no {' '.join(lacking)}; PyTorch does the same work"
        )
        return None
    command = build_command()
    if not command:
        _say_once(
            cache_folder() / "no-compiler", "no C++ compiler found (g++); PyTorch does the same work, slower"
        )
        return None
    target = library_path(command)
    failed = target.with_name(target.name + ".failed")
    if failed.exists():
        _say_once(
            target.with_name(target.name + ".said"),
            f"they did not compile, see {failed}; delete it to try again",
        )
        return None
    if not target.exists():
        _build_in_background(target, command)
        return None
    return _declared(ctypes.CDLL(str(target)))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its functions' signatures, in the order of native.cpp."""
    pointer, integer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    rows = [pointer, integer]
    signatures = {
        "linear": [*rows, pointer, pointer, number],
        "heads": [*rows, pointer, pointer, pointer, number],
        "block": [*rows, pointer, pointer, pointer, integer, pointer, number],
        "norm": [*rows, integer, number, pointer, real, pointer, number],
        "attend": [
            pointer, integer, pointer, pointer, integer, pointer, *[integer] * 5, real, number, pointer, number,
        ],
    }  # fmt: skip
    for name, arguments in signatures.items():
        function = getattr(library, f"glasshouse_{name}")
        function.argtypes, function.restype = arguments, None
    return library


def available() -> bool:
    """Whether the compiled library serves this process; asking starts its compilation where that can help."""
    return _library() is not None


def suits(hidden: Tensor) -> bool:
    """Whether activations can be worked on here: on the CPU, in float32 or bfloat16, with no gradient wanted."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and hidden.is_cpu
        and hidden.dtype in FORMATS
        and available()
    )


# ---- the functions


def serving() -> ctypes.CDLL:
    """The library that serves this process."""
    library = _library()
    if library is None:
        raise RuntimeError("the compiled library is not available; ask available() first")
    return library


def require(condition: bool, what: str) -> None:
    """Refuse what would read memory that is not there."""
    if not condition:
        raise ValueError(what)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Matrices:
    """Up to three matrices that multiply the same rows, checked once, as the library takes them.

    Args:
        weights: matrices of one kind; plain ones in the format of the rows.
        dtype: number format of the rows.
        activation: a key of `ACTIVATIONS`; with two matrices the result is activation(first) * second.

    Attributes:
        width: of a row.
        columns: of a result: the sum of the outputs, or one matrix's where an activation joins two.
        is_plain: whether the weights are no codes.
    """

    def __init__(self, weights: Sequence[Weight], dtype: torch.dtype, activation: str = ""):
        bits, first, self.dtype = weights[0].bits, weights[0], dtype
        self.width = first.width
        require(len(weights) <= 3, "three matrices at most")
        for weight in weights:
            require(weight.bits == bits and weight.width == self.width, "matrices of one kind and width")
            require(weight.data.is_contiguous() and type(weight.data) in PLAIN, "contiguous matrices")
            require(bits > 0 or weight.data.dtype == dtype, "plain matrices in the format of the rows")
            words = code_words(self.width, bits) if bits else self.width
            require(weight.data.shape[1] == words, "codes and width must fit")
            require(weight.bias is None or weight.bias.dtype == dtype, "a bias in the format of the rows")
        joined = activation != "" and len(weights) == 2
        require(not joined or first.outputs == weights[1].outputs, "gate and up must be of one size")
        self.columns = first.outputs if joined else sum(weight.outputs for weight in weights)
        self.is_plain = bits == 0
        # Kept alive, and compared: memory that was given back, or other weights in its place, must not be read.
        self._tensors = [tensor for weight in weights for tensor in weight[:3] if tensor is not None]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        matrix = [
            (_address(one.data), _address(one.scale), _address(one.bias), one.outputs) for one in weights
        ]
        numbers = (FORMATS[dtype], bits, len(weights), ACTIVATIONS[activation], self.width)
        self._struct = _Matrices(*numbers, (_Matrix * 3)(*matrix))
        self.address = ctypes.addressof(self._struct)

    def serves(self, hidden: Tensor, tensors: Sequence[Tensor]) -> bool:
        """Whether these are still the matrices of these tensors, and they are for rows of this format."""
        return (
            hidden.dtype == self.dtype
            and len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            and [tensor.data_ptr() for tensor in tensors] == self._addresses
        )

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """None in a copy of a model, and in another process: it makes its own."""
        return nothing, ()


def nothing() -> None:
    """What a copy has of what cannot be copied."""


def rows_of(hidden: Tensor, matrices: Matrices) -> int:
    """The number of rows, which fit the matrices."""
    require(hidden.is_contiguous(), "rows must be contiguous")
    require(
        hidden.shape[-1] == matrices.width and hidden.dtype == matrices.dtype, "matrices and rows must fit"
    )
    return hidden.numel() // hidden.shape[-1]


def linear(hidden: Tensor, matrices: Matrices) -> Tensor:
    """Rows [..., width], contiguous, times matrices: [..., columns] in the format of the rows.

    Codes meet activations rounded to 8 bits, one scale for each group of 64 (int8) or 32 (int4) numbers of a row; plain
    weights meet them as they are. Sums are float32.
    """
    rows = rows_of(hidden, matrices)
    out = hidden.new_empty((*hidden.shape[:-1], matrices.columns))
    serving().glasshouse_linear(
        hidden.data_ptr(), rows, matrices.address, out.data_ptr(), torch.get_num_threads()
    )
    return out


def code_words(width: int, bits: int) -> int:
    """How many 32-bit words the codes of a row take, whole groups of 64 (int8) or 32 (int4) numbers."""
    group = 64 if bits == 8 else 32
    return -(-width // group) * group * bits // 32


def norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm of [..., width], times `weight`; the mean in float32."""
    require(hidden.is_contiguous() and weight.is_contiguous(), "contiguous tensors")
    require(weight.dtype == hidden.dtype and weight.numel() == hidden.shape[-1], "weight and rows must fit")
    out = torch.empty_like(hidden)
    serving().glasshouse_norm(
        hidden.data_ptr(), hidden.numel() // hidden.shape[-1], hidden.shape[-1], FORMATS[hidden.dtype], weight.data_ptr(),
        epsilon, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


class HeadNorms(NamedTuple):
    """Norms of the queries' and keys' heads (Qwen3): weights [head_dim] and their epsilon."""

    query: Tensor
    key: Tensor
    epsilon: float


def heads(
    hidden: Tensor,
    matrices: Matrices,
    counts: tuple[int, int],
    norms: HeadNorms | None,
    rotary: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Queries, keys and values of rows; those of queries and keys normed and rotated.

    Args:
        hidden: [B, T, width], contiguous.
        matrices: of queries, keys and values.
        counts: number of query heads, and of key heads, which is that of value heads.
        norms: weights of the norms of queries and keys, or None.
        rotary: cosine and sine, [B or 1, 1, T, head_dim], or None.

    Returns:
        [B, T, H + 2 G, head_dim]: query heads, key heads, value heads.
    """
    rows, number = rows_of(hidden, matrices), counts[0] + 2 * counts[1]
    by = turn(hidden, matrices.columns // number, counts, norms, rotary)
    require(by.head_width * number == matrices.columns, "heads must fit")
    out = hidden.new_empty((*hidden.shape[:2], number, by.head_width))
    serving().glasshouse_heads(
        hidden.data_ptr(),
        rows,
        matrices.address,
        ctypes.addressof(by),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def turn(
    hidden: Tensor,
    width: int,
    counts: tuple[int, int],
    norms: HeadNorms | None,
    rotary: tuple[Tensor, Tensor] | None,
) -> _Turn:
    """How heads of rows [B, T, width] are normed and rotated, as native.cpp has it."""
    require(hidden.dim() == 3 and width % 2 == 0, "rows [B, T, width], heads of an even width")
    for table in rotary or ():
        fits = table.is_contiguous() and table.dtype == hidden.dtype and table.shape[-1] == width
        fits = fits and table.shape[2] == hidden.shape[1] and table.shape[0] in (1, hidden.shape[0])
        require(fits, "tables must fit")
    for weight in norms[:2] if norms else ():
        require(weight.dtype == hidden.dtype and weight.numel() == width, "norms must fit")
    cosine, sine = rotary or (None, None)
    query_norm, key_norm, epsilon = norms or (None, None, 0.0)
    return _Turn(
        counts[0], counts[0] + counts[1], width, 1 if cosine is None else cosine.numel() // width,
        _address(query_norm), _address(key_norm), _address(cosine), _address(sine), epsilon,
    )  # fmt: skip


class Pages:
    """Where the keys and values of texts lie, one text a row.

    Args:
        keys: [blocks, block_size, G, d] with any strides but the last, which is 1. A contiguous cache is one block a row.
        values: as `keys`, with the same strides.
        tables: int32 [B, at least the blocks in use]: the numbers of each row's blocks.
        lengths: int32 [B]: tokens before the new one, which is at this position.
    """

    def __init__(self, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor):
        alike = keys.shape == values.shape and keys.stride() == values.stride() and keys.dtype == values.dtype
        require(
            alike and keys.stride(3) == 1 and keys.shape[3] <= MOST_HEAD_DIM,
            "keys and values alike, narrow heads",
        )
        require(tables.dtype == torch.int32 and tables.is_contiguous(), "tables: int32 [B, blocks]")
        require(lengths.dtype == torch.int32 and lengths.is_contiguous(), "lengths: int32 [B]")
        require(tables.shape[0] == lengths.numel(), "a table for each row")
        self.keys, self.texts, self._tensors = keys, lengths.numel(), (values, tables, lengths)
        addresses = (tables.data_ptr(), lengths.data_ptr(), tables.shape[1])
        self._struct = _Pages(
            keys.data_ptr(), values.data_ptr(), keys.shape[1], *keys.stride()[:3], *addresses
        )
        self.address = ctypes.addressof(self._struct)


class Paged:
    """A cache whose texts are read one new token at a time, where `block` can read it itself."""

    def pages(self, layer: int) -> Pages:
        """Where the keys and values of a layer lie."""
        raise NotImplementedError


def attend_paged(
    query: Tensor,
    pages: Pages,
    new: tuple[Tensor, Tensor] | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Read with one new token a row from keys and values kept in blocks; keep the new token's first, where given.

    Args:
        query: [B, H, d] with contiguous heads.
        pages: where the keys and values lie.
        new: key and value of the new token, each [B, G, d] with contiguous heads, written at their place before any row
            is read, so that rows of one text see each other; None when they are there already.
        window: how many positions back a query sees, itself included; None for all.
        scale: of the scores; 1 / sqrt(d) when None.

    Returns:
        [B, H, d], contiguous.
    """
    (batch, heads, width), groups = query.shape, pages.keys.shape[2]
    require(batch == pages.texts and width == pages.keys.shape[3] and heads % groups == 0, "heads must fit")
    require(query.stride()[1:] == (width, 1) and query.dtype == pages.keys.dtype, "queries with whole heads")
    key, value = new or (None, None)
    if key is not None and value is not None:
        require(key.stride() == value.stride() and key.stride()[1:] == (width, 1), "keys with whole heads")
        require(key.shape == value.shape == (batch, groups, width), "new keys and values")
        require(key.dtype == value.dtype == query.dtype, "new keys and values in the format of the queries")
    out = query.new_empty((batch, heads, width))
    serving().glasshouse_attend(
        query.data_ptr(), query.stride(0), _address(key), _address(value), 0 if key is None else key.stride(0),
        pages.address, batch, heads, groups, width, window or 0, scale or width**-0.5, FORMATS[query.dtype],
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
