"""A training under way: steps made, logged, validated, saved and stopped, whatever is trained.

The stages (pretraining, fine-tuning) say what is trained by a `Training`; what one step does is the loop's business. It
knows the run folder, not what the batches or the losses mean.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

from glasshouse.device import Device, peak_memory, process_memory
from glasshouse.errors import InputError
from glasshouse.run import Run
from glasshouse.training.checkpoint import load_state, save_state, saved_states
from glasshouse.training.distributed import StopSignal, wait_for_all
from glasshouse.training.loop import Batches, Schedule, Step, train_steps
from glasshouse.training.objectives import Objective
from glasshouse.training.optimization import MasterOptimizer
from glasshouse.training.plan import Prediction, power
from glasshouse.training.progress import Progress, Scalars, SpikeDetector, clock

SAMPLE_EVERY = 4
"""Validations between two samples."""


class SessionSettings(Protocol):
    """The settings of a stage that a session needs."""

    @property
    def validations(self) -> int:
        """How often, in the whole run, the validation loss is measured."""
        ...

    @property
    def early_stop(self) -> int:
        """Stop after this many validations without a better one; 0 never does."""
        ...

    @property
    def save_minutes(self) -> float:
        """Minutes between two saves of the state."""
        ...

    @property
    def bad_steps(self) -> int:
        """Stop after this many steps in a row whose loss is not a number."""
        ...

    @property
    def seed(self) -> int:
        """Every random choice follows from it."""
        ...


@dataclass
class History:
    """What a run has been through so far: saved with its state, so a resumed run goes on with it.

    Args:
        step: optimizer steps done.
        seconds: time spent on them.
        best_loss: lowest validation loss, in nats per token.
        best_step: steps done when it was measured.
        validated: steps done at the last validation that came to its end.
        waited: validations since then.
        bad_steps: steps in a row that were skipped.
        smoothed: smoothed training loss.
        peak_memory: most bytes held.
    """

    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    validated: int = 0
    waited: int = 0
    bad_steps: int = 0
    smoothed: float | None = None
    peak_memory: int = 0


@dataclass(frozen=True)
class Course:
    """What is trained, and on what.

    Args:
        model: the model.
        objective: from model and batch to summed loss and weight.
        batches: from the number of a step to the micro-batches of this process.
        steps: optimizer steps of the whole run.
        tokens: tokens of a step, padding included.
        flops: operations of a token.
        validate: mean loss on held-out data, in nats; None when asked to stop before the end.
        keep: save the model as the best so far.
        bits_per_byte: from a loss and the name of a split ("train" or "validation") to bits per byte; NaN where a byte
            has no meaning.
        sample: a prompt and what the model writes after it; None for no samples.
        figures: what else was counted since it was last asked, for the log; every process asks.
    """

    model: Any
    objective: Objective
    batches: Batches
    steps: int
    tokens: int
    flops: float
    validate: Callable[[Callable[[], bool]], float | None]
    keep: Callable[[], object]
    bits_per_byte: Callable[[float, str], float]
    sample: Callable[[], tuple[str, str]] | None = None
    figures: Callable[[], dict[str, float]] = dict


@dataclass(frozen=True)
class Training:
    """Everything the steps of one run share."""

    settings: SessionSettings
    run: Run
    device: Device
    course: Course
    optimizer: MasterOptimizer
    progress: Progress
    scalars: Scalars
    stop: StopSignal
    matmul_rate: float
    history: History = field(default_factory=History)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.device.rank == 0


def resume(run: Run, optimizer: MasterOptimizer, is_first: bool) -> History:
    """What a run has been through so far, with its optimizer's state put back; a new history when nothing is saved."""
    if not saved_states(run.state_path):
        return History()
    tensors, facts, passed_over = load_state(run.state_path)
    for line in passed_over if is_first else []:
        print(line)
    optimizer.load(tensors)
    if is_first:
        run.keep_metrics(facts["step"])
    known = {item.name for item in fields(History)}
    history = History(**{key: value for key, value in facts.items() if key in known})
    history.best_loss = math.inf if facts["best_loss"] is None else facts["best_loss"]
    return history


