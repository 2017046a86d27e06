"""Attention, written once for every family: which positions see which, and the weighted mean they read.

Source: Vaswani et al. 2017 (arXiv:1706.03762); grouped queries, Ainslie et al. 2023 (arXiv:2305.13245).
Knows nothing of how keys and values of earlier tokens are kept: a cache is an argument that answers `attend`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from glasshouse.models import native
from glasshouse.models.layers import Linear, RootMeanSquareNorm, Tap, native_matrices, rotate, touch
from glasshouse.models.native import HeadNorms, Matrices


class Cache(Protocol):
    """What attention needs of a cache of keys and values."""

    @property
    def length(self) -> int:
        """Tokens already in the cache."""
        ...

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
        """Keep the keys and values of T new tokens, [B, G, T, d], and read for their queries, [B, H, T, d].

        The cache knows what comes before each new token, so it does the masking: no query sees a later key, nor one
        `window` or more positions back (None for no such border).

        Returns:
            What each query read, [B, H, T, d].
        """
        ...


BLOCK = 128
"""Queries that are multiplied at once where the causal triangle is spelled out."""


@dataclass(frozen=True)
class Mask:
    """Which key each query sees: none later than itself, none further back than the window, none of another document.

    Args:
        causal: whether a query is blind to later keys.
        window: how many positions back a query sees, itself included, and forth where it is not causal; None for all.
        documents: [B, T] number of the document each position belongs to; None when each row is one document.
    """

    causal: bool = True
    window: int | None = None
    documents: Tensor | None = None

    def is_plain(self, queries: int, keys: int) -> bool:
        """Whether the mask is nothing but a causal triangle, or one query that sees every key."""
        unwindowed = self.window is None or keys <= self.window
        return self.documents is None and unwindowed and (not self.causal or queries in (1, keys))

    def seen(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Boolean [B or 1, 1, queries, keys]: True where the query sees the key. The queries are the last keys."""
        query = torch.arange(keys - queries, keys, device=device)[:, None]
        key = torch.arange(keys, device=device)[None, :]
        seen = key <= query if self.causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
        if self.window is not None:
            seen = seen & (key > query - self.window)
            seen = seen if self.causal else seen & (key < query + self.window)
        seen = seen[None, None]
        if self.documents is not None:
            seen = seen & (self.documents[:, None, -queries:, None] == self.documents[:, None, None, :])
        return seen


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as numbers to add to the scores: 0 where seen, minus infinity where not."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool = False,
    tap: Tap | None = None,
    name: str = "",
    scale: float | None = None,
) -> Tensor:
    """The mean of the values, weighted by softmax(query · key / sqrt(d)).

    Args:
        query: [B, H, T, d].
        key: [B, G, S, d] with H a multiple of G: each key head serves H / G query heads.
        value: [B, G, S, d].
        mask: additive, broadcastable to [B, 1, T, S]; None when nothing, or only the causal triangle, is masked.
        causal: no query sees a later key, and T = S; a mask, if there is one, says so too.
        tap: shown "NAME.scores" and "NAME.pattern", [B, H, T, S].
        name: prefix for the tap.
        scale: what query · key is multiplied by; 1 / sqrt(d) when None.

    Returns:
        [B, H, T, d].
    """
    if tap is None and (query.device.type != "cpu" or not query.requires_grad):
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    query = query * (query.shape[3] ** -0.5 if scale is None else scale)
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and causal:
        mask = additive(Mask().seen(queries, keys, query.device), query.dtype)
    blocks = queries // BLOCK if causal and tap is None else 1
    if blocks > 1:
        # Half of a causal triangle is never seen: a block of queries is multiplied with the keys before its end only.
        pieces, start = [], 0
        for piece in query.tensor_split(blocks, dim=2):
            end = start + piece.shape[2]
            part = mask[:, :, start:end, :end] if mask is not None else None
            pieces.append(attend_explicitly(piece, key[:, :, :end], value[:, :, :end], part, None, name))
            start = end
        return torch.cat(pieces, dim=2)
    return attend_explicitly(query, key, value, mask, tap, name)


