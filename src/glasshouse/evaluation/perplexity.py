"""Bits per byte: what a model pays for held-out text, every token predicted once, with an interval.

A document is scored from its start: the model reads end_of_document, then the document, and is charged for each token
of it and for the end_of_document that closes it. Bits are divided by UTF-8 bytes, so models with different tokenizers
compare. Knows documents as token ids and sizes; nothing of runs.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from glasshouse.errors import InputError
from glasshouse.text.packing import Split
from glasshouse.text.tokenizer import Tokenizer

NATS_PER_BIT = math.log(2)
FEWEST_DOCUMENTS = 30
"""With fewer documents than this, the interval is over blocks of text instead: resampling a handful says little."""
BLOCKS = 100
MOST_BYTES = 2_000_000
"""Text that is measured unless asked otherwise: enough for an interval of about one per cent."""
LOGIT_ROWS = 1024
METHOD = "percentile bootstrap over {units}, {draws:,} draws"

Score = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""Documents' token ids, each closed by end_of_document, to the nats of each token."""


class LanguageModel(Protocol):
    """What scoring asks of a model: a decoder, as `open_artifact` gives it."""

    @property
    def config(self) -> Any:
        """Its shape; `context_length` is used."""
        ...

    @property
    def output_weight(self) -> torch.Tensor:
        """Where its weights are."""
        ...

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids [B, T] to hidden vectors [B, T, D]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden vectors [..., D] to [..., vocab_size]."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """Documents to be predicted.

    Args:
        tokens: ids of each document, end_of_document last.
        bytes: int64 [documents]: UTF-8 bytes of each.
        token_bytes: int64 [vocab_size]: bytes each token stands for; 0 for special ones.
        digest: SHA-256 over the texts: the same documents have the same digest under any tokenizer.
    """

    tokens: Sequence[np.ndarray] = field(repr=False)
    bytes: np.ndarray = field(repr=False)
    token_bytes: np.ndarray = field(repr=False)
    digest: str


@dataclass(frozen=True)
class Measurement:
    """Bits per byte of a set of documents, and what it was computed from.

    Args:
        bits_per_byte: all nats / ln 2 / all UTF-8 bytes.
        low: lower end of the 95 % interval.
        high: upper end of it.
        documents: how many.
        tokens: how many were predicted, the closing end_of_document of each document included.
        bytes: UTF-8 bytes of all documents.
        method: how the interval was made.
        nats: float64 [documents]: what each document cost.
        sizes: int64 [documents]: UTF-8 bytes of each.
        unit_nats: float64 [units]: the same cost by unit of resampling: by document, or by block of text where there
            are few documents.
        unit_sizes: float64 [units]: UTF-8 bytes of each unit.
    """

    bits_per_byte: float
    low: float
    high: float
    documents: int
    tokens: int
    bytes: int
    method: str
    nats: np.ndarray = field(repr=False)
    sizes: np.ndarray = field(repr=False)
    unit_nats: np.ndarray = field(repr=False)
    unit_sizes: np.ndarray = field(repr=False)


def draw_documents(split: Split, most_bytes: int, seed: int = 0) -> list[int]:
    """Numbers of documents drawn from a split until they have `most_bytes` of text, in the split's order; at least one.

    The same for every tokenizer.
    """
    order = np.random.default_rng(seed).permutation(split.documents).tolist()
    chosen, size = [], 0
    for number in order:
        size += split.document(number)[1]
        if chosen and size > most_bytes:
            break
        chosen.append(number)
    return sorted(chosen)


def hold_out(
    split: Split, tokenizer: Tokenizer, numbers: Sequence[int] | None = None, *, encode: bool = False
) -> HeldOut:
    """Some documents of a split.

    Args:
        split: where they are.
        tokenizer: whose tokens they are to be.
        numbers: which documents; None for all.
        encode: encode their text with this tokenizer, because the split holds another's tokens.

    Raises:
        InputError: there are none, or they have no bytes.
    """
    numbers = range(split.documents) if numbers is None else numbers
    digest, tokens, sizes = hashlib.sha256(), [], []
    for number in numbers:
        stored, size = split.document(number)
        text = split.text(number)
        digest.update(hashlib.sha256(text.encode()).digest())
        tokens.append(np.array([*tokenizer.encode(text), tokenizer.end_of_document]) if encode else stored)
        sizes.append(size)
    if not sum(sizes):
        raise InputError("no text to measure on", f"{split.name} split", "hold out more documents")
    lengths = [
        0 if tokenizer.is_special(i) else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)
    ]
    return HeldOut(tokens, np.array(sizes), np.array(lengths), digest.hexdigest())


def measure(held_out: HeldOut, score: Score, *, seed: int = 0, draws: int = 2000) -> Measurement:
    """Bits per byte under any scorer, with its 95 % interval.

    Args:
        held_out: the documents.
        score: gives the nats of each token; `model_score(...)`, or an n-gram model's.
        seed: of the bootstrap.
        draws: of the bootstrap.
    """
    costs = score(held_out.tokens)
    nats = np.array([float(cost.sum(dtype=np.float64)) for cost in costs])
    unit_nats, unit_sizes, units = _units(held_out, costs, nats)
    low, high = ratio_interval(unit_nats, unit_sizes, seed=seed, draws=draws)
    size = int(held_out.bytes.sum())
    return Measurement(
        bits_per_byte=float(nats.sum()) / NATS_PER_BIT / size,
        low=low / NATS_PER_BIT,
        high=high / NATS_PER_BIT,
        documents=len(nats),
        tokens=sum(len(cost) for cost in costs),
        bytes=size,
        method=METHOD.format(units=units, draws=draws),
        nats=nats,
        sizes=held_out.bytes,
        unit_nats=unit_nats,
        unit_sizes=unit_sizes,
    )


def bits_per_byte(
    model: LanguageModel, held_out: HeldOut, *, end_of_document: int, seed: int = 0
) -> Measurement:
    """Bits per byte of a decoder; see `measure` and `model_score`."""
    return measure(held_out, model_score(model, end_of_document), seed=seed)


def ngram_score(log_probabilities: Callable[[np.ndarray], np.ndarray]) -> Score:
    """A scorer from a function that gives the log-probability of each token of a stream of documents."""

    def score(documents: Sequence[np.ndarray]) -> list[np.ndarray]:
        borders = np.cumsum([len(tokens) for tokens in documents])[:-1]
        return np.split(-log_probabilities(np.concatenate(list(documents))), borders)

    return score


def model_score(
    model: LanguageModel, end_of_document: int, *, stride: int | None = None, batch_tokens: int = 8192
) -> Score:
    """A scorer from a decoder.

    A document longer than the model's context is read in windows of that length, `stride` tokens apart; a token is
    charged in the first window it is in, so it has seen at least context - stride tokens, or all that precede it.

    Args:
        model: a decoder in evaluation mode.
        end_of_document: read before each document.
        stride: by how much windows move; half the context by default.
        batch_tokens: tokens in one forward pass, padding included.
    """
    context: int = model.config.context_length
    step: int = max(context // 2, 1) if stride is None else stride
    if not 1 <= step <= context:
        raise InputError(
            f"stride is {step}", "stride", f"give a whole number from 1 to the context, {context}"
        )

    def score(documents: Sequence[np.ndarray]) -> list[np.ndarray]:
        costs = [np.zeros(len(tokens)) for tokens in documents]
        windows = [
            (number, *window)
            for number, tokens in enumerate(documents)
            for window in _windows(len(tokens), context, step)
        ]
        # Windows of like length together, so that little is padded; the longest first, so that memory peaks at once.
        windows.sort(key=lambda window: window[1] - window[3])
        for batch in _batches(windows, batch_tokens):
            _score_batch(model, documents, batch, end_of_document, costs)
        return costs

    return score


def _windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first charged, stop) of the windows over a document's tokens; the token before `start` is read too."""
    stop = min(context, length)
    yield 0, 0, stop
    while stop < length:
        charged, stop = stop, min(stop + stride, length)
        yield stop - context, charged, stop


