"""The stage that turns a corpus into a language model: `pretrain(config, run)`.

It wires the parts together: shape, prediction, loop, validation, saving, stopping. What each part does is in its own
module.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from glasshouse.artifact import save_artifact
from glasshouse.device import Device, open_device
from glasshouse.errors import InputError
from glasshouse.files import require_free, sha256_file
from glasshouse.models.decoder import Decoder, DecoderConfig, initialize
from glasshouse.run import Run
from glasshouse.text.packing import Corpus, open_corpus
from glasshouse.text.tokenizer import Tokenizer, open_tokenizer
from glasshouse.training.checkpoint import load_state, save_state, saved_states
from glasshouse.training.distributed import StopSignal, process_group, require_agreement, wait_for_all
from glasshouse.training.loop import Schedule, Step, train_steps
from glasshouse.training.objectives import next_token
from glasshouse.training.optimization import MasterOptimizer, OptimizationConfig
from glasshouse.training.plan import (
    Prediction,
    Shape,
    ShapeRequest,
    compile_layers,
    forget_peak_memory,
    matmul_rate,
    model_memory,
    peak_memory,
    power,
    predict,
    process_memory,
    requested_size,
    settle,
    size_of,
)  # fmt: skip
from glasshouse.training.progress import Progress, Scalars, SpikeDetector, clock
from glasshouse.training.validation import micro_batches, sample_text, validate

SAMPLE_EVERY = 4
"""Validations between two samples."""


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `glasshouse pretrain`. `size` sets every number that is not given.

    Args:
        corpus: the run that `prepare` made.
        size: how big the model is: nano, mini, tiny, small, medium, base or large.
        minutes: train about this long on this machine; sets the number of steps.
        epochs: or: go over the corpus this often.
        steps: or: make this many optimizer steps.
        layers: number of blocks.
        width: embedding width.
        heads: attention heads.
        key_value_heads: key and value heads.
        feed_forward: width inside the feed-forward network.
        context: tokens in a row.
        batch_tokens: tokens per optimizer step.
        micro_rows: rows computed at once; fewer need less memory.
        layout: "qwen3" (norms on queries and keys) or "llama" (none).
        optimizer: "muon" (hidden matrices by Muon, the rest by AdamW) or "adamw".
        learning_rate: peak learning rate of AdamW.
        matrix_learning_rate: peak learning rate of Muon.
        weight_decay: weight decay of matrices.
        clip: most the norm of the gradient may be; 0 for no limit.
        warmup: share of the steps over which the learning rate rises.
        decay: share of the steps, at the end, over which it falls.
        dropout: share of activations dropped in training.
        isolate_documents: whether tokens see only their own document.
        validations: how often, in the whole run, the validation loss is measured.
        early_stop: stop after this many validations without a better one; 0 never stops early.
        save_minutes: minutes between two saves of the state that --resume needs.
        sample_prompt: what the samples shown during training start with.
        bad_steps: stop after this many steps in a row whose loss is not a number.
        compile: "auto" (when it pays back within the run), "on" or "off".
        device: auto, cpu, cuda or mps.
        dtype: auto, float32 or bfloat16.
        threads: CPU threads; 0 for all.
        seed: every random choice follows from it.
        licence: under which you release the weights, as the Hugging Face hub writes it ("apache-2.0"); for the card.
    """

    corpus: Path
    size: str = "tiny"
    minutes: float | None = None
    epochs: float | None = None
    steps: int | None = None
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    key_value_heads: int | None = None
    feed_forward: int | None = None
    context: int | None = None
    batch_tokens: int | None = None
    micro_rows: int | None = None
    layout: str = "llama"
    optimizer: str = "muon"
    learning_rate: float | None = None
    matrix_learning_rate: float | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: float = 0.02
    decay: float = 0.4
    dropout: float = 0.0
    isolate_documents: bool = True
    validations: int = 20
    early_stop: int = 0
    save_minutes: float = 1.0
    sample_prompt: str = ""
    bad_steps: int = 5
    compile: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    seed: int = 0
    licence: str = ""


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
class Training:
    """Everything the steps of one run share."""

    config: PretrainConfig
    run: Run
    device: Device
    corpus: Corpus
    tokenizer: Tokenizer
    shape: Shape
    model: Decoder
    optimizer: MasterOptimizer
    progress: Progress
    stop: StopSignal
    matmul_rate: float
    flops_per_token: float
    scalars: Scalars
    history: History = field(default_factory=History)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.device.rank == 0

    def bits_per_byte(self, nats_per_token: float, split: str = "train") -> float:
        """A loss in nats per token as bits per UTF-8 byte of a split's text."""
        part = self.corpus.split(split)
        return nats_per_token / math.log(2) * part.tokens / part.bytes


