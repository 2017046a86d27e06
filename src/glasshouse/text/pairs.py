"""Pairs of a source and a target: read from the files people have, encoded, and dealt out in batches of like length.

A batch is a pure function of (seed, step), so nothing about the position in the data is ever stored. Knows tokenizers;
nothing of models, tasks or training.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glasshouse.errors import InputError
from glasshouse.files import sha256_bytes
from glasshouse.text.tokenizer import Tokenizer

IGNORED = -100
"""The label of a padded position."""

COLUMNS = (("source", "target"), ("prompt", "completion"), ("input", "output"), ("en", "de"))
"""Names of the two sides that a JSON line may use, when none are asked for."""

SHOWN_ROWS = 5
"""Row numbers named where rows are refused."""


class Pair(NamedTuple):
    """A source text and the target text it is to become."""

    source: str
    target: str


@dataclass(frozen=True)
class Pairs:
    """What was read, and what was left out.

    Args:
        pairs: in the order of the file.
        empty: row numbers, from 1, where a side is empty.
        repeated: rows that say what an earlier row said, in the same words; they stay.
        digest: SHA-256 of all the pairs.
    """

    pairs: tuple[Pair, ...]
    empty: tuple[int, ...]
    repeated: int
    digest: str


def read_pairs(paths: Sequence[Path], columns: tuple[str, str] | None = None) -> Pairs:
    """Read pairs from one file of rows or from two files of lines that belong together; `.gz` is unpacked.

    Args:
        paths: one `.tsv` file (two or more columns; with `columns`, its first line names them), one `.jsonl` file, or
            two text files, sources and targets, line by line.
        columns: names of the source and the target column.

    Raises:
        InputError: a file cannot be read, a row has no two sides, the two files differ in length, or nothing is left.
    """
    if len(paths) == 2:
        rows = _parallel(paths[0], paths[1])
    elif len(paths) == 1:
        name = paths[0].name.removesuffix(".gz")
        rows = (
            _json_rows(paths[0], columns)
            if name.endswith((".jsonl", ".json"))
            else _tsv_rows(paths[0], columns)
        )
    else:
        raise InputError(
            f"{len(paths)} files of pairs", "pairs", "give one file of pairs, or two files of lines"
        )
    empty, kept = [], []
    for number, pair in rows:
        if pair.source.strip() and pair.target.strip():
            kept.append(Pair(pair.source.strip(), pair.target.strip()))
        else:
            empty.append(number)
    if not kept:
        raise InputError("no row has two sides", str(paths[0]), "give rows with a source and a target")
    digest = sha256_bytes("".join(f"{source}\t{target}\n" for source, target in kept).encode())
    return Pairs(tuple(kept), tuple(empty), len(kept) - len(set(kept)), digest)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, plain or as .gz, without their ends; only a line feed ends a line.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read: {error}", str(path), "give a text file, plain or as .gz") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"line {line} is not UTF-8", str(path), "save it as UTF-8") from None
    yield from (line.removesuffix("\r") for line in text.removesuffix("\n").split("\n"))


def _parallel(sources: Path, targets: Path) -> Iterator[tuple[int, Pair]]:
    left, right = list(read_lines(sources)), list(read_lines(targets))
    if len(left) != len(right):
        what = f"{len(left):,} lines against {len(right):,}"
        raise InputError(what, f"{sources}, {targets}", "give two files whose lines belong together")
    yield from enumerate(map(Pair, left, right), 1)


def _tsv_rows(path: Path, columns: tuple[str, str] | None) -> Iterator[tuple[int, Pair]]:
    places, first = (0, 1), 1
    rows = list(read_lines(path))
    if columns is not None:
        header = rows[0].split("\t")
        missing = [name for name in columns if name not in header]
        if missing:
            raise InputError(f"no column {missing[0]!r}", f"{path}, line 1", f"columns: {', '.join(header)}")
        places, first, rows = (header.index(columns[0]), header.index(columns[1])), 2, rows[1:]
    for number, row in enumerate(rows, first):
        cells = row.split("\t")
        if row.strip() and len(cells) <= max(places):
            raise InputError(
                f"{len(cells)} column(s)", f"{path}, line {number}", "part source and target by a tab"
            )
        if row.strip():
            yield number, Pair(cells[places[0]], cells[places[1]])


def _json_rows(path: Path, columns: tuple[str, str] | None) -> Iterator[tuple[int, Pair]]:
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            yield number, _json_pair(line, columns, f"{path}, line {number}")


def _json_pair(line: str, columns: tuple[str, str] | None, where: str) -> Pair:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError("not JSON", where, "write one JSON object a line") from None
    if isinstance(row, dict) and isinstance(row.get("translation"), dict):
        row = row["translation"]
    if not isinstance(row, dict):
        raise InputError("not a JSON object", where, 'write {"source": "...", "target": "..."}')
    for names in (columns,) if columns else COLUMNS:
        if names[0] in row and names[1] in row:
            source, target = row[names[0]], row[names[1]]
            if not (isinstance(source, str) and isinstance(target, str)):
                raise InputError("a side that is no text", where, "give two strings")
            return Pair(source, target)
    wanted = " and ".join(columns or COLUMNS[0])
    raise InputError(f"no {wanted}", where, f"give both; the row has {', '.join(map(str, row))[:80]}")


def encode_pairs(
    tokenizer: Tokenizer, pairs: Sequence[Pair], longest: int, threads: int = 1
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids of the sources, as a model reads them, and of the targets with their end token.

    Args:
        tokenizer: of both sides.
        pairs: texts.
        longest: most tokens of a side.
        threads: CPU threads.

    Raises:
        InputError: a side is longer, which would be cut.
    """
    end = np.array([tokenizer.end_of_document])
    sources = encode_sources(tokenizer, [pair.source for pair in pairs], threads)
    targets = tokenizer.encode_batch_arrays([pair.target for pair in pairs], threads)
    targets = [np.concatenate([ids.astype(np.int64), end]) for ids in targets]
    for number, (source, target) in enumerate(zip(sources, targets, strict=True), 1):
        if max(len(source), len(target)) > longest:
            what = (
                f"pair {number} has {max(len(source), len(target)):,} tokens on a side, more than {longest:,}"
            )
            raise InputError(what, "pairs", "cut it into sentences")
    return sources, targets


