"""The logit lens: what each layer would say, were it the last.

A decoder's blocks add to one stream that the final norm and the head turn into chances; here they read the stream
after every block (nostalgebraist 2020, "interpreting GPT: the logit lens"). Early layers often do not speak the
language of the head, so their words are hints and no more (Belrose et al. 2023, arXiv:2303.08112). Knows no text.
"""

import re
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from glasshouse.interpret.attention import position_keeper, stack_layers
from glasshouse.interpret.record import Tapped, record
from glasshouse.models.layers import Tap


class Lensed(Protocol):
    """A model whose stream has a last norm and a head."""

    @property
    def norm(self) -> Callable[[Tensor], Tensor]:
        """The norm before the head."""
        ...

    def __call__(self, tokens: Tensor, *, tap: Tap) -> Tensor:
        """Run forward, showing every named activation to the tap."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden vectors [..., D] to scores [..., vocab_size]."""
        ...


class LensLayer(NamedTuple):
    """What one layer would say.

    Args:
        layer: its number; 0 is the embedding, before any layer.
        ids: the likeliest tokens, likeliest first.
        probabilities: their chances.
    """

    layer: int
    ids: list[int]
    probabilities: list[float]


def is_stream(name: str, within: str = "") -> bool:
    """Whether a name is that of the stream before the first layer or after a layer (of the stack `within`)."""
    return re.fullmatch(rf"{re.escape(within)}(embedding|layers\.\d+\.residual_after)", name) is not None


def layer_streams(model: Tapped, tokens: Tensor, position: int | None = None) -> Tensor:
    """The stream of one text before the first layer and after each.

    Args:
        model: called as `model(tokens, tap=...)`.
        tokens: token ids, int64 [T].
        position: the position to keep; None for all.

    Returns:
        [layers + 1, T, D], or [layers + 1, D] for one position, in the model's own numbers.
    """
    recording = record(model, tokens[None], is_stream, keep=position_keeper(position))
    return stack_layers(recording, is_stream)


def lens_logits(model: Lensed, streams: Tensor) -> Tensor:
    """Streams [..., D] through the model's own last norm and head: logits float32 [..., vocab_size] on the CPU."""
    return model.logits(model.norm(streams)).to("cpu", torch.float32)


def likeliest_by_layer(logits: Tensor, count: int) -> list[LensLayer]:
    """The likeliest tokens of each layer: logits [layers + 1, vocab_size] of one position, `count` tokens each."""
    top = logits.softmax(-1).topk(min(count, logits.shape[-1]))
    return [
        LensLayer(layer, ids, probabilities)
        for layer, (ids, probabilities) in enumerate(
            zip(top.indices.tolist(), top.values.tolist(), strict=True)
        )
    ]


def logit_lens(model: Lensed, tokens: Tensor, position: int, count: int = 5) -> list[LensLayer]:
    """What each layer would say comes after a position of a text.

    Args:
        model: a decoder.
        tokens: token ids, int64 [T].
        position: the last position that is read; the layers speak of the token after it.
        count: how many tokens of each layer.
    """
    return likeliest_by_layer(lens_logits(model, layer_streams(model, tokens, position)), count)