def attend_explicitly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, tap: Tap | None, name: str
) -> Tensor:
    """`attend`, spelled out, for queries that are scaled already; for a few queries and keys the quicker of the two."""
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    # One matrix product per key head: the query heads that share it are stacked along the positions.
    stacked = query.reshape(batch, groups, heads // groups * queries, width)
    scores = (stacked @ key.transpose(-1, -2)).view(batch, heads, queries, keys)
    scores = touch(tap, f"{name}.scores", scores if mask is None else scores + mask)
    pattern = touch(tap, f"{name}.pattern", torch.softmax(scores, dim=-1))
    read = pattern.view(batch, groups, heads // groups * queries, keys) @ value
    return read.view(batch, heads, queries, width)


class Attention(nn.Module):
    """Multi-head self-attention with grouped key/value heads and rotary positions.

    Args:
        width: D.
        heads: query heads H.
        key_value_heads: key and value heads G.
        head_dim: d.
        bias: "none", "query_key_value" or "all".
        query_key_norm: epsilon of a norm on queries and keys (Qwen3); None for no norm.
        window: how many positions back a query sees in a cache, itself included; None for all. Without a cache, the
            mask says it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_value_heads: int,
        head_dim: int,
        bias: str,
        query_key_norm: float | None,
        window: int | None = None,
    ):
        super().__init__()
        self.window = window
        self.heads, self.key_value_heads, self.head_dim = heads, key_value_heads, head_dim
        self.query = Linear(width, heads * head_dim, bias=bias != "none")
        self.key = Linear(width, key_value_heads * head_dim, bias=bias != "none")
        self.value = Linear(width, key_value_heads * head_dim, bias=bias != "none")
        self.output = Linear(heads * head_dim, width, bias=bias == "all")
        normed = query_key_norm is not None
        self.query_norm = RootMeanSquareNorm(head_dim, query_key_norm) if normed else None
        self.key_norm = RootMeanSquareNorm(head_dim, query_key_norm) if normed else None

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        causal: bool,
        cache: Cache | None,
        layer: int,
        tap: Tap | None = None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D]; `rotary` is a table of the positions, None where positions are learned.

        With a cache, `mask` and `causal` are the cache's business.
        """
        name = "" if tap is None else f"layers.{layer}.attention"
        matrices = native_matrices(self, ("query", "key", "value"), hidden)
        if matrices is not None:
            query, key, value = self._native_heads(hidden, matrices, rotary)
        else:
            query = self._heads(self.query(hidden), self.query_norm, rotary)
            key = self._heads(self.key(hidden), self.key_norm, rotary)
            value = self._heads(self.value(hidden), None, None)
        query, key = touch(tap, f"{name}.query", query), touch(tap, f"{name}.key", key)
        value = touch(tap, f"{name}.value", value)
        if cache is None:
            read = attend(query, key, value, mask, causal, tap, name)
        else:
            read = cache.attend(layer, query, key, value, self.window, tap, name)
        read = read.transpose(1, 2).reshape(*hidden.shape[:-1], self.heads * self.head_dim)
        return touch(tap, f"{name}.output", self.output(touch(tap, f"{name}.read", read)))

    def head_norms(self) -> HeadNorms | None:
        """The norms of queries and keys, as the C++ kernels take them; None where there are none."""
        if self.query_norm is None or self.key_norm is None:
            return None
        return HeadNorms(self.query_norm.weight, self.key_norm.weight, self.query_norm.epsilon)

    def _native_heads(
        self, hidden: Tensor, matrices: Matrices, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, ...]:
        """Queries [B, H, T, d], keys and values [B, G, T, d] by the C++ kernels."""
        counts = (self.heads, self.key_value_heads)
        heads = native.heads(hidden.contiguous(), matrices, counts, self.head_norms(), rotary)
        return heads.transpose(1, 2).split((*counts, self.key_value_heads), dim=1)

    def _heads(
        self, flat: Tensor, norm: RootMeanSquareNorm | None, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """[B, T, H * d] to [B, H, T, d], normed and rotated."""
        heads = flat.unflatten(-1, (-1, self.head_dim))
        if norm is not None:
            heads = norm(heads)
        heads = heads.transpose(1, 2)
        return heads if rotary is None else rotate(heads, rotary)