def pretrain(config: PretrainConfig, run: Run) -> None:
    """Train a decoder on a prepared corpus; goes on where it stopped when the run holds a saved state.

    Args:
        config: the settings.
        run: an open run folder; its model/ holds the best model so far from the first validation on.

    Raises:
        InputError: the settings, the corpus or the machine do not allow it.
    """
    device = open_device(config.device, config.dtype, config.seed, config.threads)
    lock = run.lock() if device.rank == 0 else nullcontext()
    with lock, process_group(device), StopSignal() as stop:
        forget_peak_memory(device)
        require_agreement("their settings", repr(config))
        corpus = open_corpus(_corpus_folder(config.corpus))
        tokenizer = open_tokenizer(_corpus_folder(config.corpus))
        optimization = chosen_optimization(config)
        shape, compiled, predicted = _settle(config, run, device, corpus, optimization)
        model = Decoder(shape.model)
        initialize(model, config.seed)
        masters = dict(model.named_parameters())
        model = model.to(device.torch_device, device.compute_dtype)
        if compiled:
            compile_layers(model)
        optimizer = MasterOptimizer(model, optimization, masters)
        del masters
        history = _resume(run, optimizer, device.rank == 0)
        with Progress(shape.steps, history.step, quiet=device.rank > 0) as progress:
            training = Training(config, run, device, corpus, tokenizer, shape, model, optimizer, progress, stop,
                                matmul_rate(device), predicted.flops / shape.tokens, Scalars(run.path, device.rank > 0), history)  # fmt: skip
            _announce(training, predicted)
            finished = _train(training)
            _close(training, predicted, finished)


def _corpus_folder(path: Path) -> Path:
    return path / "corpus" if (path / "corpus").is_dir() else path


def chosen_optimization(config: PretrainConfig) -> OptimizationConfig:
    """The optimizer's settings: those given, and for the rest those of the size."""
    size = size_of(config.size)
    if config.optimizer not in ("muon", "adamw"):
        raise InputError(f"unknown optimizer {config.optimizer!r}", "--optimizer", "use muon or adamw")
    return OptimizationConfig(
        config.optimizer, config.learning_rate or size.learning_rate,
        config.matrix_learning_rate or size.matrix_learning_rate, config.weight_decay, config.clip,
        config.warmup, config.decay,
    )  # fmt: skip


def _settle(
    config: PretrainConfig, run: Run, device: Device, corpus: Corpus, optimization: OptimizationConfig
) -> tuple[Shape, bool, Prediction]:
    """The shape of the run and what it is predicted to need: measured once, by one process, and read from run.json by
    all, so that every process and every resumed run makes the same steps in the same way."""
    digest = sha256_file(_corpus_folder(config.corpus) / "manifest.json")
    if device.rank == 0 and "shape" not in run.read():
        _measure(config, run, device, corpus, optimization)
        run.update(corpus_digest=digest)
    wait_for_all()
    facts = run.read()
    if facts["corpus_digest"] != digest:
        raise InputError(
            "the corpus is not the one this run was started on", str(config.corpus), "start a new run"
        )
    known = facts["shape"]
    shape = Shape(**{**known, "model": DecoderConfig(**known["model"])})
    return shape, facts["compiled"], Prediction(**facts["predicted"])


