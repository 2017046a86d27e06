"""Keys and values of many texts in blocks of one memory, and reading with it so that company changes no number.

A text's blocks stand in its table, a list of block numbers in order; token t lies in block table[t // block_size].
Prompts are read in pieces (`PromptView`), answers token by token (`RowsView`); both are caches to the model. Knows
models; nothing of requests, of text or of the order in which they are served.

Why a text comes out the same whatever else is read beside it: every product, norm and gate works row by row, in a
number of rows that was measured to give each row the same bits (`equal_sizes`); the queries of a prompt are read in
tiles that begin at multiples of the tile, padded to its size, with keys up to the tile's end; and a query of an answer
sees keys in a number of blocks that depends on its own position alone. So neither the pieces in which a prompt is read
nor what was found in the cache matters, and what was written is read again, after it was put aside, in the same way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from glasshouse.inference.cache import PagedCache, Table, activation
from glasshouse.models import native
from glasshouse.models.attention import additive, attend
from glasshouse.models.decoder import Decoder
from glasshouse.models.layers import Tap, multiply

TILE = 64
"""Queries of a prompt that are read at once; rounded down to whole blocks."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Numbers of rows that are tried; any number between is padded."""
COMPARED = 4
"""Rows of each size that are compared, at least."""
MOST_OUTPUTS = 4096
"""Outputs of a product that are compared: more would tell nothing new."""


def _keep(memory: Tensor, slots: Tensor, new: Tensor) -> None:
    """Write [1, G, T, d] into slots [n] of the blocks; tokens beyond the slots are padding."""
    blocks, size, groups, width = memory.shape
    rows = new[0].transpose(0, 1)[: len(slots)]
    memory.view(blocks * size, groups, width).index_copy_(0, slots, rows)


def _gather(memory: Tensor, blocks: "slice | Tensor", texts: int) -> Tensor:
    """The blocks of some texts, each the same number, as [texts, G, S, d]; neighbours in memory are not copied."""
    found = memory[blocks] if isinstance(blocks, slice) else memory.index_select(0, blocks)
    return found.reshape(texts, -1, *memory.shape[2:]).transpose(1, 2)


