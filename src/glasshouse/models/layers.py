"""The layers every family is built from: linear layers, plain and of few bits, norms, rotary positions, the
feed-forward network, and taps.

Shapes are written B (rows of a batch), T (positions), D (embedding width), H (heads), d (width of a head).
Knows nothing of attention masks, text or files.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from glasshouse.models import native
from glasshouse.models.native import Matrices, Weight

Tap = Callable[[str, Tensor], Tensor]
"""Called with the name and the value of an activation; what it returns takes the activation's place."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda hidden: functional.gelu(hidden, approximate="tanh"),
    "relu": functional.relu,
}


CODE_BLOCK = 32
"""Outputs whose codes lie together, so that one load of memory serves 16 of them."""
CODE_GROUP = {8: 64, 4: 32}
"""Activations that share a scale in the C++ kernels; in int4 the weights' too."""
CODE_ZERO = {8: 128, 4: 8}
"""The unsigned code that stands for zero."""
SCALES_TRIED = 8
"""How many scales the search for int4 tries for each group."""
ROUNDED_AT_ONCE = 2**18
"""About how many weights are searched at once: as many as caches hold."""


class Linear(nn.Linear):
    """PyTorch's, but a few rows without gradients are multiplied by the C++ kernels where those serve; and without
    drawing weights on the meta device, where there are none: that alone would import PyTorch's whole compiler, a second
    of every start."""

    def reset_parameters(self) -> None:
        """Draw weights, where there are any."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def native_weight(self) -> Weight:
        """Itself, as the C++ kernels take it."""
        return Weight(self.weight, None, self.bias, self.out_features, self.in_features, 0)

    def forward(self, input: Tensor) -> Tensor:
        """[..., width] to [..., outputs]."""
        matrices = _kept_matrices(self, "", (self,), input) if native.suits(input) else None
        if matrices is not None:
            return native.linear(input.contiguous(), matrices)
        return functional.linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """PyTorch's, but without drawing weights on the meta device."""

    def reset_parameters(self) -> None:
        """Draw weights, where there are any."""
        if not self.weight.is_meta:
            super().reset_parameters()


def multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., width] times the transpose of [outputs, width]: a few rows without gradients by the C++ kernels, where those
    serve; a row's result then does not depend on the rows beside it."""
    few = hidden.numel() <= native.MOST_ROWS * hidden.shape[-1]
    if few and native.suits(hidden) and _is_whole(weight, hidden.dtype):
        weights = (Weight(weight, None, bias, weight.shape[0], weight.shape[1], 0),)
        return native.linear(hidden.contiguous(), Matrices(weights, hidden.dtype))
    return functional.linear(hidden, weight, bias)


