"""Low-rank adapters on linear layers: a small change beside each frozen matrix, merged into it or kept apart.

LoRA (Hu et al. 2021, arXiv:2106.09685): W + s·BA. DoRA (Liu et al. 2024, arXiv:2402.09353): the same direction, with a
learned length for each output. Any linear layer of any family can carry one. Pure torch; knows no files.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from glasshouse.errors import InputError
from glasshouse.models.decoder import Decoder
from glasshouse.models.encoder import Encoder
from glasshouse.models.encoder_decoder import EncoderDecoder
from glasshouse.models.layers import QuantizedLinear

Base = nn.Linear | QuantizedLinear
Merging = TypeVar("Merging", Decoder, Encoder, EncoderDecoder)
LOW_RANK = ("down", "up", "magnitude")
"""Names of an adapter's own parameters."""


@dataclass(frozen=True)
class AdapterConfig:
    """The shape of adapters.

    Args:
        rank: width between the two small matrices.
        alpha: the change is scaled by alpha / rank.
        targets: endings of the names of the linear layers that get one, like "attention.query"; "all" for every linear
            layer inside the blocks.
        dropout: share of an adapter's inputs that is dropped in training.
        magnitude: whether the length of each output is learned too (DoRA).
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all",)
    dropout: float = 0.0
    magnitude: bool = False


class _FrozenProduct(torch.autograd.Function):
    """A frozen layer's product whose backward pass spells the weights out anew, so that codes stay the only copy of them
    in memory (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(hidden, layer.weight.to(hidden.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


class Adapted(nn.Module):
    """A linear layer that is not changed, with a low-rank adapter beside it.

    The adapter's weights are float32, whatever the layer's format.

    Args:
        base: the layer; its parameters are frozen.
        config: the adapter's shape.
    """

    def __init__(self, base: Base, config: AdapterConfig):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale, self.dropout = config.alpha / config.rank, config.dropout
        weight = base.weight.detach()
        options = {"dtype": torch.float32, "device": weight.device}
        self.down = nn.Parameter(torch.zeros(config.rank, base.in_features, **options))
        self.up = nn.Parameter(torch.zeros(base.out_features, config.rank, **options))
        self.magnitude = nn.Parameter(weight.float().norm(dim=1)) if config.magnitude else None

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]; the same as the merged layer's."""
        read = functional.dropout(hidden, self.dropout, self.training) if self.dropout else hidden
        down, up = self.down.to(hidden.dtype), self.up.to(hidden.dtype)
        change = functional.linear(functional.linear(read, down), up) * self.scale
        if self.magnitude is None:
            return self._frozen(hidden) + change
        bias = self.base.bias
        plain = self._frozen(hidden) if bias is None else self._frozen(hidden) - bias
        turned = (plain + change) * (self.magnitude / self._lengths()).to(hidden.dtype)
        return turned if bias is None else turned + bias

    def _frozen(self, hidden: Tensor) -> Tensor:
        if isinstance(self.base, QuantizedLinear) and torch.is_grad_enabled() and hidden.requires_grad:
            return _FrozenProduct.apply(hidden, self.base)  # pyright: ignore[reportReturnType]
        return self.base(hidden)

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """Of the changed rows: taken as constants (arXiv:2402.09353, section 4.3), which saves memory, not quality."""
        return self._turned().norm(dim=1)

    def _turned(self) -> Tensor:
        return self.base.weight.detach().float() + self.scale * (self.up @ self.down)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The one matrix that does the same, float32 [outputs, inputs]."""
        weight = self._turned()
        return weight if self.magnitude is None else weight * (self.magnitude / weight.norm(dim=1))[:, None]


def adapt(model: nn.Module, config: AdapterConfig, seed: int) -> list[str]:
    """Freeze a model and put an adapter beside every linear layer that is meant; at first they change nothing.

    Args:
        model: any family; changed in place.
        config: the adapters' shape.
        seed: of the first of the two small matrices; the second is zero.

    Returns:
        The names of the layers.

    Raises:
        InputError: no layer has such a name, or one has an adapter already.
    """
    model.requires_grad_(False)
    generator, found = torch.Generator().manual_seed(seed), []
    for name, layer in linear_layers(model, config.targets).items():
        adapted = Adapted(layer, config)
        bound = 1.0 / math.sqrt(layer.in_features)  # as torch's Linear begins, and PEFT
        with torch.no_grad():
            drawn = torch.empty(adapted.down.shape).uniform_(-bound, bound, generator=generator)
            adapted.down.copy_(drawn)
        _replace(model, name, adapted)
        found.append(name)
    return found


def train_rows(model: Decoder, tokens: Sequence[int]) -> None:
    """Let the vectors of some tokens be trained besides: adapters cannot teach a model a token that it has never seen.

    The other rows get no gradient and stay as they are, to the bit, as long as no weight decay is used.
    """
    for weight in {model.embedding.weight, model.output_weight}:
        mask = torch.zeros(weight.shape[0], 1, dtype=weight.dtype, device=weight.device)
        mask[list(tokens)] = 1
        weight.requires_grad_(True)
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)


def linear_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, Base]:
    """The linear layers that some targets mean, by name.

    Raises:
        InputError: a target means none.
    """
    every = {name: layer for name, layer in model.named_modules() if isinstance(layer, Base)}
    inside = [name for name in every if "layers." in name and not name.endswith(".base")]
    chosen: dict[str, Base] = {}
    for target in targets:
        meant = inside if target == "all" else [name for name in inside if _is_meant(name, target)]
        if not meant:
            kinds = sorted({re.sub(r"^.*layers\.\d+\.", "", name) for name in inside})
            raise InputError(
                f"no linear layer is called {target!r}", "--targets", f"choose among all, {', '.join(kinds)}"
            )
        chosen |= {name: every[name] for name in meant}
    return chosen


def _is_meant(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The layers that have an adapter, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Adapted)}


@torch.no_grad()
def merged(model: Merging) -> Merging:
    """A model without adapters that computes the same, up to rounding to its number format; it shares what did not change.

    A quantized layer becomes a plain one: rounded to 4 bits again it would lose what was learned.
    """
    adapted = adapted_layers(model)
    state = {
        name.replace(".base.", "."): value
        for name, value in model.state_dict().items()
        if not any(name.startswith(f"{layer}.") for layer in adapted) or name.endswith(".base.bias")
    }
    number_format = next(value.dtype for value in state.values() if value.is_floating_point())
    for name, layer in adapted.items():
        quantized = isinstance(layer.base, QuantizedLinear)
        own = number_format if quantized else layer.base.weight.dtype
        state[f"{name}.weight"] = layer.merged_weight().to(own)
    with torch.device("meta"):
        plain = type(model)(model.config)  # pyright: ignore[reportArgumentType, reportCallIssue]
    plain.load_state_dict(state, assign=True)
    return plain.eval()


def quantize_layers(model: nn.Module, bits: int, targets: Sequence[str] = ("all",)) -> None:
    """Round the linear layers inside the blocks to a few bits, in place."""
    for name, layer in linear_layers(model, targets).items():
        _replace(model, name, QuantizedLinear.from_linear(layer.weight, layer.bias, bits))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own weights, by the name of their layer and "down", "up" or "magnitude"."""
    return {
        f"{name}.{part}": value.detach()
        for name, adapted in adapted_layers(model).items()
        for part in LOW_RANK
        if (value := getattr(adapted, part)) is not None
    }


@torch.no_grad()
def load_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model's adapters these weights, named as in `adapter_tensors`.

    Raises:
        InputError: one is missing, left over or of another shape.
    """
    own = adapter_tensors(model)
    for name in sorted(own.keys() ^ tensors.keys()):
        found = "has no place in this model" if name in tensors else "is missing"
        raise InputError(
            f"the adapter's {name} {found}", "adapter", "use it with the model it was trained on"
        )
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            sizes = f"{tuple(tensors[name].shape)}, not {tuple(value.shape)}"
            raise InputError(
                f"the adapter's {name} is {sizes}", "adapter", "use it with the model it was trained on"
            )
        value.copy_(tensors[name])