def announce(training: Training, predicted: Prediction) -> None:
    """Say on what is trained and what it is predicted to take."""
    device, say, history = training.device, training.progress.say, training.history
    memory = predicted.memory + training.run.read()["baseline_memory"]
    say(
        f"on {device.kind}, {device.dtype}, {device.threads} threads; best matrix rate {training.matmul_rate / 1e9:,.0f} GFLOP/s"
    )
    say(
        f"predicted: {clock(predicted.seconds)}, {memory / 1e9:.2f} GB, {predicted.joules / 3600:.1f} Wh ({predicted.method})"
    )
    if history.step:
        say(f"resumed after step {history.step}")


def train(training: Training) -> bool:
    """Run the steps; True when all were made (or stopping early was asked for and due)."""
    settings, course, history = training.settings, training.course, training.history
    schedule = Schedule(history.step, course.steps, settings.seed)
    if _validation_is_due(training) and not _validate(training):  # a stop cut it short
        return False
    spikes, saved = SpikeDetector(), time.perf_counter()
    for step in train_steps(
        course.model, course.objective, course.batches, training.optimizer, schedule, training.stop
    ):
        history.step, history.seconds = step.number + 1, history.seconds + step.seconds
        _record(training, step, spikes)
        if _validation_is_due(training):
            if not _validate(training):
                break
            if settings.early_stop and history.waited >= settings.early_stop:
                training.progress.say(
                    f"stopped early: no better validation loss for {history.waited} validations"
                )
                _save(training)
                return True
        if time.perf_counter() - saved > 60 * settings.save_minutes:
            _save(training)
            saved = time.perf_counter()
    _save(training)
    return history.step >= course.steps and not training.stop()


def _record(training: Training, step: Step, spikes: SpikeDetector) -> None:
    """Log one step and show it; stop the run when its losses are not numbers."""
    history, course, say = training.history, training.course, training.progress.say
    record: dict[str, Any] = {
        "step": history.step, "loss": step.loss, "gradient_norm": step.gradient_norm,
        "learning_rate": step.factor * training.optimizer.config.learning_rate, "seconds": history.seconds,
        "tokens": history.step * course.tokens,
        "tokens_per_second": course.tokens / step.seconds,
    }  # fmt: skip
    if step.skipped:
        history.bad_steps += 1
        record["skipped"] = step.skipped
        say(f"step {history.step} skipped: {step.skipped}")
    else:
        history.bad_steps = 0
        history.smoothed = step.loss if history.smoothed is None else 0.9 * history.smoothed + 0.1 * step.loss
        record["bits_per_byte"] = course.bits_per_byte(step.loss, "train")
        if spikes.is_spike(step.loss):
            record["spike"] = True
            say(f"step {history.step}: loss {step.loss:.3f} stands out from those before it")
    rate = record["tokens_per_second"]
    utilization = rate * course.flops / training.matmul_rate / training.device.world_size
    history.peak_memory = max(history.peak_memory, peak_memory(training.device))
    record |= {"utilization": utilization, "memory": process_memory(), **course.figures()}
    if training.is_first:
        training.run.log(record)
        training.scalars.add(record)
    smoothed = history.smoothed if history.smoothed is not None else math.nan
    training.progress.show(
        history.step, smoothed, course.bits_per_byte(smoothed, "train"), rate, utilization, record["memory"]
    )
    if history.bad_steps >= training.settings.bad_steps:
        raise InputError(f"{history.bad_steps} steps in a row without a finite loss, the last because {step.skipped}",
                         f"step {history.step}", "lower --learning_rate; the last good state is kept for --resume")  # fmt: skip


def _validate(training: Training) -> bool:
    """Measure the validation loss, keep the model if it is the best so far; False when asked to stop meanwhile."""
    history = training.history
    loss = training.course.validate(training.stop)
    figures = {f"validation_{name}": value for name, value in training.course.figures().items()}
    if loss is None:
        return False
    better = loss < history.best_loss
    history.waited, history.validated = 0 if better else history.waited + 1, history.step
    if training.is_first:
        _record_validation(training, loss, figures)
        if better:
            training.course.keep()
    if better:
        history.best_loss, history.best_step = loss, history.step
    return True