def _is_whole(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a matrix of this number format lies in memory row after row."""
    return type(weight) in native.PLAIN and weight.is_contiguous() and weight.dtype == dtype


# ---- weights of 8 or 4 bits


def round_weights(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codes and scales of a matrix.

    Args:
        weight: [outputs, width], any float format.
        bits: 8 or 4.

    Returns:
        Unsigned codes, uint8 [outputs, width], and bfloat16 scales, [outputs, 1] or [outputs, ceil(width / 32)]: a weight
        is (code - CODE_ZERO[bits]) * scale. A scale of int4 may be negative: the code range reaches further down than up.
    """
    weight = weight.detach().float()
    if bits == 8:
        scale = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
        return _codes(weight, scale.float(), 8), scale
    outputs, width = weight.shape
    groups = functional.pad(weight, (0, -width % CODE_GROUP[4])).view(outputs, -1, CODE_GROUP[4])
    scale = torch.cat([_search_scale(part) for part in groups.split(max(ROUNDED_AT_ONCE // width, 1))])
    codes = _codes(groups, scale.float(), 4).view(outputs, -1)[:, :width]
    return codes, scale[:, :, 0]


def _codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    safe = torch.where(scale == 0, 1.0, scale)
    low, high = -CODE_ZERO[bits], CODE_ZERO[bits] - 1
    return ((weight / safe).round_().clamp_(low, high) + CODE_ZERO[bits]).to(torch.uint8)


def _search_scale(groups: Tensor) -> Tensor:
    """The bfloat16 scale [..., 1] of each int4 group that leaves the least squared error, of a few.

    The largest weight goes to the side where the codes reach further, down to -8 or less: beyond it is cut off, which
    pays where one weight stands out. Then the scale is fitted to the codes by least squares.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for step in range(SCALES_TRIED):
        scale = largest / -(7.0 + 3.0 * step / (SCALES_TRIED - 1))
        codes = groups.div(torch.where(scale == 0, 1.0, scale)).round_().clamp_(-8, 7)
        product, square = (groups * codes).sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True)
        fitted = (product / square.clamp(min=1)).to(torch.bfloat16).float()
        error = fitted * (fitted * square - 2 * product)  # less the sum of the squared weights
        better = error < least
        best, least = torch.where(better, fitted, best), torch.where(better, error, least)
    return best.to(torch.bfloat16)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [outputs, width] to int32 words [outputs, width * bits / 32], the first code in the lowest bits."""
    if bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return codes.contiguous().view(torch.int32)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """What `_pack` packed."""
    codes = words.view(torch.uint8)
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1) if bits == 4 else codes


class QuantizedLinear(nn.Module):
    """A linear layer whose weights are codes; its activations keep their number format.

    On a CPU that the C++ kernels serve, activations are rounded to 8 bits too, in groups of 64 (int8) or 32 (int4) with a
    scale each, and codes are multiplied with codes; elsewhere the weights are spelled out for each product.

    Args:
        width: inputs.
        outputs: outputs.
        bits: 8 or 4.
        bias: a bias, or None.
        device: where its empty buffers are made.
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        bits: int,
        bias: Tensor | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.bits = width, outputs, bits
        blocks, groups = -(-outputs // CODE_BLOCK), -(-width // CODE_GROUP[4]) if bits == 4 else 1
        words = native.code_words(width, bits)
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer(
            "codes", torch.zeros(blocks, words, CODE_BLOCK, dtype=torch.int32, device=device)
        )
        self.register_buffer(
            "scale", torch.zeros(blocks, groups, CODE_BLOCK, dtype=torch.bfloat16, device=device)
        )
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, weight: Tensor, bias: Tensor | None, bits: int) -> "QuantizedLinear":
        """Round a matrix [outputs, width]."""
        layer = cls(weight.shape[1], weight.shape[0], bits, bias, weight.device)
        codes, scale = round_weights(weight, bits)
        padding = -weight.shape[1] % (32 // bits)  # to whole words
        layer.set_words(_pack(functional.pad(codes, (0, padding), value=CODE_ZERO[bits]), bits), scale)
        return layer

    def set_words(self, words: Tensor, scale: Tensor) -> None:
        """Take packed codes, int32 [outputs, words], and bfloat16 scales [outputs, groups]."""
        rows = -self.out_features % CODE_BLOCK
        words = functional.pad(words, (0, self.codes.shape[1] - words.shape[1], 0, rows))
        self.codes = words.view(-1, CODE_BLOCK, words.shape[1]).transpose(1, 2).contiguous()
        scale = functional.pad(scale, (0, 0, 0, rows))
        self.scale = scale.view(-1, CODE_BLOCK, scale.shape[1]).transpose(1, 2).contiguous()

    def words(self) -> tuple[Tensor, Tensor]:
        """What `set_words` takes; the codes without the padding at the end of a row."""
        words = self.codes.transpose(1, 2).flatten(0, 1)[: self.out_features]
        scale = self.scale.transpose(1, 2).flatten(0, 1)[: self.out_features]
        words = words[:, : -(-self.in_features * self.bits // 32)]
        return words.clone(memory_format=torch.contiguous_format), scale.clone(
            memory_format=torch.contiguous_format
        )

    @property
    def weight(self) -> Tensor:
        """The matrix spelled out: float32 [outputs, width]."""
        words, scale = self.words()
        codes = _unpack(words, self.bits)[:, : self.in_features].float() - CODE_ZERO[self.bits]
        if self.bits == 4:
            scale = scale.repeat_interleave(CODE_GROUP[4], dim=1)[:, : self.in_features]
        return codes * scale.float()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Under the names, and in the layout, of compressed-tensors: what is kept is what is on disk."""
        destination[prefix + "weight_packed"], destination[prefix + "weight_scale"] = self.words()
        destination[prefix + "weight_shape"] = torch.tensor([self.out_features, self.in_features])
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + name for name in ("weight_packed", "weight_scale")]
        missing_keys.extend(name for name in names if name not in state_dict)
        if all(name in state_dict for name in names):
            self.set_words(*(state_dict[name] for name in names))
        if self.bias is not None and prefix + "bias" in state_dict:
            self.bias = nn.Parameter(state_dict[prefix + "bias"], requires_grad=False)

    def native_weight(self) -> Weight:
        """Itself, as the C++ kernels take it."""
        return Weight(self.codes, self.scale, self.bias, self.out_features, self.in_features, self.bits)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] to [..., outputs]."""
        matrices = _kept_matrices(self, "", (self,), hidden) if native.suits(hidden) else None
        if matrices is not None:
            return native.linear(hidden.contiguous(), matrices)
        return functional.linear(hidden, self.weight.to(hidden.dtype), self.bias)


def swap_linears(model: nn.Module, make: Callable[[Linear], nn.Module], kept: str = "head") -> None:
    """Put what `make` makes of it in the place of each linear layer, but for those below the module called `kept`."""
    for name, parent in list(model.named_modules()):
        for child_name, child in list(parent.named_children()):
            full = f"{name}.{child_name}".lstrip(".")
            if type(child) is Linear and full.split(".")[0] != kept:
                setattr(parent, child_name, make(child))


def native_matrices(
    owner: nn.Module, names: Sequence[str], hidden: Tensor, activation: str = ""
) -> Matrices | None:
    """The matrices of an owner's linear layers that multiply the same rows, as the C++ kernels take them; None where they
    do not serve: gradients are wanted, there are many rows for plain weights, or a layer is of another kind."""
    if not native.suits(hidden):
        return None
    return _kept_matrices(owner, names[0], [owner._modules[name] for name in names], hidden, activation)


def _kept_matrices(
    owner: nn.Module, key: str, linears: Sequence[nn.Module | None], hidden: Tensor, activation: str = ""
) -> Matrices | None:
    """What is kept with the owner under a key; made anew when a layer or its weights were replaced or moved."""
    tensors = []
    for linear in linears:
        if isinstance(linear, QuantizedLinear):
            tensors += linear._buffers.values()
        elif type(linear) is not Linear:
            return None
        tensors += [parameter for parameter in linear._parameters.values() if parameter is not None]
    kept = owner.__dict__.get("_matrices", {})
    found = kept.get(key)  # None too in a copy of the owner
    if found is None or not found.serves(hidden, tensors):
        found = make_matrices(linears, hidden.dtype, activation)
        owner.__dict__["_matrices"] = {**kept, key: found}
    if found is None or (found.is_plain and hidden.numel() > native.MOST_ROWS * found.width):
        return None
    return found


def make_matrices(
    linears: Sequence[nn.Module | None], dtype: torch.dtype, activation: str = ""
) -> Matrices | None:
    """Linear layers as the C++ kernels take them; None where one is of a kind or number format that they do not know."""
    weights = [
        linear.native_weight()
        for linear in linears
        if isinstance(linear, QuantizedLinear) or type(linear) is Linear
    ]
    alike = len(weights) == len(linears) and len({weight.bits for weight in weights}) == 1
    if not alike or not all(weight.bits or _is_whole(weight.data, dtype) for weight in weights):
        return None
    if any(weight.bias is not None and weight.bias.dtype != dtype for weight in weights):
        return None
    return Matrices(weights, dtype, activation)


# ---- layers


def touch(tap: Tap | None, name: str, value: Tensor) -> Tensor:
    """Show an activation to the tap, if there is one, and go on with what it returns."""
    return value if tap is None else tap(name, value)


def drop(hidden: Tensor, share: float, training: bool) -> Tensor:
    """Dropout (Srivastava et al. 2014): in training, set a share of the numbers to zero and scale the others up.

    On the CPU a number is dropped by one random byte, eight of which are drawn at once, so the share is rounded to
    256ths: PyTorch's own draws a whole random number for each, which took a sixth of a training step.
    """
    if not (share and training):
        return hidden
    if hidden.device.type != "cpu":
        return functional.dropout(hidden, share)
    limit = round(256 * share)
    words = torch.empty(-(-hidden.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.uint8)[: hidden.numel()].view(hidden.shape) >= limit
    return hidden * (kept.to(hidden.dtype) * (256 / (256 - limit)))


class RootMeanSquareNorm(nn.Module):
    """Scale to unit root mean square, then by a learned weight (Zhang and Sennrich 2019, arXiv:1910.07467).

    Args:
        width: size of the last dimension.
        epsilon: added to the mean square.
    """

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] to [..., width]; the mean is taken in float32."""
        if native.suits(hidden) and hidden.dtype == self.weight.dtype and hidden.is_contiguous():
            return native.norm(hidden, self.weight, self.epsilon)
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


def norm_layer(kind: str, width: int, epsilon: float, bias: bool = True) -> nn.Module:
    """A norm: "rms" (never with a bias) or "layer" (LayerNorm, with one unless asked otherwise)."""
    if kind == "rms":
        return RootMeanSquareNorm(width, epsilon)
    return nn.LayerNorm(width, eps=epsilon, bias=bias)


def rotary_frequencies(head_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Tensor:
    """The angle, in radians per position, of each pair of a head's dimensions; float32 [head_dim / 2].

    Source: RoFormer (Su et al. 2021, arXiv:2104.09864); "linear" scaling (position interpolation, arXiv:2306.15595)
    and "llama3" scaling as Llama 3.1 defines it.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (smooth + (1 - smooth) / factor)


def rotary_table(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine for `rotate`: positions [B or 1, T] to two [B or 1, 1, T, head_dim] of `dtype`."""
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (i, i + d/2) of [B, H, T, d] by its angle."""
    cosine, sine = table
    left, right = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-right, left], dim=-1) * sine


class FeedForward(nn.Module):
    """Two or three matrices and a nonlinearity at each position.

    Gated (Shazeer 2020, arXiv:2002.05202): down(activation(gate(x)) * up(x)); plain: down(activation(up(x))).

    Args:
        width: D.
        hidden_width: width between the matrices.
        activation: a key of `ACTIVATIONS`.
        gated: whether there is a gate.
        bias: whether the matrices have biases.
    """

    def __init__(self, width: int, hidden_width: int, activation: str, gated: bool, bias: bool):
        super().__init__()
        self.activation, self.activation_name = ACTIVATIONS[activation], activation
        self.gate = Linear(width, hidden_width, bias=bias) if gated else None
        self.up = Linear(width, hidden_width, bias=bias)
        self.down = Linear(hidden_width, width, bias=bias)

    def forward(self, hidden: Tensor, tap: Tap | None = None, name: str = "") -> Tensor:
        """[B, T, D] to [B, T, D]."""
        names = ("up",) if self.gate is None else ("gate", "up")
        known = self.activation_name in native.ACTIVATIONS
        matrices = native_matrices(self, names, hidden, self.activation_name) if known else None
        if matrices is not None:
            inner = native.linear(hidden.contiguous(), matrices)
        elif self.gate is None:
            inner = self.activation(self.up(hidden))
        else:
            inner = self.activation(self.gate(hidden)) * self.up(hidden)
        return touch(tap, f"{name}.output", self.down(touch(tap, f"{name}.hidden", inner)))
