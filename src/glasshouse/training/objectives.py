"""Objectives: from a model and a batch to a summed loss and the weight it was summed over.

`objective(model, batch) -> (loss_sum, weight)` is the seam that every way of training goes through. Losses are summed,
never averaged, and divided once by the weight of the whole step, so neither gradient accumulation nor the number of
processes can change the result. Knows nothing of optimizers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

from glasshouse.device import Device
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.models.encoder import Encoder, EncoderConfig, mean_of_tokens
from glasshouse.models.encoder_decoder import EncoderDecoder
from glasshouse.text.packing import Batch

IGNORED = -100
"""The label of a position that is not learned from."""

CHUNK_SCORES = 2**23
"""Most scores (positions times vocabulary) held at once by the cross-entropy."""


@dataclass(frozen=True)
class TokenBatch:
    """Rows of tokens on the device that trains.

    Args:
        tokens: int64 [B, T].
        labels: the token that follows each, int64 [B, T]; `IGNORED` where nothing is learned.
        positions: position of each token in its document, int64 [B, T].
        documents: number of each token's document within its row, [B, T]; None when each row is one document.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor | None


def to_device(rows: Batch, device: Device, isolate: bool) -> TokenBatch:
    """Rows of a corpus as tensors on the device; without isolation a row is one document."""
    tokens, labels, positions, documents = (
        torch.from_numpy(array).to(device.torch_device, non_blocking=True)
        for array in (rows.tokens, rows.labels, rows.positions, rows.documents)
    )
    if not isolate:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return TokenBatch(tokens, labels, positions, documents if isolate else None)


@dataclass(frozen=True)
class SequenceBatch:
    """Pairs of a source and a target, on the device that trains.

    Args:
        sources: int64 [B, S], padded on the right.
        source_mask: bool [B, S], True at tokens; None where nothing is padding.
        tokens: what the decoder is given, int64 [B, T]: the start token, then the target without its last token.
        labels: the target, int64 [B, T]; `IGNORED` at padding.
    """

    sources: Tensor
    source_mask: Tensor | None
    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PairBatch:
    """Pairs of texts that mean the same (question and answer, a sentence and its paraphrase).

    Args:
        first: int64 [B, S], padded on the right.
        first_mask: bool [B, S], True at tokens.
        second: int64 [B, T].
        second_mask: bool [B, T].
    """

    first: Tensor
    first_mask: Tensor
    second: Tensor
    second_mask: Tensor


Objective = Callable[[Any, Any], tuple[Tensor, int]]
"""From a model and a batch of its kind to the summed loss and its weight."""


def next_token(model: Decoder, batch: TokenBatch) -> tuple[Tensor, int]:
    """Cross-entropy of each token given those before it in its document: (sum in nats, number of tokens)."""
    hidden = model(batch.tokens, positions=batch.positions, documents=batch.documents)
    loss = linear_cross_entropy(hidden.flatten(0, 1), model.output_weight, batch.labels.flatten())
    return loss, int((batch.labels != IGNORED).sum())


def masked_token(model: Encoder, batch: TokenBatch) -> tuple[Tensor, int]:
    """Cross-entropy of each hidden token given what is shown of its document: (sum in nats, number of tokens)."""
    hidden = model(batch.tokens, positions=batch.positions, documents=batch.documents)
    chosen = batch.labels != IGNORED
    made, bias = model.masked(hidden[chosen])
    return linear_cross_entropy(made, model.output_weight, batch.labels[chosen], bias), int(chosen.sum())


def objective_for(config: DecoderConfig | EncoderConfig) -> Objective:
    """What a family is pretrained to do."""
    return masked_token if isinstance(config, EncoderConfig) else next_token


def contrastive(temperature: float) -> Objective:
    """The objective of embeddings: the other half of each pair must be nearer than those of all other pairs.

    InfoNCE (van den Oord et al. 2018, arXiv:1807.03748) with the batch's own negatives (Henderson et al. 2017,
    arXiv:1705.00652, 4.4): cross-entropy of each first text's cosines to all second texts, divided by the temperature,
    against its own. A text is the mean of its hidden vectors. The negatives are those computed at once, so the
    micro-batch is part of what is learned.

    Args:
        temperature: what cosines are divided by; 0.05 is usual.

    Returns:
        An objective on a `PairBatch`: (sum in nats, number of pairs).
    """

    def objective(model: Encoder, batch: PairBatch) -> tuple[Tensor, int]:
        both = []
        for tokens, mask in ((batch.first, batch.first_mask), (batch.second, batch.second_mask)):
            vectors = mean_of_tokens(model(tokens, mask=mask), mask)
            both.append(torch.nn.functional.normalize(vectors.float(), dim=-1))
        scores = both[0] @ both[1].T / temperature
        own = torch.arange(len(scores), device=scores.device)
        return torch.nn.functional.cross_entropy(scores, own, reduction="sum"), len(scores)

    return objective


