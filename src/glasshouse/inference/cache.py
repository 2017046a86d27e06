"""Memory for the keys and values of the tokens a model has read: in one piece for one text, in blocks for many.

What the decoder asks of a cache is two things: `length`, and `attend`, which keeps new keys and values and reads for
new queries. `ContiguousCache` does both; `PagedCache` holds memory, which the views of `paged.py` attend to. Knows the
shapes of models; nothing of requests.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glasshouse.models.attention import Mask, additive, attend
from glasshouse.models.decoder import Decoder
from glasshouse.models.layers import Tap

MEMORY_SHARE = 0.25
"""Of the free memory: what a paged cache takes where no size is asked for."""

Table = list[int]
"""The blocks of one text, in order: token t lies in block table[t // block_size]."""


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

    def reorder(self, rows: Tensor) -> None:
        """Row i of the batch goes on from what row rows[i] has been; rows may come twice or be left out: int64 [B]."""
        for blocks in (self._keys, self._values):
            blocks[:] = [None if block is None else block.index_select(0, rows) for block in blocks]

    def truncate(self, length: int) -> None:
        """Forget all but the first tokens; the memory stays."""
        self._length = min(self._length, length)

    def _room(self, block: Tensor | None, new: Tensor) -> Tensor:
        """The block itself while it is large enough, else a larger one with the same tokens."""
        if block is not None and block.shape[2] >= self._capacity:
            return block
        batch, heads, _, width = new.shape
        larger = torch.empty(batch, heads, self._capacity, width, dtype=new.dtype, device=new.device)
        if block is not None:
            larger[:, :, : self._length] = block[:, :, : self._length]
        return larger


class BlockPool:
    """Which blocks of a paged cache are held, by how many, and which still hold a beginning that may come again.

    Pure bookkeeping: numbers, no memory. Block 0 is never given out. A block that nobody holds keeps its key until it
    is taken for something else, the one that was given back first, first.

    Args:
        count: blocks there are, numbered from 1.
    """

    def __init__(self, count: int):
        self.total = count
        self._holders = [0] * (count + 1)
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, count + 1))
        self._blocks: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def holders(self, block: int) -> int:
        """How many hold a block."""
        return self._holders[block]

    def take(self) -> int:
        """A block for new contents, held once; what it was known by is forgotten.

        Raises:
            IndexError: none is free.
        """
        if not self._free:
            raise IndexError("no block is free")
        block, _ = self._free.popitem(last=False)
        self.forget(block)
        self._holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more holder of a block that is held, or that is free and still known."""
        if self._holders[block] == 0:
            del self._free[block]
        self._holders[block] += 1

    def give_back(self, block: int) -> None:
        """One holder less. A block that nobody holds is free; one that is known is taken again only after all others."""
        if self._holders[block] == 0:
            raise ValueError(f"block {block} is held by nobody")
        self._holders[block] -= 1
        if self._holders[block] == 0:
            self._free[block] = None
            if block not in self._keys:
                self._free.move_to_end(block, last=False)

    def find(self, key: bytes) -> int | None:
        """The block known by a key, held or free; None where it is gone."""
        return self._blocks.get(key)

    def remember(self, block: int, key: bytes) -> None:
        """A block is full and may serve others; where another block is known by the key already, that one stays it."""
        if key not in self._blocks:
            self.forget(block)
            self._blocks[key], self._keys[block] = block, key

    def forget(self, block: int) -> None:
        """A block is known by nothing any more."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key]


class PagedCache:
    """Memory for the keys and values of a number of blocks, in the number format and place of the model's activations.

    Args:
        model: whose keys and values these will be.
        blocks: how many blocks; one more is kept as an empty one.
        block_size: tokens in a block.
    """

    def __init__(self, model: Decoder, blocks: int, block_size: int):
        config, like = model.config, activation(model)
        shape = (
            config.num_layers, 2, blocks + 1, block_size, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        self.block_size, self.pool = block_size, BlockPool(blocks)
        self.memory = _zeros(shape, like)
        self.keys, self.values = list(self.memory[:, 0]), list(self.memory[:, 1])

    def blocks_for(self, tokens: int) -> int:
        """How many blocks so many tokens fill."""
        return -(-tokens // self.block_size)

    def reserve(self, table: Table, start: int, end: int) -> bool:
        """Make tokens start to end of a text writable: blocks are added, and shared ones among them copied.

        New blocks are emptied: what nobody sees counts nothing only while it is finite, since 0 times infinity is not 0.

        Returns:
            Whether there were blocks enough; if not, nothing has changed.
        """
        first, last = start // self.block_size, self.blocks_for(end)
        shared = [place for place in range(first, len(table)) if self.pool.holders(table[place]) > 1]
        if max(last - len(table), 0) + len(shared) > self.pool.free:
            return False
        for place in shared:
            block = self.pool.take()
            self.memory[:, :, block] = self.memory[:, :, table[place]]
            self.pool.give_back(table[place])
            table[place] = block
        new = [self.pool.take() for _ in range(last - len(table))]
        if new:
            self.memory.index_fill_(2, torch.tensor(new, device=self.memory.device), 0)
        table.extend(new)
        return True

    def fork(self, table: Table) -> Table:
        """A second text that begins with all of a first one's blocks; `reserve` copies what either writes into."""
        for block in table:
            self.pool.hold(block)
        return list(table)

    def truncate(self, table: Table, length: int) -> None:
        """Give back the blocks after the first `length` tokens, the last first: beginnings are wanted longest."""
        kept = self.blocks_for(length)
        for block in reversed(table[kept:]):
            self.pool.give_back(block)
        del table[kept:]


def activation(model: Decoder) -> Tensor:
    """A vector in the number format and place of a model's activations: what its embedding gives."""
    with torch.inference_mode():
        return model.embedding(torch.zeros(1, dtype=torch.int64, device=model.output_weight.device))[0]


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros; on a CPU, memory that the system hands out only where it is written to."""
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    count = int(np.prod(shape)) * like.element_size()
    return torch.from_numpy(np.zeros(count, np.uint8)).view(like.dtype).view(*shape)


def free_blocks(model: Decoder, block_size: int, most_tokens: int) -> int:
    """How many blocks a part of the free memory holds, no more than so many tokens need; one at least."""
    config, like = model.config, activation(model)
    token_bytes = 2 * config.num_layers * config.num_key_value_heads * config.head_dim * like.element_size()
    held = int(_free_memory(like.device) * MEMORY_SHARE) // (token_bytes * block_size)
    return max(1, min(-(-most_tokens // block_size), held))


def _free_memory(device: torch.device) -> int:
    """Bytes that may be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
