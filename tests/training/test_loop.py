"""Accumulated equals whole, skipped means untouched, and the schedule's shape."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.training.test_objectives import random_model

from glasshouse.training.loop import Schedule, Step, train_steps
from glasshouse.training.objectives import IGNORED, TokenBatch, next_token
from glasshouse.training.optimization import MasterOptimizer, OptimizationConfig, learning_rate_factor


def uneven_rows(seed: int) -> TokenBatch:
    """Sixteen rows of which each learns from a different number of tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(50, (16, 12), generator=generator)
    labels = torch.randint(50, (16, 12), generator=generator)
    for row in range(16):
        labels[row, : row % 11] = IGNORED
    return TokenBatch(tokens, labels, torch.arange(12).expand(16, 12), None)


def split(batch: TokenBatch, rows: int) -> Iterator[TokenBatch]:
    for start in range(0, 16, rows):
        piece = slice(start, start + rows)
        yield TokenBatch(batch.tokens[piece], batch.labels[piece], batch.positions[piece], None)


def train(rows: int, steps: int = 3, **settings: object) -> tuple[list[Step], dict[str, torch.Tensor]]:
    model = random_model()
    config = OptimizationConfig(**{"learning_rate": 1e-3, "warmup": 0.0, "decay": 0.0, **settings})  # type: ignore[arg-type]
    optimizer = MasterOptimizer(model, config)
    taken = list(
        train_steps(
            model, next_token, lambda step: split(uneven_rows(step), rows), optimizer, Schedule(0, steps)
        )
    )
    return taken, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("rows", [4, 1, 5])
def test_accumulated_steps_equal_whole_ones(rows: int) -> None:
    # one AdamW step divides by the gradient's own size, so compare the gradients' effect through plain losses and norms
    whole, weights = train(16, optimizer="adamw")
    pieces, others = train(rows, optimizer="adamw")
    for one, other in zip(whole, pieces, strict=True):
        assert one.weight == other.weight
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-2, atol=5e-4)


def test_accumulated_gradients_equal_the_whole_gradient() -> None:
    gradients = []
    for rows in (16, 4, 1):
        model = random_model()
        for batch in split(uneven_rows(0), rows):
            next_token(model, batch)[0].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_mean_of_means_would_be_wrong() -> None:
    """The rows are uneven enough for the usual mistake (averaging the means of micro-batches) to show."""
    model, batch = random_model(), uneven_rows(0)
    whole, weight = next_token(model, batch)
    means = [
        float(loss.detach()) / count
        for loss, count in (next_token(model, piece) for piece in split(batch, 4))
    ]
    assert abs(sum(means) / 4 - float(whole.detach()) / weight) > 1e-3


def nan_at(steps: set[int]) -> Callable[..., tuple[float, int]]:
    seen = iter(range(100))

    def gradients(objective, model, batch):
        loss, weight = objective(model, batch)
        scale = math.nan if next(seen) in steps else 1.0
        (loss * scale).backward()
        return float(loss.detach()) * scale, weight

    return gradients


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_loss_that_is_no_number_makes_no_step(optimizer: str) -> None:
    model = random_model()
    masters = MasterOptimizer(model, OptimizationConfig(optimizer))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batches = lambda step: iter([uneven_rows(step)])  # noqa: E731
    steps = train_steps(model, next_token, batches, masters, Schedule(0, 3), gradients=nan_at({0}))
    first = next(steps)
    assert "nan" in first.skipped
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert next(steps).skipped == ""
    assert not torch.equal(model.embedding.weight, before["embedding.weight"])


def test_stopping_drops_the_step_under_way() -> None:
    model = random_model()
    asked = iter([False, True])
    before = model.embedding.weight.detach().clone()
    steps = list(train_steps(model, next_token, lambda step: split(uneven_rows(step), 4),
                             MasterOptimizer(model, OptimizationConfig()), Schedule(0, 3), lambda: next(asked)))  # fmt: skip
    assert steps == []
    assert torch.equal(before, model.embedding.weight)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_schedule_rises_stays_and_falls() -> None:
    factors = [learning_rate_factor(step, 100, 0.1, 0.4) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:61] == [1.0] * 52
    assert factors[-1] == pytest.approx(1 / 40)
    assert sorted(factors[60:], reverse=True) == factors[60:]