def _record_validation(training: Training, loss: float, figures: dict[str, float]) -> None:
    """Log and print a validation loss, and every so often a sample."""
    course, history, say = training.course, training.history, training.progress.say
    bits = course.bits_per_byte(loss, "validation")
    record: dict[str, Any] = {"step": history.step, "validation_loss": loss, "validation_bits_per_byte": bits,
                              **figures}  # fmt: skip
    if history.smoothed is not None:
        record["gap"] = loss - history.smoothed
    best = f", best was {_in_words(course, history.best_loss)} at step {history.best_step}"
    say(
        f"step {history.step}: validation {_in_words(course, loss)}{_figures_in_words(figures)}{'' if loss < history.best_loss else best}"
    )
    every = validation_steps(training.settings.validations, course.steps)
    if course.sample and (history.step // every % SAMPLE_EVERY == 1 or history.step == course.steps):
        prompt, sample = course.sample()
        record["sample"] = prompt + sample
        say(f"  {prompt!r} -> {sample.strip()!r}")
    training.run.log(record)
    training.scalars.add(record)


def _figures_in_words(figures: dict[str, float]) -> str:
    return "".join(f", {name.removeprefix('validation_')} {value:.3f}" for name, value in figures.items())


def _in_words(course: Course, loss: float) -> str:
    """A validation loss in bits per byte; in nats of each guess where a byte has no meaning."""
    bits = course.bits_per_byte(loss, "validation")
    return f"{loss:.3f} nats a guess" if math.isnan(bits) else f"{bits:.3f} bits/byte"


def _validation_is_due(training: Training) -> bool:
    history, steps = training.history, training.course.steps
    at_border = history.step % validation_steps(training.settings.validations, steps) == 0
    return (at_border or history.step == steps) and history.validated < history.step


def validation_steps(validations: int, steps: int) -> int:
    """Steps between two validations."""
    return max(1, steps // max(1, validations))


def _save(training: Training) -> None:
    """Save the state for resuming; every process waits until it is whole."""
    if training.is_first:
        save_state(
            training.run.state_path,
            training.history.step,
            training.optimizer.state(),
            asdict(training.history),
        )
    wait_for_all()


def close(training: Training, predicted: Prediction, finished: bool) -> None:
    """Say what it took, beside what was predicted, and mark the run finished or stopped."""
    history, run, say, course = training.history, training.run, training.progress.say, training.course
    if not training.is_first:
        return
    if not finished:
        run.update(status="stopped", step=history.step)
        say(f"stopped after step {history.step} of {course.steps}; go on with --resume")
        return
    memory = max(history.peak_memory, peak_memory(training.device))
    joules = history.seconds * power(training.device)
    expected = predicted.memory + run.read()["baseline_memory"]
    say(f"measured:  {clock(history.seconds)}, {memory / 1e9:.2f} GB, {joules / 3600:.1f} Wh "
        f"(predicted {clock(predicted.seconds)}, {expected / 1e9:.2f} GB)")  # fmt: skip
    bits, tokens = course.bits_per_byte(history.best_loss, "validation"), history.step * course.tokens
    run.finish(
        parameters=predicted.parameters, steps=history.step, tokens=tokens, seconds=history.seconds, memory=memory,
        predicted_memory=expected, energy=joules, flops=course.flops * tokens,
        energy_method=f"measured time at {power(training.device):.0f} W, assumed",
        best={"step": history.best_step, "validation_loss": history.best_loss, "validation_bits_per_byte": bits},
    )  # fmt: skip
    best = _in_words(course, history.best_loss)
    say(f"best validation: {best} at step {history.best_step}; the model is in {run.model_path}")
    if not math.isnan(bits):
        say(f"next: glasshouse evaluate {run.path}, or glasshouse generate {run.path} PROMPT")