def sequence_to_sequence(smoothing: float = 0.0) -> Objective:
    """The objective of translation: cross-entropy of each target token given the source and the target before it.

    Args:
        smoothing: share of each label that is spread evenly over the vocabulary (Szegedy et al. 2016,
            arXiv:1512.00567, section 7).

    Returns:
        An objective on a `SequenceBatch`: (sum in nats, number of target tokens).
    """

    def objective(model: EncoderDecoder, batch: SequenceBatch) -> tuple[Tensor, int]:
        memory = model.encode(batch.sources, batch.source_mask)
        hidden = model(batch.tokens, memory=memory, memory_mask=batch.source_mask)
        loss = linear_cross_entropy(
            hidden.flatten(0, 1), model.output_weight, batch.labels.flatten(), model.output_bias, smoothing
        )
        return loss, int((batch.labels != IGNORED).sum())

    return objective


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T + bias` against labels, without ever holding all the scores.

    The gradient is taken chunk by chunk in the forward pass, as in Liger kernel (arXiv:2410.10989): the scores of a
    chunk are turned into their own gradient and dropped.

    Args:
        hidden: [N, D].
        weight: [V, D].
        labels: int64 [N]; `IGNORED` rows count nothing.
        bias: [V], or None.
        smoothing: share of each label that is spread evenly over all V.

    Returns:
        The sum in nats, a float32 scalar.
    """
    if not len(labels):  # a process without rows, or rows with nothing hidden
        return hidden.sum(dtype=torch.float32)
    return _LinearCrossEntropy.apply(hidden, weight, labels, bias, smoothing)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        smoothing: float,
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)  # pyright: ignore[reportAttributeAccessIssue]
        hidden_gradient = torch.empty_like(hidden) if wanted else None
        weight_gradient: Tensor | None = None
        bias_gradient = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        rows = max(1, CHUNK_SCORES // weight.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        even = smoothing / weight.shape[0]
        for start in range(0, hidden.shape[0], rows):
            piece, label = hidden[start : start + rows], labels[start : start + rows, None]
            learned = label != IGNORED
            logits = torch.nn.functional.linear(piece, weight, bias)
            scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            target = label.clamp_min(0)
            total -= (1 - smoothing) * (scores.gather(1, target) * learned).sum()
            if smoothing:
                total -= even * (scores.sum(1, keepdim=True) * learned).sum()
            if hidden_gradient is None:
                continue
            off = torch.full_like(target, smoothing - 1, dtype=torch.float32)
            gradient = scores.exp_().scatter_add_(1, target, off)
            gradient = gradient.sub_(even) if smoothing else gradient
            gradient = gradient.mul_(learned)
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            torch.mm(gradient, weight, out=hidden_gradient[start : start + rows])
            product = gradient.T @ piece
            if weight_gradient is None:
                weight_gradient = product if start + rows >= hidden.shape[0] else product.float()
            else:
                weight_gradient += product
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_gradient, weight_gradient, bias_gradient = ctx.saved_tensors
        scale, dtype = upstream.to(hidden_gradient.dtype), hidden_gradient.dtype
        bias = None if bias_gradient is None else (bias_gradient * upstream).to(dtype)
        return hidden_gradient * scale, (weight_gradient * upstream).to(dtype), None, bias, None


def label_log_probabilities(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label under `hidden @ weight.T`; scores are made anew for the backward pass, a chunk at a time.

    Args:
        hidden: [N, D].
        weight: [V, D].
        labels: int64 [N], none ignored.

    Returns:
        In nats, float32 [N].
    """

    def chunk(piece: Tensor, weight: Tensor, label: Tensor) -> Tensor:
        scores = torch.log_softmax(torch.nn.functional.linear(piece, weight), dim=-1, dtype=torch.float32)
        return scores.gather(1, label[:, None])[:, 0]

    return torch.cat(list(_in_chunks(chunk, hidden, weight, labels)))


def distillation(teacher: Decoder, vocabulary: int, temperature: float) -> Objective:
    """The objective of learning from a larger model: at each token of an answer, KL(teacher || student), of distributions
    softened by a temperature, times its square (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        teacher: gives the distributions; it is not trained.
        vocabulary: tokens that both know.
        temperature: what logits are divided by.

    Returns:
        An objective on a `TokenBatch`: (sum in nats, number of tokens).
    """
    teacher.requires_grad_(False).eval()

    def chunk(piece: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        own, other = (
            torch.log_softmax(
                torch.nn.functional.linear(vectors, rows[:vocabulary]).float() / temperature, -1
            )
            for vectors, rows in ((piece, weight), (target, teacher.output_weight))
        )
        return (other.exp() * (other - own)).sum(-1)

    def objective(model: Decoder, batch: TokenBatch) -> tuple[Tensor, int]:
        learned = batch.labels != IGNORED
        with torch.no_grad():
            target = teacher(batch.tokens, positions=batch.positions, documents=batch.documents)[learned]
        hidden = model(batch.tokens, positions=batch.positions, documents=batch.documents)[learned]
        pieces = _in_chunks(chunk, hidden, model.output_weight, target)
        return torch.cat(list(pieces)).sum() * temperature**2, len(hidden)

    return objective


def _in_chunks(
    chunk: Callable[[Tensor, Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, others: Tensor
) -> Iterator[Tensor]:
    """What a function makes of a few rows at a time; nothing inside it is held for the backward pass."""
    rows = max(1, CHUNK_SCORES // weight.shape[0])
    for start in range(0, max(1, len(hidden)), rows):
        yield checkpoint(  # pyright: ignore[reportReturnType]
            chunk, hidden[start : start + rows], weight, others[start : start + rows], use_reentrant=False
        )
