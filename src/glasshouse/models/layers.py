"""The layers every family is built from: norms, rotary positions, the feed-forward network, and taps.

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
from glasshouse.models.native import Weight
from glasshouse.models.quantized import QuantizedLinear

Tap = Callable[[str, Tensor], Tensor]
"""Called with the name and the value of an activation; what it returns takes the activation's place."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda hidden: functional.gelu(hidden, approximate="tanh"),
    "relu": functional.relu,
}


class Linear(nn.Linear):
    """PyTorch's, but a few rows without gradients are multiplied by the C++ kernels where those serve; and without
    drawing weights on the meta device, where there are none: that alone would import PyTorch's whole compiler, a second
    of every start."""

    def reset_parameters(self) -> None:
        """Draw weights, where there are any."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """[..., width] to [..., outputs]."""
        return multiply(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """PyTorch's, but without drawing weights on the meta device."""

    def reset_parameters(self) -> None:
        """Draw weights, where there are any."""
        if not self.weight.is_meta:
            super().reset_parameters()


def multiply(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., width] times the transpose of [outputs, width]: a few rows without gradients by the C++ kernels, where those
    serve; a row's result then does not depend on the rows beside it."""
    if native.suits(hidden) and native.suits_plain(hidden, weight):
        return native.linear(hidden.contiguous(), (Weight(weight, None, bias, weight.shape[0], 0),))
    return functional.linear(hidden, weight, bias)


def native_weights(hidden: Tensor, linears: Sequence[nn.Module]) -> list[Weight] | None:
    """The matrices of linear layers that multiply the same rows, as the C++ kernels take them at once; None where they do
    not serve: gradients are wanted, there are many rows for plain weights, or a layer is of another kind."""
    if not native.suits(hidden):
        return None
    weights = []
    for linear in linears:
        if isinstance(linear, QuantizedLinear):
            weights.append(linear.native_weight())
        elif type(linear) is Linear and native.suits_plain(hidden, linear.weight):
            weights.append(Weight(linear.weight, None, linear.bias, linear.out_features, 0))
        else:
            return None
    return weights if all(weight.bits == weights[0].bits for weight in weights) else None


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
        layers = (self.up,) if self.gate is None else (self.gate, self.up)
        weights = native_weights(hidden, layers) if self.activation_name in native.ACTIVATIONS else None
        if weights is not None:
            inner = native.linear(hidden.contiguous(), weights, self.activation_name)
        elif self.gate is None:
            inner = self.activation(self.up(hidden))
        else:
            inner = self.activation(self.gate(hidden)) * self.up(hidden)
        return touch(tap, f"{name}.output", self.down(touch(tap, f"{name}.hidden", inner)))