def _batches(
    windows: list[tuple[int, int, int, int]], batch_tokens: int
) -> Iterator[list[tuple[int, int, int, int]]]:
    """Runs of windows, longest first, whose padded size is at most `batch_tokens` (or which are a single one)."""
    start = 0
    while start < len(windows):
        rows = max(1, batch_tokens // (windows[start][3] - windows[start][1]))
        yield windows[start : start + rows]
        start += rows


@torch.inference_mode()
def _score_batch(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    batch: list[tuple[int, int, int, int]],
    end_of_document: int,
    costs: list[np.ndarray],
) -> None:
    """Write the nats of the charged tokens of some windows into `costs`."""
    longest = max(stop - start for _, start, _, stop in batch)
    read = np.full((len(batch), longest), end_of_document, dtype=np.int64)
    targets = np.zeros((len(batch), longest), dtype=np.int64)
    charged = np.zeros((len(batch), longest), dtype=bool)
    for row, (number, start, first, stop) in enumerate(batch):
        tokens = documents[number]
        if start:
            read[row, 0] = tokens[start - 1]
        read[row, 1 : stop - start] = tokens[start : stop - 1]
        targets[row, : stop - start] = tokens[start:stop]
        charged[row, first - start : stop - start] = True
    device = model.output_weight.device
    # Attention is causal, so what pads the end of a row changes nothing before it.
    hidden = model(torch.from_numpy(read).to(device))[torch.from_numpy(charged).to(device)]
    wanted = torch.from_numpy(targets[charged]).to(device)
    pieces = []
    for part in range(0, len(hidden), LOGIT_ROWS):  # logits of all at once would be the largest tensor by far
        logits = model.logits(hidden[part : part + LOGIT_ROWS]).float()
        pieces.append(
            torch.nn.functional.cross_entropy(logits, wanted[part : part + LOGIT_ROWS], reduction="none")
        )
    nats = torch.cat(pieces).double().cpu().numpy()
    borders = np.cumsum(charged.sum(1))[:-1]
    for (number, _, first, stop), cost in zip(batch, np.split(nats, borders), strict=True):
        costs[number][first:stop] = cost


def _units(
    held_out: HeldOut, costs: list[np.ndarray], nats: np.ndarray
) -> tuple[np.ndarray, np.ndarray, str]:
    """What is resampled: documents, or, where they are few, blocks of bytes. The blocks depend on the text alone, so
    that models with different tokenizers share them; a token belongs to the block that its last byte is in."""
    if len(nats) >= FEWEST_DOCUMENTS:
        return nats, held_out.bytes.astype(np.float64), "documents"
    block = max(int(held_out.bytes.sum()) // BLOCKS, 1)
    unit_nats, unit_sizes = [], []
    for tokens, cost, size in zip(held_out.tokens, costs, held_out.bytes.tolist(), strict=True):
        blocks = max(round(size / block), 1)
        ends = np.cumsum(held_out.token_bytes[tokens])
        place = np.minimum((np.maximum(ends - 1, 0) * blocks) // max(size, 1), blocks - 1)
        unit_nats.append(np.bincount(place, weights=cost, minlength=blocks))
        borders = -(-np.arange(blocks + 1) * size // blocks)
        unit_sizes.append(np.diff(borders).astype(np.float64))
    return np.concatenate(unit_nats), np.concatenate(unit_sizes), f"blocks of about {block:,} bytes"


def resample(values: np.ndarray, *, seed: int, draws: int) -> np.ndarray:
    """Sums of `values` [columns, units] over resampled units: float64 [columns, draws].

    The same seed resamples the same units, so differences of sums are paired.
    """
    generator = np.random.default_rng(seed)
    units = values.shape[1]
    sums = np.empty((len(values), draws))
    step = max(1, 2**20 // units)
    for start in range(0, draws, step):
        stop = min(start + step, draws)
        drawn = generator.integers(units, size=(stop - start, units))
        sums[:, start:stop] = values[:, drawn].sum(-1)
    return sums


def ratio_interval(costs: np.ndarray, sizes: np.ndarray, *, seed: int, draws: int) -> tuple[float, float]:
    """The 95 % interval of sum(costs) / sum(sizes), by percentile bootstrap over units.

    Source: Efron and Tibshirani 1993, chapter 13; spread by sqrt(n / (n - 1)) because a bootstrap is that much too
    narrow for n units. Both ends are infinite for a single unit.
    """
    units = len(costs)
    if units < 2:
        return -math.inf, math.inf
    cost, size = resample(np.stack([costs, sizes]), seed=seed, draws=draws)
    ratio = float(costs.sum() / sizes.sum())
    spread = ratio + (cost / np.maximum(size, 1e-300) - ratio) * math.sqrt(units / (units - 1))
    low, high = np.quantile(spread, [0.025, 0.975])
    return float(low), float(high)
