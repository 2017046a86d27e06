"""Keys and values of the tokens a model has read, in one block of memory per layer.

What the decoder asks of a cache is two things: `length`, and `attend`, which keeps new keys and values and reads for
new queries. Knows nothing of the model but what it is handed.
"""

import torch
from torch import Tensor

from glasshouse.models.attention import Mask, additive, attend
from glasshouse.models.layers import Tap


class ContiguousCache:
    """A cache that writes in place into preallocated memory and doubles it when it is full.

    The memory of a layer is made at its first `extend`, in the shape, number format and place of the keys it is given.
    A forward pass that fails half-way leaves the cache as it was: tokens count only once the last layer has them.

    Args:
        layers: number of layers.
        capacity: tokens to make room for at first; give the expected length when it is known.
    """

    def __init__(self, layers: int, capacity: int = 256):
        self._length = 0
        self._capacity = max(capacity, 1)
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._mask: tuple[tuple[int, int, int | None], Tensor | None] | None = None

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""
        return self._length

    @property
    def capacity(self) -> int:
        """Tokens there is room for before memory is moved."""
        return self._capacity

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values, each [B, H, T, d], of T new tokens to a layer.

        Layers are extended in order; the tokens count once the last layer has them.

        Returns:
            All keys and all values of the layer, [B, H, length + T, d]: views that later calls may outdate.
        """
        end = self._length + key.shape[2]
        if end > self._capacity:
            self._capacity = max(2 * self._capacity, end)
        keys = self._keys[layer] = self._room(self._keys[layer], key)
        values = self._values[layer] = self._room(self._values[layer], value)
        keys[:, :, self._length : end] = key
        values[:, :, self._length : end] = value
        if layer == len(self._keys) - 1:
            self._length = end
        return keys[:, :, :end], values[:, :, :end]

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
        """Keep keys and values, each [B, G, T, d], of T new tokens, and read for their queries, [B, H, T, d].

        Returns:
            [B, H, T, d]: each query has seen its own key and those before it, no further back than the window.
        """
        start = self._length
        keys, values = self.extend(layer, key, value)
        mask = self._seen(start, query, window)
        causal = start == 0 and query.shape[2] > 1
        return attend(query, keys, values, mask, causal, tap, name)

    def _seen(self, start: int, query: Tensor, window: int | None) -> Tensor | None:
        """The additive mask, None where none is needed: made once for all layers of a pass that have the same window."""
        asked = (start, query.shape[2], window)
        if self._mask is None or self._mask[0] != asked:
            mask, keys = Mask(True, window), start + query.shape[2]
            plain = mask.is_plain(query.shape[2], keys)
            seen = None if plain else additive(mask.seen(query.shape[2], keys, query.device), query.dtype)
            self._mask = asked, seen
        return self._mask[1]

    def _room(self, block: Tensor | None, new: Tensor) -> Tensor:
        """The block itself while it is large enough, else a larger one with the same tokens."""
        if block is not None and block.shape[2] >= self._capacity:
            return block
        batch, heads, _, width = new.shape
        larger = torch.empty(batch, heads, self._capacity, width, dtype=new.dtype, device=new.device)
        if block is not None:
            larger[:, :, : self._length] = block[:, :, : self._length]
        return larger