def _read(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of [B, H, T, d] on [B, G, S, d] with a mask [B or 1, 1, T, S], query heads of a key head stacked."""
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    stacked = query.reshape(batch, groups, heads // groups * queries, width)
    mask = mask.repeat(1, 1, heads // groups, 1)
    return attend(stacked, key, value, mask).reshape(batch, heads, queries, width)


@dataclass(frozen=True)
class Piece:
    """Tokens start to end of a prompt whose earlier tokens are in the cache; the table has room for them."""

    tokens: Sequence[int]
    table: Table
    start: int

    @property
    def end(self) -> int:
        """The position after the last."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class _Tile:
    """Queries of one piece that lie in one tile.

    Args:
        first, last: which tokens of the pass they are.
        offset: of the first of them in the tile.
        begin: position of the tile.
    """

    first: int
    last: int
    offset: int
    begin: int
    table: Table


class PromptView:
    """Pieces of prompts, as a cache: tokens [1, N] are the pieces one after another, padded at the end.

    Args:
        cache: where keys and values are kept.
        pieces: what is read.
    """

    length = 0  # positions are always given

    def __init__(self, cache: PagedCache, pieces: Sequence[Piece]):
        self._cache = cache
        self._size = max(TILE // cache.block_size, 1) * cache.block_size
        self._tiles, slots, done = [], [], 0
        for piece in pieces:
            slots.append(_slots(piece.table, piece.start, piece.end, cache.block_size))
            for begin in range(piece.start // self._size * self._size, piece.end, self._size):
                start, end = max(piece.start, begin), min(piece.end, begin + self._size)
                first = done + start - piece.start
                self._tiles.append(_Tile(first, first + end - start, start - begin, begin, piece.table))
            done += len(piece.tokens)
        self._slots = torch.from_numpy(np.concatenate(slots)).to(cache.memory.device)
        self._seen: dict[tuple[int, int | None], tuple[slice | Tensor, Tensor]] = {}

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
        """Keep and read: [1, H, N, d] queries, [1, G, N, d] keys and values to [1, H, N, d].

        A tap is shown each tile's scores and pattern in turn, [1, H, T, S].
        """
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        _keep(keys, self._slots, key)
        _keep(values, self._slots, value)
        read = torch.zeros_like(query)
        for number, tile in enumerate(self._tiles):
            blocks, mask = self._sight(number, window, query)
            key, value = _gather(keys, blocks, 1), _gather(values, blocks, 1)
            rows, offset = tile.last - tile.first, tile.offset
            if tap is not None:
                seen = mask[:, :, offset : offset + rows]
                found = attend(query[:, :, tile.first : tile.last], key, value, seen, tap=tap, name=name)
                read[:, :, tile.first : tile.last] = found
                continue
            padded = query.new_zeros(1, query.shape[1], self._size, query.shape[3])
            padded[:, :, offset : offset + rows] = query[:, :, tile.first : tile.last]
            found = _read(padded, key, value, mask)
            read[:, :, tile.first : tile.last] = found[:, :, offset : offset + rows]
        return read

    def _sight(self, number: int, window: int | None, query: Tensor) -> "tuple[slice | Tensor, Tensor]":
        """The blocks that a tile reads and its mask [1, 1, tile, S]: made once for all layers of one window."""
        if (number, window) not in self._seen:
            tile, size = self._tiles[number], self._cache.block_size
            end = tile.begin + self._size
            start = 0 if window is None else max(0, tile.begin - window + 1) // self._size * self._size
            blocks = _blocks([tile.table], start // size, end // size, query.device)
            positions = torch.arange(tile.begin, end, device=query.device)[:, None]
            keys = torch.arange(start, end, device=query.device)[None]
            seen = keys <= positions
            if window is not None:
                seen = seen & (keys > positions - window)
            self._seen[number, window] = blocks, additive(seen[None, None], query.dtype)
        return self._seen[number, window]


class RowsView(native.Paged):
    """Tokens of answers, one to a row, as a cache: tokens [1, N], each with a text of its own, padded at the end.

    Several rows may belong to one text, at positions one after another: each sees those before it.

    Args:
        cache: where keys and values are kept.
        tables: the table of each row's text, with room for the row's token.
        positions: the position of each row's token.
    """

    length = 0  # positions are always given

    def __init__(self, cache: PagedCache, tables: Sequence[Table], positions: Sequence[int]):
        self._cache, self._tables, self._positions = cache, tables, positions
        size, device = cache.block_size, cache.memory.device
        slots = [
            table[place // size] * size + place % size for table, place in zip(tables, positions, strict=True)
        ]
        self._slots = torch.tensor(slots, dtype=torch.int64).to(device)
        self._seen: dict[int | None, list[tuple[Tensor, slice | Tensor, Tensor]]] = {}
        self._places: tuple[Tensor, Tensor] | None = None

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
        """Keep and read: [1, H, N, d] queries, [1, G, N, d] keys and values to [1, H, N, d].

        A tap is shown the scores and pattern of rows that see equally many blocks, [rows, H, 1, S].
        """
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        if tap is None and native.suits(query) and query.shape[3] <= native.MOST_HEAD_DIM:
            return self._read_natively(layer, query, (key, value), window)
        _keep(keys, self._slots, key)
        _keep(values, self._slots, value)
        read = torch.zeros_like(query)
        for rows, blocks, mask in self._sights(window, query):
            key, value = _gather(keys, blocks, len(rows)), _gather(values, blocks, len(rows))
            asked = query[0].index_select(1, rows).transpose(0, 1)[:, :, None]
            if tap is None:
                found = _read(asked, key, value, mask)
            else:
                found = attend(asked, key, value, mask, tap=tap, name=name)
            read[0].index_copy_(1, rows, found[:, :, 0].transpose(0, 1))
        return read

    def pages(self, layer: int) -> native.Pages:
        """Where the texts' keys and values of a layer lie."""
        if self._places is None:
            tables = np.zeros((len(self._tables), max(map(len, self._tables))), np.int32)
            for row, table in enumerate(self._tables):
                tables[row, : len(table)] = table
            self._places = torch.from_numpy(tables), torch.from_numpy(np.array(self._positions, np.int32))
        return native.Pages(self._cache.keys[layer], self._cache.values[layer], *self._places)

    def _read_natively(
        self, layer: int, query: Tensor, new: tuple[Tensor, Tensor], window: int | None
    ) -> Tensor:
        count, padding = len(self._positions), query.shape[2] - len(self._positions)
        rows, key, value = (_as_rows(part, count) for part in (query, *new))
        read = native.attend_paged(rows, self.pages(layer), (key, value), window)
        read = functional.pad(read, (0, 0, 0, 0, 0, padding)) if padding else read
        return read.transpose(0, 1)[None]

    def _sights(self, window: int | None, query: Tensor) -> "list[tuple[Tensor, slice | Tensor, Tensor]]":
        """Rows that read equally many blocks: their numbers, their blocks, and their mask [rows, 1, 1, S]."""
        if window not in self._seen:
            size, groups = self._cache.block_size, {}
            for row, place in enumerate(self._positions):
                start = 0 if window is None else max(0, place - window + 1) // size
                groups.setdefault(_rounded(place // size + 1 - start), []).append((row, start))
            self._seen[window] = [
                self._sight(members, count, window, query) for count, members in groups.items()
            ]
        return self._seen[window]

    def _sight(
        self, members: list[tuple[int, int]], count: int, window: int | None, query: Tensor
    ) -> "tuple[Tensor, slice | Tensor, Tensor]":
        size, device = self._cache.block_size, query.device
        numbers = np.zeros((len(members), count), np.int64)
        for line, (row, start) in enumerate(members):
            found = self._tables[row][start : start + count]
            numbers[line, : len(found)] = found
        keys = np.array([start for _, start in members])[:, None] * size + np.arange(count * size)
        places = np.array([self._positions[row] for row, _ in members])[:, None]
        seen = keys <= places
        if window is not None:
            seen &= keys > places - window
        mask = additive(torch.from_numpy(seen).to(device)[:, None, None], query.dtype)
        rows = torch.tensor([row for row, _ in members], device=device)
        return rows, _neighbours(numbers.reshape(-1), device), mask


def _as_rows(heads: Tensor, count: int) -> Tensor:
    """[1, H, N, d] to the first rows of [N, H, d], each whole in memory."""
    rows = heads[0].transpose(0, 1)[:count]
    return rows if rows.stride(1) == rows.shape[2] else rows.contiguous()


def _rounded(blocks: int) -> int:
    """A number of blocks rounded up to 2^k or 3 · 2^k: few different sizes, at most a half too many."""
    power = 1 << max(blocks - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and power * 3 // 4 >= blocks else power


def _slots(table: Table, start: int, end: int, size: int) -> "np.ndarray":
    places = np.arange(start, end)
    return np.array(table, np.int64)[places // size] * size + places % size


def _blocks(tables: Sequence[Table], first: int, last: int, device: torch.device) -> "slice | Tensor":
    """Blocks first to last of each table; the empty block where a table ends earlier."""
    numbers = np.zeros((len(tables), last - first), np.int64)
    for line, table in enumerate(tables):
        found = table[first:last]
        numbers[line, : len(found)] = found
    return _neighbours(numbers.reshape(-1), device)


def _neighbours(numbers: "np.ndarray", device: torch.device) -> "slice | Tensor":
    """Block numbers as a slice where they follow each other, else as a tensor."""
    first = int(numbers[0])
    if int(numbers[-1]) - first == len(numbers) - 1 and (np.diff(numbers) == 1).all():
        return slice(first, first + len(numbers))
    return torch.from_numpy(numbers).to(device)


class _Passing:
    """A cache that keeps nothing: what is read is the query."""

    length = 0

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
        return query


@torch.inference_mode()
def equal_sizes(model: Decoder, largest: int) -> list[list[int]]:
    """Numbers of rows, up to at least `largest`, grouped so that within a group each row gets the same bits.

    Matrix libraries add up in an order that depends on the number of rows, so that the same text in a larger batch may
    get other last bits. Which numbers agree is measured: on one layer, and on products in the shapes of its matrices and
    of the output head whose exact value is 0, so that nothing but the order of their sums is seen.
    """
    sizes = [size for size in SIZES if size < largest]
    sizes.append(next((size for size in SIZES if size >= largest), largest))
    random = torch.Generator().manual_seed(0)
    like = activation(model)
    hidden = torch.randn(sizes[-1], len(like), generator=random).to(like)
    zeros = [_zero_products(*shape, sizes[-1], like, random) for shape in _product_shapes(model)]

    def measure(size: int) -> list[Tensor]:
        compared = min(max(COMPARED, size), sizes[-1])
        found = [_in_pieces(lambda rows: _one_layer(model, rows), hidden[-compared:], size)]
        return found + [
            _in_pieces(lambda rows, weight=weight: multiply(rows, weight), rows[-compared:], size)
            for weight, rows in zeros
        ]

    groups: list[tuple[list[Tensor], list[int]]] = []
    for size in reversed(sizes):
        found = measure(size)
        home = next((members for known, members in groups if _agree(known, found)), None)
        if home is None:
            groups.append((found, [size]))
        else:
            home.insert(0, size)
    return [members for _, members in groups]


def _in_pieces(compute: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """What is computed from rows, `size` of them at a time."""
    return torch.cat([compute(piece) for piece in rows[-(len(rows) // size * size) :].split(size)])


def _agree(known: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    counts = [min(len(one), len(other)) for one, other in zip(known, found, strict=True)]
    return all(
        torch.equal(one[-count:], other[-count:])
        for one, other, count in zip(known, found, counts, strict=True)
    )


def _one_layer(model: Decoder, rows: Tensor) -> Tensor:
    return model.norm(model.layers[0](rows[None], None, None, True, _Passing()))[0]


def _product_shapes(model: Decoder) -> set[tuple[int, int]]:
    """Outputs and inputs of the plain matrices of a layer and of the output head, of the latter a part."""
    plain = [module for module in model.layers[0].modules() if isinstance(module, nn.Linear)]
    head = (min(model.output_weight.shape[0], MOST_OUTPUTS), model.config.embedding_dim)
    return {(module.out_features, module.in_features) for module in plain} | {head}


def _zero_products(
    outputs: int, inputs: int, count: int, like: Tensor, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A matrix [outputs, inputs] and rows [count, inputs] whose products are 0 but for rounding."""
    half, order = inputs // 2, torch.randperm(inputs // 2 * 2, generator=random)
    one = torch.randn(min(outputs, 64), half, generator=random).repeat(-(-outputs // 64), 1)[:outputs]
    other = torch.randn(count, half, generator=random)
    return torch.cat([one, -one], 1)[:, order].to(like), torch.cat([other, other], 1)[:, order].to(like)


class Reader:
    """Reads with a model over a paged cache, in numbers of rows that give each row the same bits.

    Args:
        model: a decoder in evaluation mode.
        cache: made for it.
        rows: tokens of answers that are likely to be read at once.
        piece: tokens of prompts that are likely to be read at once.
    """

    def __init__(self, model: Decoder, cache: PagedCache, rows: int, piece: int):
        self.model, self.cache = model, cache
        groups = equal_sizes(model, max(rows, piece))
        # For prompts what agrees with a whole piece; for answers the group that is fit for one row, but for many too.
        whole = fitting(piece, sorted(size for group in groups for size in group))
        self._piece_sizes = next(group for group in groups if whole in group)
        self._row_sizes = min(
            (group for group in groups if group[-1] >= min(rows, 32)), key=lambda group: group[0]
        )

    @torch.inference_mode()
    def read_pieces(self, pieces: Sequence[Piece]) -> Tensor:
        """Hidden vectors of the tokens of some pieces, one after another: [N, D]."""
        tokens = [token for piece in pieces for token in piece.tokens]
        positions = [place for piece in pieces for place in range(piece.start, piece.end)]
        return self._read(tokens, positions, PromptView(self.cache, pieces), self._piece_sizes)

    @torch.inference_mode()
    def read_rows(self, tokens: Sequence[int], tables: Sequence[Table], positions: Sequence[int]) -> Tensor:
        """Hidden vectors of tokens of answers, each with its text's table and its position: [N, D].

        Tokens of one text come in order. More than fit are read in several passes.
        """
        most, found = self._row_sizes[-1], []
        for first in range(0, len(tokens), most):
            part = slice(first, first + most)
            view = RowsView(self.cache, tables[part], positions[part])
            found.append(self._read(tokens[part], positions[part], view, self._row_sizes))
        return found[0] if len(found) == 1 else torch.cat(found)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden vectors [N, D] to logits, float32 [N, rows of the output head]."""
        pieces = []
        for part in hidden.split(self._row_sizes[-1]):
            padding = fitting(len(part), self._row_sizes) - len(part)
            padded = torch.cat([part, part.new_zeros(padding, part.shape[1])]) if padding else part
            pieces.append(self.model.logits(padded)[: len(part)])
        return torch.cat(pieces).float()

    def _read(
        self, tokens: Sequence[int], positions: Sequence[int], view: PromptView | RowsView, sizes: list[int]
    ) -> Tensor:
        count = fitting(len(tokens), sizes)
        numbers = np.zeros((2, count), np.int64)
        numbers[0, : len(tokens)], numbers[1, : len(tokens)] = tokens, positions
        given = torch.from_numpy(numbers).to(self.cache.memory.device)
        return self.model(given[0][None], positions=given[1][None], cache=view)[0, : len(tokens)]


def fitting(count: int, sizes: Sequence[int]) -> int:
    """The least of some numbers that is not below a count; the count itself where all are."""
    return next((size for size in sizes if size >= count), count)