def _measure(
    config: PretrainConfig, run: Run, device: Device, corpus: Corpus, optimization: OptimizationConfig
) -> None:
    """Settle the shape, time its steps and write what is predicted into run.json."""
    request = ShapeRequest(**{item.name: getattr(config, item.name) for item in fields(ShapeRequest)})
    train, context = corpus.split("train"), requested_size(request).context
    if min(train.tokens, corpus.split("validation").tokens) <= context:
        raise InputError(f"the corpus is too small for one row of {context} tokens", str(config.corpus),
                         "prepare more text, or give a smaller --context")  # fmt: skip
    # what Python, PyTorch and the corpus hold beside the training itself
    baseline = 0 if device.kind == "cuda" else process_memory()
    print("timing a few steps on this machine ...", flush=True)
    plan = settle(request, optimization, device, corpus.vocab_size, train.tokens)
    require_free(run.path, 3 * model_memory(plan.shape.model, optimization, device.compute_dtype))
    run.update(shape=asdict(plan.shape), compiled=plan.compiled, predicted=asdict(predict(plan, optimization, device)),
               device=asdict(device), seed=config.seed, licence=config.licence, optimization=asdict(optimization),
               matmul_rate=matmul_rate(device), baseline_memory=baseline)  # fmt: skip


def _resume(run: Run, optimizer: MasterOptimizer, is_first: bool) -> History:
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


def _announce(training: Training, predicted: Prediction) -> None:
    shape, history, say = training.shape, training.history, training.progress.say
    model = shape.model
    say(f"{predicted.parameters / 1e6:.1f}M weights: {model.num_layers} layers, width {model.embedding_dim}, vocabulary {model.vocab_size}; "
        f"{shape.steps} steps of {shape.rows * shape.context:,} tokens, {shape.tokens / training.corpus.split('train').tokens:.1f} passes over the corpus")  # fmt: skip
    say(
        f"on {training.device.kind}, {training.device.dtype}, {training.device.threads} threads; best matrix rate {training.matmul_rate / 1e9:,.0f} GFLOP/s"
    )
    say(
        f"predicted: {clock(predicted.seconds)}, {(predicted.memory + training.run.read()['baseline_memory']) / 1e9:.2f} GB, {predicted.joules / 3600:.1f} Wh ({predicted.method})"
    )
    if history.step:
        say(f"resumed after step {history.step}")


def _train(training: Training) -> bool:
    """Run the steps; True when all were made (or stopping early was asked for and due)."""
    config, shape, history = training.config, training.shape, training.history
    batches = micro_batches(training.corpus.split("train"), shape, training.device, config.isolate_documents)
    schedule = Schedule(history.step, shape.steps, config.seed)
    if _validation_is_due(training) and not _validate(training):  # a stop cut it short
        return False
    spikes, saved = SpikeDetector(), time.perf_counter()
    for step in train_steps(training.model, next_token, batches, training.optimizer, schedule, training.stop):
        history.step, history.seconds = step.number + 1, history.seconds + step.seconds
        _record(training, step, spikes)
        if _validation_is_due(training):
            if not _validate(training):
                break
            if config.early_stop and history.waited >= config.early_stop:
                training.progress.say(
                    f"stopped early: no better validation loss for {history.waited} validations"
                )
                _save(training)
                return True
        if time.perf_counter() - saved > 60 * config.save_minutes:
            _save(training)
            saved = time.perf_counter()
    _save(training)
    return history.step >= shape.steps and not training.stop()


def _record(training: Training, step: Step, spikes: SpikeDetector) -> None:
    """Log one step and show it; stop the run when its losses are not numbers."""
    history, shape, say = training.history, training.shape, training.progress.say
    record: dict[str, Any] = {
        "step": history.step, "loss": step.loss, "gradient_norm": step.gradient_norm,
        "learning_rate": step.factor * training.optimizer.config.learning_rate, "seconds": history.seconds,
        "tokens": history.step * shape.rows * shape.context,
        "tokens_per_second": shape.rows * shape.context / step.seconds,
    }  # fmt: skip
    if step.skipped:
        history.bad_steps += 1
        record["skipped"] = step.skipped
        say(f"step {history.step} skipped: {step.skipped}")
    else:
        history.bad_steps = 0
        history.smoothed = step.loss if history.smoothed is None else 0.9 * history.smoothed + 0.1 * step.loss
        record["bits_per_byte"] = training.bits_per_byte(step.loss)
        if spikes.is_spike(step.loss):
            record["spike"] = True
            say(f"step {history.step}: loss {step.loss:.3f} stands out from those before it")
    rate = record["tokens_per_second"]
    utilization = rate * training.flops_per_token / training.matmul_rate / training.device.world_size
    history.peak_memory = max(history.peak_memory, peak_memory(training.device))
    record |= {"utilization": utilization, "memory": process_memory()}
    if training.is_first:
        training.run.log(record)
        training.scalars.add(record)
    smoothed = history.smoothed if history.smoothed is not None else math.nan
    training.progress.show(
        history.step, smoothed, training.bits_per_byte(smoothed), rate, utilization, record["memory"]
    )
    if history.bad_steps >= training.config.bad_steps:
        raise InputError(f"{history.bad_steps} steps in a row without a finite loss, the last because {step.skipped}",
                         f"step {history.step}", "lower --learning_rate; the last good state is kept for --resume")  # fmt: skip


