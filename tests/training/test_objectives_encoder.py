"""The encoder's objectives against formulas written another way."""

import math

import pytest
import torch

from glasshouse.models.decoder import initialize
from glasshouse.models.encoder import Encoder, EncoderConfig, HeadConfig
from glasshouse.training.objectives import IGNORED, PairBatch, TokenBatch, contrastive, masked_token

SHAPE = EncoderConfig(50, 32, 3, 4, 48, 64, local_window=4)


@pytest.fixture
def model() -> Encoder:
    model = Encoder(SHAPE)
    initialize(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # layers that start silent would hide a leak
            if name.endswith(("output.weight", "down.weight", "bias")):
                parameter.normal_(0, 0.2, generator=generator)
    return model


def hidden_batch(rows: int = 3) -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 49, (rows, 20), generator=generator)
    chosen = torch.rand((rows, 20), generator=generator) < 0.3
    positions = torch.cat([torch.arange(8), torch.arange(12)]).expand(rows, -1)
    documents = torch.tensor([0] * 8 + [1] * 12).expand(rows, -1)
    return TokenBatch(
        tokens.masked_fill(chosen, 49), torch.where(chosen, tokens, IGNORED), positions, documents
    )


def test_masked_token_is_the_cross_entropy_of_the_hidden_tokens_alone(model):
    batch = hidden_batch()
    loss, weight = masked_token(model, batch)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    chosen = batch.labels != IGNORED
    assert weight == int(chosen.sum()) > 10
    scores = model.logits(model(batch.tokens, positions=batch.positions, documents=batch.documents))
    expected = torch.nn.functional.cross_entropy(scores.transpose(1, 2), batch.labels, reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    expected.backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-4 * float(expected.detach())), name
    assert found["head.bias"].any()


def test_losses_of_parts_add_up_and_documents_do_not_leak(model):
    batch = hidden_batch()
    whole, weight = masked_token(model, batch)
    parts = [
        masked_token(model, TokenBatch(*(part[row : row + 1, piece] for part in
                     (batch.tokens, batch.labels, batch.positions)), None))
        for row in range(3) for piece in (slice(0, 8), slice(8, 20))
    ]  # fmt: skip
    assert float(whole.detach()) == pytest.approx(sum(float(loss.detach()) for loss, _ in parts), rel=1e-5)
    assert weight == sum(count for _, count in parts)
    leaking, _ = masked_token(model, TokenBatch(batch.tokens, batch.labels, batch.positions, None))
    assert float(leaking.detach()) != pytest.approx(float(whole.detach()), rel=1e-4)


def test_rows_with_nothing_hidden_cost_nothing(model):
    batch = hidden_batch()
    loss, weight = masked_token(
        model, TokenBatch(batch.tokens, torch.full_like(batch.labels, IGNORED), batch.positions, None)
    )
    assert (float(loss.detach()), weight) == (0.0, 0)
    loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def pairs() -> PairBatch:
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(0, 49, (4, size), generator=generator) for size in (9, 6))
    masks = [
        torch.arange(size) < torch.tensor(lengths)[:, None]
        for size, lengths in ((9, [9, 5, 7, 2]), (6, [6, 6, 3, 1]))
    ]
    return PairBatch(first, masks[0], second, masks[1])


def test_contrastive_loss_by_hand(model):
    batch, temperature = pairs(), 0.05
    loss, weight = contrastive(temperature)(model, batch)
    assert weight == 4

    def vector(tokens: torch.Tensor, mask: torch.Tensor) -> list[float]:
        rows = model(tokens[mask][None])[0]  # without its padding
        mean = [float(sum(column)) / len(column) for column in rows.T.tolist()]
        length = math.sqrt(sum(number**2 for number in mean))
        return [number / length for number in mean]

    first = [vector(batch.first[row], batch.first_mask[row]) for row in range(4)]
    second = [vector(batch.second[row], batch.second_mask[row]) for row in range(4)]
    total = 0.0
    for row in range(4):
        likeness = [
            sum(a * b for a, b in zip(first[row], other, strict=True)) / temperature for other in second
        ]
        total += math.log(sum(math.exp(number) for number in likeness)) - likeness[row]
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)


def test_contrastive_training_brings_pairs_together(model):
    batch, objective = pairs(), contrastive(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = None
    for _ in range(30):
        loss, weight = objective(model, batch)
        first = float(loss.detach()) / weight if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(objective(model, batch)[0].detach()) / 4 < 0.2 * first


def test_a_model_with_another_head_guesses_no_tokens():
    model = Encoder(EncoderConfig(50, 32, 2, 4, 48, 64, head=HeadConfig("none")))
    with pytest.raises(ValueError, match="none"):
        masked_token(model, hidden_batch())
