"""Attention patterns: which earlier tokens each head reads, by layer, for one text.

A pattern is the softmax of the scores: how much of what a head passes on comes from each token. It says where a head
looks, not what the model would lose without it (Jain and Wallace 2019, arXiv:1902.10186). Knows no text.
"""

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.interpret.record import Recording, Tapped, record


def is_pattern(name: str, block: str = "attention", within: str = "") -> bool:
    """Whether a name is that of an attention pattern.

    Args:
        name: of an activation.
        block: "attention" for a layer's reading of its own text; another family may have others ("cross_attention").
        within: what stands before "layers", where a model has two stacks ("encoder.", "decoder.").
    """
    return re.fullmatch(rf"{re.escape(within)}layers\.\d+\.{re.escape(block)}\.pattern", name) is not None


def attention_patterns(
    model: Tapped, tokens: Tensor, position: int | None = None, block: str = "attention", within: str = ""
) -> Tensor:
    """How much each position of one text reads of each, by layer and head.

    Args:
        model: called as `model(tokens, tap=...)`.
        tokens: token ids, int64 [T].
        position: the reading position to keep; None for all, which needs layers * heads * T * T numbers.
        block: which attention of a layer: see `is_pattern`.
        within: which stack of layers: see `is_pattern`.

    Returns:
        float32 [layers, heads, T, S] (S positions are read), or [layers, heads, S] for one position; each row sums
        to 1. On the CPU.
    """
    recording = record(
        model, tokens[None], lambda name: is_pattern(name, block, within), keep=position_keeper(position)
    )
    return stack_layers(recording, lambda name: is_pattern(name, block, within)).to("cpu", torch.float32)


def position_keeper(position: int | None) -> Callable[[Tensor], Tensor]:
    """A `keep` for `record`: of [1, ..., T, width], one position or all, without the batch."""

    def keep(value: Tensor) -> Tensor:
        kept = value[0] if position is None else value[0][..., position, :]
        return kept.clone()  # a view would hold on to all positions

    return keep


def stack_layers(recording: Recording, wanted: Callable[[str], bool]) -> Tensor:
    """The kept activations whose names are wanted, one above the other in the order of the layers.

    Raises:
        InputError: there is none.
    """
    layers: Iterable[Tensor] = [value for name, value in recording.activations.items() if wanted(name)]
    if not layers:
        raise InputError("the model shows no such activation", "block", "name one that it has")
    return torch.stack(list(layers))
