"""The training loop: a generator that yields one `Step` per optimizer step.

Every way of training (ordinary, private, federated) calls it; the stage that calls it logs, validates and saves. It
knows neither files nor text: batches come from a function of the step number, so no position in the data is ever
stored, and a resumed run sees what an uninterrupted one would have.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glasshouse.training.distributed import sum_gradients, sum_numbers
from glasshouse.training.objectives import Objective
from glasshouse.training.optimization import MasterOptimizer, learning_rate_factor

Batches = Callable[[int], Iterator[Any]]
"""From the number of a step to its micro-batches, each of the kind that the objective takes."""

Gradients = Callable[[Objective, nn.Module, Any], tuple[float, int]]


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    Args:
        number: the step, from 0.
        loss: mean loss per weight, in nats, before the update; over all processes.
        weight: what the loss was averaged over (tokens learned from).
        gradient_norm: norm of the mean gradient before clipping.
        factor: share of the peak learning rate that was used.
        seconds: wall-clock time.
        skipped: why the update was not made; empty when it was.
    """

    number: int
    loss: float
    weight: int
    gradient_norm: float
    factor: float
    seconds: float
    skipped: str = ""


def ordinary_gradients(objective: Objective, model: nn.Module, batch: Any) -> tuple[float, int]:
    """Add the gradient of the summed loss to the parameters; returns (summed loss, weight)."""
    loss, weight = objective(model, batch)
    loss.backward()
    return float(loss.detach()), weight


@dataclass(frozen=True)
class Schedule:
    """Which steps are trained.

    Args:
        first: the first step of this process.
        steps: number of steps of the whole run, which the learning rate depends on.
        seed: seed of dropout, made anew at each step so that nothing need be stored.
    """

    first: int
    steps: int
    seed: int = 0


def train_steps(
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    optimizer: MasterOptimizer,
    schedule: Schedule,
    stop: Callable[[], bool] = lambda: False,
    gradients: Gradients = ordinary_gradients,
) -> Iterator[Step]:
    """Train, yielding one `Step` per optimizer step.

    Args:
        model: what is trained.
        objective: from model and batch to summed loss and weight.
        batches: from the number of a step to the micro-batches of this process.
        optimizer: updates the weights.
        schedule: which steps to take.
        stop: asked before every micro-batch; once it answers True the step under way is dropped and nothing more is
            yielded, so the weights are those of the last `Step`.
        gradients: ordinary, or private.
    """
    model.train()
    for number in range(schedule.first, schedule.steps):
        started = time.perf_counter()
        torch.manual_seed((schedule.seed << 32) + number)
        loss_sum, weight = 0.0, 0
        for batch in batches(number):
            if stop():
                optimizer.clear()
                return
            loss, count = gradients(objective, model, batch)
            optimizer.accumulate()
            loss_sum, weight = loss_sum + loss, weight + count
        loss_sum, total = sum_numbers([loss_sum, float(weight)])
        yield _update(optimizer, schedule, number, loss_sum, int(total), started)


def _update(
    optimizer: MasterOptimizer, schedule: Schedule, number: int, loss_sum: float, weight: int, started: float
) -> Step:
    factor = learning_rate_factor(number, schedule.steps, optimizer.config.warmup, optimizer.config.decay)
    skipped, norm = "", 0.0
    if weight == 0:
        skipped = "no token to learn from"
    elif not math.isfinite(loss_sum):
        skipped = f"the loss is {loss_sum}"
    else:
        sum_gradients(optimizer.gradients())
        norm = optimizer.step(factor, weight)
        if not math.isfinite(norm):
            skipped = f"the norm of the gradient is {norm}"
    optimizer.clear()
    return Step(
        number, loss_sum / max(1, weight), weight, norm, factor, time.perf_counter() - started, skipped
    )