def _validate(training: Training) -> bool:
    """Measure the validation loss, keep the model if it is the best so far; False when asked to stop meanwhile."""
    config, history = training.config, training.history
    loss = validate(training.model, training.corpus.split("validation"), training.shape, training.device,
                    config.isolate_documents, training.stop)  # fmt: skip
    if loss is None:
        return False
    better = loss < history.best_loss
    history.waited, history.validated = 0 if better else history.waited + 1, history.step
    if training.is_first:
        _record_validation(training, loss)
        if better:
            save_artifact(training.run.model_path, training.model, training.tokenizer)
    if better:
        history.best_loss, history.best_step = loss, history.step
    return True


def _record_validation(training: Training, loss: float) -> None:
    """Log and print a validation loss, and every so often a sample."""
    config, history, say = training.config, training.history, training.progress.say
    bits, best = (training.bits_per_byte(nats, "validation") for nats in (loss, history.best_loss))
    record: dict[str, Any] = {"step": history.step, "validation_loss": loss, "validation_bits_per_byte": bits}
    if history.smoothed is not None:
        record["gap"] = loss - history.smoothed
    say(f"step {history.step}: validation {bits:.3f} bits/byte"
        + ("" if loss < history.best_loss else f", best was {best:.3f} at step {history.best_step}"))  # fmt: skip
    every = validation_steps(config, training.shape)
    if config.sample_prompt and (
        history.step // every % SAMPLE_EVERY == 1 or history.step == training.shape.steps
    ):
        sample = sample_text(training.model, training.tokenizer, config.sample_prompt, config.seed)
        record["sample"] = config.sample_prompt + sample
        say(f"  {config.sample_prompt!r} -> {sample.strip()!r}")
    training.run.log(record)
    training.scalars.add(record)


def _validation_is_due(training: Training) -> bool:
    history, every = training.history, validation_steps(training.config, training.shape)
    at_border = history.step % every == 0 or history.step == training.shape.steps
    return at_border and history.validated < history.step


def validation_steps(config: PretrainConfig, shape: Shape) -> int:
    """Steps between two validations."""
    return max(1, shape.steps // max(1, config.validations))


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


def _close(training: Training, predicted: Prediction, finished: bool) -> None:
    history, run, say = training.history, training.run, training.progress.say
    if not training.is_first:
        return
    if not finished:
        run.update(status="stopped", step=history.step)
        say(f"stopped after step {history.step} of {training.shape.steps}; go on with --resume")
        return
    memory = max(history.peak_memory, peak_memory(training.device))
    joules = history.seconds * power(training.device)
    expected = predicted.memory + run.read()["baseline_memory"]
    say(f"measured:  {clock(history.seconds)}, {memory / 1e9:.2f} GB, {joules / 3600:.1f} Wh "
        f"(predicted {clock(predicted.seconds)}, {expected / 1e9:.2f} GB)")  # fmt: skip
    run.finish(
        parameters=predicted.parameters, steps=history.step, tokens=history.step * training.shape.rows * training.shape.context,
        seconds=history.seconds, memory=memory, predicted_memory=expected, energy=joules, energy_method=f"measured time at {power(training.device):.0f} W, assumed",
        best={"step": history.best_step, "validation_bits_per_byte": training.bits_per_byte(history.best_loss, "validation")},
        flops=training.flops_per_token * training.shape.rows * training.shape.context * history.step,
    )  # fmt: skip
    bits = training.bits_per_byte(history.best_loss, "validation")
    say(
        f"best validation: {bits:.3f} bits/byte at step {history.best_step}; the model is in {run.model_path}"
    )
    say(f"next: glasshouse evaluate {run.path}, or glasshouse generate {run.path} PROMPT")