def encode_sources(tokenizer: Tokenizer, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
    """Ids of texts as an encoder reads them: between the special tokens that the tokenizer puts around a text.

    Ours begins with end_of_document; T5's and Marian's end with theirs.
    """
    probe = tokenizer.plain.encode("a")
    plain = [place for place, special in enumerate(probe.special_tokens_mask) if not special]
    before, after = (
        np.array(ids, dtype=np.int64) for ids in (probe.ids[: plain[0]], probe.ids[plain[-1] + 1 :])
    )
    arrays = tokenizer.encode_batch_arrays(texts, threads)
    return [np.concatenate([before, ids.astype(np.int64), after]) for ids in arrays]


@dataclass(frozen=True)
class SequenceRows:
    """Pairs of one batch, padded on the right.

    Args:
        sources: int64 [B, S].
        source_mask: bool [B, S], True at tokens.
        tokens: int64 [B, T]: the start token, then the target without its last.
        labels: int64 [B, T]: the target, ended by the end token; `IGNORED` at padding.
    """

    sources: np.ndarray
    source_mask: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray


@dataclass
class PairStream:
    """Encoded pairs, dealt out in small batches of like length.

    In every epoch each pair comes exactly once. Pairs are sorted by the length of target and source, those of one
    length in an order drawn for the epoch, and cut into batches of about `batch_tokens`; the batches come in an order
    drawn for the epoch too. Where the cuts are depends on the lengths alone, so every epoch has as many.

    Args:
        sources: ids of each source.
        targets: ids of each target, its end token included.
        start: the token that a target is written after.
        pad: the token at padding.
        batch_tokens: tokens of a batch, source and target together, padding included.
        seed: of the order.
    """

    sources: list[np.ndarray]
    targets: list[np.ndarray]
    start: int
    pad: int
    batch_tokens: int
    seed: int
    _cuts: np.ndarray = field(init=False)
    _epoch: tuple[int, np.ndarray, np.ndarray] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._lengths = np.array([[len(t), len(s)] for s, t in zip(self.sources, self.targets, strict=True)])
        order = np.lexsort((self._lengths[:, 1], self._lengths[:, 0]))
        self._cuts = _cut(self._lengths[order], self.batch_tokens)

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return len(self._cuts) - 1

    def batch(self, number: int) -> SequenceRows:
        """The batch of this number, counted through all epochs."""
        epoch, place = divmod(number, self.batches)
        if self._epoch is None or self._epoch[0] != epoch:
            draw = np.random.default_rng([self.seed, epoch])
            ties = draw.permutation(len(self.sources))
            order = np.lexsort((ties, self._lengths[:, 1], self._lengths[:, 0]))
            self._epoch = (epoch, order, draw.permutation(self.batches))
        _, order, turns = self._epoch
        chosen = order[self._cuts[turns[place]] : self._cuts[turns[place] + 1]]
        return self.rows(chosen.tolist())

    def rows(self, chosen: Sequence[int]) -> SequenceRows:
        """Some pairs as a batch."""
        sources = pad_rows([self.sources[row] for row in chosen], self.pad)
        lengths = self._lengths[list(chosen), 1]
        mask = np.arange(sources.shape[1])[None, :] < lengths[:, None]
        labels = pad_rows([self.targets[row] for row in chosen], IGNORED)
        tokens = np.where(labels == IGNORED, self.pad, labels)
        tokens = np.concatenate([np.full((len(tokens), 1), self.start), tokens[:, :-1]], axis=1)
        return SequenceRows(sources, mask, tokens, labels)

    def padding(self) -> float:
        """Share of an epoch's positions, of both sides, that is padding."""
        spent = 0
        order = np.lexsort((self._lengths[:, 1], self._lengths[:, 0]))
        for start, stop in zip(self._cuts[:-1], self._cuts[1:], strict=True):
            spent += (stop - start) * self._lengths[order[start:stop]].max(axis=0).sum()
        return 1.0 - float(self._lengths.sum() / spent)


def _cut(lengths: np.ndarray, batch_tokens: int) -> np.ndarray:
    """Where to cut sorted lengths [N, 2] into batches: a batch ends before it has more tokens than allowed."""
    cuts, widest = [0], np.zeros(2, dtype=np.int64)
    for place, pair in enumerate(lengths):
        widest = np.maximum(widest, pair)
        if place > cuts[-1] and (place + 1 - cuts[-1]) * int(widest.sum()) > batch_tokens:
            cuts.append(place)
            widest = pair
    return np.array([*cuts, len(lengths)])


def pad_rows(rows: Sequence[np.ndarray], filler: int) -> np.ndarray:
    """Rows of ids as one int64 array, filled up on the right."""
    padded = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded
