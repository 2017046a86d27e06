"""Losses and gradients against PyTorch's own cross-entropy, and against themselves split up in other ways."""

import pytest
import torch
from torch.nn import functional

from glasshouse.models.decoder import Decoder, DecoderConfig, initialize
from glasshouse.training import objectives
from glasshouse.training.objectives import IGNORED, TokenBatch, linear_cross_entropy, next_token

SHAPE = DecoderConfig(50, 32, 2, 4, 2, 8, 64, 64)


def random_model(seed: int = 0) -> Decoder:
    """A model whose every weight is random, the ones that start at zero too."""
    model = Decoder(SHAPE)
    initialize(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + 1)) * 0.05
            )
    return model


@pytest.mark.parametrize("chunk", [2**24, 350, 7])
def test_linear_cross_entropy_equals_pytorch(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK_SCORES", chunk)
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(50, (23,))
    labels[::5] = IGNORED
    ours = linear_cross_entropy(hidden, weight, labels)
    expected = functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(ours, expected)
    gradients = torch.autograd.grad(ours * 0.3, [hidden, weight])
    reference = torch.autograd.grad(expected * 0.3, [hidden, weight])
    for one, other in zip(gradients, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_nothing_to_learn_gives_zero_loss_and_gradient() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), IGNORED))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden.grad is not None
    assert float(hidden.grad.abs().sum()) == 0.0


def test_scores_are_never_all_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK_SCORES", 1000)
    largest = 0
    softmax = torch.log_softmax

    def watched(scores: torch.Tensor, **options: object) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, scores.numel())
        return softmax(scores, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "log_softmax", watched)
    linear_cross_entropy(
        torch.randn(300, 4, requires_grad=True), torch.randn(100, 4), torch.zeros(300, dtype=torch.int64)
    )
    assert 0 < largest <= 1000


def packed_and_separate() -> tuple[TokenBatch, list[torch.Tensor]]:
    documents = [torch.randint(50, (length,)) for length in (5, 9, 2, 16)]
    tokens = torch.cat(documents)[None]
    labels = torch.cat([torch.cat([document[1:], torch.tensor([IGNORED])]) for document in documents])[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    numbers = torch.cat([torch.full((len(document),), n) for n, document in enumerate(documents)])[None]
    return TokenBatch(tokens, labels, positions, numbers), documents


def test_packed_documents_give_the_losses_of_separate_ones_and_leak_without_the_mask() -> None:
    torch.manual_seed(0)
    model = random_model()
    batch, documents = packed_and_separate()
    packed, weight = next_token(model, batch)
    separate = 0.0
    for document in documents:
        logits = model.logits(model(document[None]))[0, :-1]
        separate += float(functional.cross_entropy(logits, document[1:], reduction="sum").detach())
    assert weight == sum(len(document) - 1 for document in documents)
    packed = packed.detach()
    assert float(packed) == pytest.approx(separate, rel=1e-5)
    leaking, _ = next_token(model, TokenBatch(batch.tokens, batch.labels, batch.positions, None))
    assert abs(float(leaking.detach()) - separate) > 1e-2
