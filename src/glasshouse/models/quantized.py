"""A linear layer with weights of 8 or 4 bits: how they are rounded, laid out, multiplied, and named on disk.

Rounded to nearest with no data: int8 with one scale for each output; int4 with one for each group of 32 weights, chosen
by search for the least squared error. On disk this is the "pack-quantized" layout of compressed-tensors, which vLLM and
transformers read. Pure: tensors in, tensors out; knows no files and no models.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from glasshouse.models import native
from glasshouse.models.native import Weight

BLOCK = 32
"""Outputs whose codes lie together, so that one load of memory serves 16 of them."""
GROUP = {8: 64, 4: 32}
"""Activations that share a scale in the C++ kernels; in int4 the weights' too."""
ZERO = {8: 128, 4: 8}
"""The unsigned code that stands for zero."""
SHRINKINGS = 24
"""How many scales the search for int4 tries, for each sign."""


def round_weights(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The codes and scales of a matrix.

    Args:
        weight: [outputs, width], any float format.
        bits: 8 or 4.

    Returns:
        Unsigned codes, uint8 [outputs, width], and bfloat16 scales, [outputs, 1] or [outputs, ceil(width / 32)]: a weight
        is (code - ZERO[bits]) * scale. A scale of int4 may be negative: the code range reaches further down than up.
    """
    weight = weight.detach().float()
    if bits == 8:
        scale = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
        return _codes(weight, scale.float(), 8), scale
    outputs, width = weight.shape
    groups = functional.pad(weight, (0, -width % GROUP[4])).view(outputs, -1, GROUP[4])
    scale = _search_scale(groups)
    codes = _codes(groups, scale.float(), 4).view(outputs, -1)[:, :width]
    return codes, scale[:, :, 0]


def _codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    safe = torch.where(scale == 0, 1.0, scale)
    low, high = -ZERO[bits], ZERO[bits] - 1
    return ((weight / safe).round_().clamp_(low, high) + ZERO[bits]).to(torch.uint8)


def _search_scale(groups: Tensor) -> Tensor:
    """The bfloat16 scale [..., 1] of each int4 group that leaves the least squared error, among shrunken full ranges."""
    largest = groups.abs().amax(-1, keepdim=True)
    best = torch.zeros_like(largest, dtype=torch.bfloat16)
    least = groups.square().sum(-1, keepdim=True)
    for step in range(SHRINKINGS):
        # At -8 the whole range is kept; at 12.5 a third is cut off, which pays where one weight stands out.
        for sign in (1.0, -1.0):
            scale = (sign * largest / (6.5 + 6.0 * step / SHRINKINGS)).to(torch.bfloat16)
            codes = _codes(groups, scale.float(), 4).float() - ZERO[4]
            # The scale that fits these codes best, by least squares.
            fitted = (
                (groups * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True).clamp(min=1)
            ).to(torch.bfloat16)
            error = (groups - codes * fitted.float()).square().sum(-1, keepdim=True)
            better = error < least
            best, least = torch.where(better, fitted, best), torch.where(better, error, least)
    return best


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
        blocks, groups = -(-outputs // BLOCK), -(-width // GROUP[4]) if bits == 4 else 1
        words = native.code_words(width, bits)
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", torch.zeros(blocks, words, BLOCK, dtype=torch.int32, device=device))
        self.register_buffer("scale", torch.zeros(blocks, groups, BLOCK, dtype=torch.bfloat16, device=device))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, weight: Tensor, bias: Tensor | None, bits: int) -> "QuantizedLinear":
        """Round a matrix [outputs, width]."""
        layer = cls(weight.shape[1], weight.shape[0], bits, bias, weight.device)
        codes, scale = round_weights(weight, bits)
        padding = native.code_words(weight.shape[1], bits) * 32 // bits - weight.shape[1]
        layer.set_words(_pack(functional.pad(codes, (0, padding), value=ZERO[bits]), bits), scale)
        return layer

    def set_words(self, words: Tensor, scale: Tensor) -> None:
        """Take packed codes, int32 [outputs, words], and bfloat16 scales [outputs, groups]."""
        rows = -self.out_features % BLOCK
        words = functional.pad(words, (0, self.codes.shape[1] - words.shape[1], 0, rows))
        self.codes.copy_(words.view(-1, BLOCK, words.shape[1]).transpose(1, 2))
        scale = functional.pad(scale, (0, 0, 0, rows))
        self.scale.copy_(scale.view(-1, BLOCK, scale.shape[1]).transpose(1, 2))

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
        codes = _unpack(words, self.bits)[:, : self.in_features].float() - ZERO[self.bits]
        if self.bits == 4:
            scale = scale.repeat_interleave(GROUP[4], dim=1)[:, : self.in_features]
        return codes * scale.float()

    def native_weight(self) -> Weight:
        """Itself, as the C++ kernels take it."""
        return Weight(self.codes, self.scale, self.bias, self.out_features, self.bits)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] to [..., outputs]."""
        if native.suits(hidden):
            return native.linear(hidden.contiguous(), (self.native_weight(),))
        return functional.linear(hidden, self.weight.to(hidden.dtype), self.bias)


# ---- on disk


def quantization_config(bits: int, ignored: list[str]) -> dict[str, Any]:
    """What config.json says of weights in compressed-tensors' "pack-quantized" layout.

    Args:
        bits: 8 or 4.
        ignored: names on disk of linear modules that keep plain weights.
    """
    weights = {
        "num_bits": bits, "type": "int", "symmetric": True, "dynamic": False,
        "strategy": "group" if bits == 4 else "channel", "group_size": GROUP[4] if bits == 4 else None,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ignored,
    }  # fmt: skip


def quantization_bits(config: Mapping[str, Any]) -> int | None:
    """The bits of a quantization_config, or None where it is not one that is written here."""
    try:
        (group,) = config["config_groups"].values()
        bits = group["weights"]["num_bits"]
        written = quantization_config(bits, [])
        alike = (
            config["format"] == written["format"]
            and group["targets"] == ["Linear"]
            and not group.get("input_activations")
        )
        (mine,) = written["config_groups"].values()
        return (
            bits
            if alike and all(group["weights"].get(key) == value for key, value in mine["weights"].items())
            else None
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return None
