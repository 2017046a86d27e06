"""Read or replace any activation of a model in one forward pass, with the model itself and no copy of it.

The names are those that the model's own taps give (`layers.3.attention.pattern`, ...); every family has taps, so this
knows no family, no text and no files.
"""

from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import NamedTuple, Protocol

from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.models.layers import Tap

Select = Collection[str] | Callable[[str], bool]
"""The names of the activations to keep, or a function that says of each name whether to keep it."""


class Tapped(Protocol):
    """What can be recorded: a model, or a model with its other inputs already given (`functools.partial`)."""

    def __call__(self, tokens: Tensor, *, tap: Tap) -> Tensor:
        """Run forward, showing every named activation to the tap."""
        ...


class Recording(NamedTuple):
    """What one forward pass showed.

    Args:
        hidden: what the model returned, usually [B, T, D].
        activations: the kept activations by name, in the order the model computed them.
    """

    hidden: Tensor
    activations: dict[str, Tensor]


def record(
    model: Tapped,
    tokens: Tensor,
    names: Select = (),
    *,
    replace: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    keep: Callable[[Tensor], Tensor] = lambda value: value,
) -> Recording:
    """Run a model once; keep some activations, change others on the way.

    A replaced activation is what everything after it reads, and what is kept under its name. Gradients flow as the
    caller's `torch.no_grad` or `torch.enable_grad` says. While a model is recorded its attention is computed step by
    step, not fused, so its numbers may differ from an unrecorded pass in the last bits.

    Args:
        model: called as `model(tokens, tap=...)`.
        tokens: token ids, int64 [B, T].
        names: which activations to keep: their names, or a function of a name.
        replace: by name, a function from the activation to what takes its place, in the same shape.
        keep: what to keep of an activation, when all of it would be too much: one row, one position.

    Raises:
        InputError: the model has no activation of such a name, or a replacement has another shape.
    """
    wanted = names if callable(names) else frozenset(names).__contains__
    replace = replace or {}
    seen: list[str] = []
    activations: dict[str, Tensor] = {}

    def tap(name: str, value: Tensor) -> Tensor:
        seen.append(name)
        if name in replace:
            value = _same_shape(name, value, replace[name](value))
        if wanted(name):
            activations[name] = keep(value)
        return value

    hidden = model(tokens, tap=tap)
    _require_known({*replace, *(() if callable(names) else names)}, seen)
    return Recording(hidden, activations)


def _same_shape(name: str, before: Tensor, after: Tensor) -> Tensor:
    if after.shape == before.shape:
        return after
    raise InputError(
        f"a replacement of shape {tuple(after.shape)} for an activation of shape {tuple(before.shape)}",
        name,
        "give back the same shape",
    )


def _require_known(names: Collection[str], seen: list[str]) -> None:
    for name in sorted(names):
        if name not in seen:
            close = get_close_matches(name, seen, 3) or seen[:3]
            raise InputError(
                f"the model has no activation {name!r}", "names", f"perhaps {' or '.join(close)}"
            )
