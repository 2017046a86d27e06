"""Objectives: from a model and a batch to a summed loss and the weight it was summed over.

`objective(model, batch) -> (loss_sum, weight)` is the seam that every way of training goes through. Losses are summed,
never averaged, and divided once by the weight of the whole step, so neither gradient accumulation nor the number of
processes can change the result. Knows nothing of optimizers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from glasshouse.models.decoder import Decoder

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


Objective = Callable[[Any, TokenBatch], tuple[Tensor, int]]


def next_token(model: Decoder, batch: TokenBatch) -> tuple[Tensor, int]:
    """Cross-entropy of each token given those before it in its document: (sum in nats, number of tokens)."""
    hidden = model(batch.tokens, positions=batch.positions, documents=batch.documents)
    loss = linear_cross_entropy(hidden.flatten(0, 1), model.output_weight, batch.labels.flatten())
    return loss, int((batch.labels != IGNORED).sum())


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against labels, without ever holding all the scores.

    The gradient is taken chunk by chunk in the forward pass, as in Liger kernel (arXiv:2410.10989): the scores of a
    chunk are turned into their own gradient and dropped.

    Args:
        hidden: [N, D].
        weight: [V, D].
        labels: int64 [N]; `IGNORED` rows count nothing.

    Returns:
        The sum in nats, a float32 scalar.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]  # pyright: ignore[reportAttributeAccessIssue]
        hidden_gradient = torch.empty_like(hidden) if wanted else None
        weight_gradient: Tensor | None = None
        rows = max(1, CHUNK_SCORES // weight.shape[0])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            piece, label = hidden[start : start + rows], labels[start : start + rows, None]
            learned = label != IGNORED
            scores = torch.log_softmax(piece @ weight.T, dim=-1, dtype=torch.float32)
            target = label.clamp_min(0)
            total -= (scores.gather(1, target) * learned).sum()
            if hidden_gradient is None:
                continue
            gradient = scores.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            gradient = gradient.mul_(learned).to(hidden.dtype)
            torch.mm(gradient, weight, out=hidden_gradient[start : start + rows])
            product = gradient.T @ piece
            if weight_gradient is None:
                weight_gradient = product if start + rows >= hidden.shape[0] else product.float()
            else:
                weight_gradient += product
        ctx.save_for_backward(hidden_gradient, weight_gradient)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = upstream.to(hidden_gradient.dtype)
        return hidden_gradient * scale, (weight_gradient * upstream).to(hidden_gradient.dtype), None
