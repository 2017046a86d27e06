"""The stage that teaches a model to answer: `finetune(config, run)`.

It wires the parts together: the model, its adapters, the examples, the session. What each part does is in its own module.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from glasshouse.adapter import open_adapter, save_adapter
from glasshouse.artifact import Artifact, open_artifact, require_decoder, save_artifact
from glasshouse.device import Device, forget_peak_memory, open_device, process_memory
from glasshouse.errors import InputError
from glasshouse.files import require_free, sha256_bytes
from glasshouse.models.decoder import Decoder
from glasshouse.models.lora import AdapterConfig, adapt, merged, quantize_layers, train_rows
from glasshouse.run import Run
from glasshouse.text.examples import Example, ExampleCounts, read_examples
from glasshouse.text.packing import take_rows
from glasshouse.text.supervision import Lesson, Lessons, encode_examples
from glasshouse.text.tokenizer import Tokenizer
from glasshouse.training.distributed import StopSignal, process_group, require_agreement, sum_numbers
from glasshouse.training.objectives import Objective, TokenBatch, distillation, next_token, to_device
from glasshouse.training.optimization import MasterOptimizer, OptimizationConfig
from glasshouse.training.plan import (
    Prediction,
    activation_memory,
    flops_per_token,
    matmul_rate,
    power,
)
from glasshouse.training.preferences import (
    BETAS,
    NEEDS_REFERENCE,
    Comparisons,
    Figures,
    encode_comparisons,
    preference_objective,
)
from glasshouse.training.progress import Progress, Scalars, show_lessons
from glasshouse.training.session import Course, Training, announce, close, resume, train

LEARNING_RATES = {"full": 1e-4, "lora": 1e-3, "dora": 1e-3, "qlora": 1e-3}
"""Peak learning rate of each method where none is given; an adapter needs about ten times that of all weights (Schulman
et al. 2025, "LoRA without regret")."""
TASKS = ("chat", *BETAS, "distill")
VALIDATION_ROWS = 64
EXPECTED = 0.01
"""A model that gives the end of an answer less chance than this, in the geometric mean, has never seen one end."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `glasshouse finetune`.

    Args:
        model: the model to start from: a run, a model folder, or a folder in Hugging Face layout.
        data: files of examples: OpenAI messages, ShareGPT, Alpaca, prompt and completion, or pairs; jsonl, json, csv, tsv,
            parquet.
        task: "chat" (learn the answers), "dpo", "orpo", "kto" or "simpo" (learn from preferences), "distill" (learn a larger
            model's odds of the answers).
        beta: strength of a preference loss; its paper's when not given.
        gamma: the margin that "simpo" aims at.
        teacher: the larger model of "distill"; it must have the same tokenizer.
        temperature: what the logits of "distill" are divided by.
        method: "full" (every weight), "lora", "dora", or "qlora" (adapters on weights of 4 bits).
        rank: width of the adapters.
        alpha: an adapter's change is scaled by alpha / rank.
        targets: linear layers that get an adapter, like attention.query; "all" for every one inside the blocks.
        adapter_dropout: share of an adapter's inputs dropped in training.
        adapter: go on from this adapter, in PEFT's layout, instead of a fresh one.
        epochs: how often to go over the examples.
        steps: or: make this many optimizer steps.
        context: tokens of a row; the model's own limit, at most 1024, when not given.
        rows: rows of a step.
        micro_rows: rows computed at once; fewer need less memory.
        learning_rate: peak learning rate; by default a tenth of the method's where preferences are learned.
        weight_decay: weight decay of matrices, where every weight is trained.
        clip: most the norm of the gradient may be; 0 for no limit.
        warmup: share of the steps over which the learning rate rises.
        decay: share of the steps, at the end, over which it falls.
        validation_fraction: share of the examples held out, chosen by the hash of their text.
        validations: how often, in the whole run, the validation loss is measured.
        early_stop: stop after this many validations without a better one; 0 never stops early.
        save_minutes: minutes between two saves of the state that --resume needs.
        bad_steps: stop after this many steps in a row whose loss is not a number.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32 or bfloat16.
        threads: CPU threads; 0 for all.
        seed: every random choice follows from it.
        licence: under which you release the weights, as the Hugging Face hub writes it ("apache-2.0"); for the card.
    """

    model: Path
    data: tuple[str, ...]
    task: str = "chat"
    beta: float | None = None
    gamma: float = 1.0
    teacher: Path | None = None
    temperature: float = 1.0
    method: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("all",)
    adapter_dropout: float = 0.0
    adapter: Path | None = None
    epochs: float = 3.0
    steps: int | None = None
    context: int | None = None
    rows: int = 8
    micro_rows: int = 4
    learning_rate: float | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: float = 0.05
    decay: float = 0.5
    validation_fraction: float = 0.05
    validations: int = 10
    early_stop: int = 0
    save_minutes: float = 1.0
    bad_steps: int = 5
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    seed: int = 0
    licence: str = ""


def finetune(config: FinetuneConfig, run: Run) -> None:
    """Teach a model the answers of some examples; goes on where it stopped when the run holds a saved state.

    Args:
        config: the settings.
        run: an open run folder; its model/ holds the best model so far, adapters merged, and adapter/ the adapters.

    Raises:
        InputError: the settings, the examples or the model do not allow it.
    """
    _check(config)
    device = open_device(config.device, config.dtype, config.seed, config.threads)
    lock = run.lock() if device.rank == 0 else nullcontext()
    with lock, process_group(device), StopSignal() as stop:
        forget_peak_memory(device)
        require_agreement("their settings", repr(config))
        artifact = open_artifact(config.model, dtype=device.compute_dtype, device=device.torch_device)
        model, tokenizer = require_decoder(artifact), artifact.tokenizer
        context = chosen_context(config, model)
        sides, counts = split_examples(config)
        pairs = read_comparisons(config, tokenizer, context, sides, counts, device)
        lessons, held_out = read_lessons(tokenizer, context, sides, counts, pairs)
        rows = Lessons(lessons, context, tokenizer.pad, config.seed)
        unseen = [] if config.method == "full" else unseen_tokens(model, tokenizer, rows, device)
        adapter = prepare_model(config, model, unseen)
        for side in pairs if config.task in NEEDS_REFERENCE else ():
            side.refer(model)  # adapters change nothing yet
        optimizer = MasterOptimizer(model, _optimization(config))
        count = len(pairs[0].items) if pairs else rows.rows
        steps = config.steps or max(1, math.ceil(config.epochs * count / config.rows))
        course = _course(config, device, artifact, rows, held_out, steps)
        course = _preference_course(config, course, pairs) if pairs else course
        course = replace(course, keep=lambda: keep_model(run, artifact, adapter, lessons))
        if device.rank == 0:
            run.update(examples={"kept": counts.kept, "form": counts.form, "left_out": dict(counts.dropped),
                                 "cut": counts.shortened, "held_out": len(held_out), "files": list(config.data)})  # fmt: skip
        predicted = _predict(config, run, device, course, optimizer, model, context)
        history = resume(run, optimizer, device.rank == 0)
        with Progress(steps, history.step, quiet=device.rank > 0) as progress:
            training = Training(config, run, device, course, optimizer, progress, Scalars(run.path, device.rank > 0),
                                stop, matmul_rate(device), history)  # fmt: skip
            if device.rank == 0 and not history.step:
                show_lessons(progress.console, tokenizer, rows, counts)
            trained = sum(master.numel() for master in optimizer.masters.values())
            progress.say(
                f"{predicted.parameters / 1e6:.1f}M weights, of which {trained / 1e6:.2f}M are trained ({config.method}); "
                f"{steps} steps of {config.rows} {'comparisons' if pairs else f'rows of {context} tokens'}"
            )
            if unseen:
                progress.say(
                    f"the model has never seen {_spelled(tokenizer, unseen)}: their vectors are trained too"
                )
            announce(training, predicted)
            close(training, predicted, train(training))


def _check(config: FinetuneConfig) -> None:
    if config.task not in TASKS:
        raise InputError(f"unknown task {config.task!r}", "--task", f"choose among {', '.join(TASKS)}")
    if (config.task == "distill") != (config.teacher is not None):
        raise InputError(
            "a teacher and the task distill belong together",
            "--teacher",
            "give both, --task distill --teacher MODEL",
        )
    for name in ("beta", "temperature"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} is {value}", f"--{name}", "give a number above 0")
    if config.method not in LEARNING_RATES:
        raise InputError(
            f"unknown method {config.method!r}", "--method", f"choose among {', '.join(LEARNING_RATES)}"
        )
    if config.adapter is not None and config.method == "full":
        raise InputError(
            "an adapter has no place where every weight is trained", "--adapter", "use --method lora"
        )
    for name in ("rank", "rows", "micro_rows"):
        if getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}", f"--{name}", "give a whole number from 1")
    if not 0 < config.validation_fraction < 1:
        raise InputError(
            f"validation_fraction is {config.validation_fraction}",
            "--validation_fraction",
            "give a share between 0 and 1",
        )


def chosen_context(config: FinetuneConfig, model: Decoder) -> int:
    """Tokens of a row.

    Raises:
        InputError: more were asked for than the model reads.
    """
    most = model.config.context_length
    if config.context is not None and not 2 <= config.context <= most:
        raise InputError(
            f"rows of {config.context:,} tokens for a model that reads at most {most:,}",
            "--context",
            f"give 2 to {most}",
        )
    return config.context or min(1024, most)


def split_examples(config: FinetuneConfig) -> tuple[list[list[Example]], ExampleCounts]:
    """The examples: those to learn, those held out; and what was left out.

    Raises:
        InputError: there is no example, or too few to hold any out.
    """
    counts = ExampleCounts()
    examples = read_examples(config.data, counts)
    held_out = [is_held_out(example, config.validation_fraction) for example in examples]
    if not any(held_out) or all(held_out):  # very few: the last one is held out
        held_out = [number == len(examples) - 1 for number in range(len(examples))]
    sides = [
        [example for example, out in zip(examples, held_out, strict=True) if out is side]
        for side in (False, True)
    ]
    if not sides[0]:
        raise InputError(
            "one example is too few: some are held out", ", ".join(config.data), "give more examples"
        )
    return sides, counts


def read_comparisons(
    config: FinetuneConfig,
    tokenizer: Tokenizer,
    context: int,
    sides: list[list[Example]],
    counts: ExampleCounts,
    device: Device,
) -> list[Comparisons]:
    """The examples as comparisons, those to learn and those held out; none where the task is no preference.

    Raises:
        InputError: no pair of answers is left.
    """
    if config.task not in BETAS:
        return []
    made = (encode_comparisons(tokenizer, side, context, counts, config.task) for side in sides)
    return [Comparisons(items, tokenizer.pad, config.seed, device, config.micro_rows) for items in made]


def read_lessons(
    tokenizer: Tokenizer,
    context: int,
    sides: list[list[Example]],
    counts: ExampleCounts,
    pairs: list[Comparisons],
) -> list[list[Lesson]]:
    """The examples as tokens, those to learn and those held out; of comparisons, the first answers."""
    if pairs:
        return [[one.first for one in side.items] for side in pairs]
    return [encode_examples(tokenizer, side, context, counts) for side in sides]


def is_held_out(example: Example, fraction: float) -> bool:
    """Whether an example is held out: decided by the hash of what is asked, so that it stays so when others come."""
    asked = "\n".join(str(message.get("content") or "") for message in example.messages)
    return int(sha256_bytes(asked.encode("utf-8", "replace"))[:8], 16) < fraction * 2**32


@torch.no_grad()
def unseen_tokens(model: Decoder, tokenizer: Tokenizer, rows: Lessons, device: Device) -> list[int]:
    """The special tokens of the examples, when the model has never seen them: when it does not expect the one that ends an
    answer at the end of one."""
    batch = to_device(rows.batch(0, min(4, rows.rows)), device, True)
    hidden = model.eval()(batch.tokens, positions=batch.positions, documents=batch.documents)
    special = torch.tensor(sorted(tokenizer.special.values()), device=hidden.device)
    ends = torch.isin(batch.labels, special)
    if not ends.any():
        return []
    logs = model.logits(hidden[ends]).float().log_softmax(-1).gather(1, batch.labels[ends][:, None])
    present = np.unique(np.concatenate([lesson.tokens for lesson in rows.lessons]))
    seen = float(logs.mean()) > math.log(EXPECTED)
    return [] if seen else [int(token) for token in present if tokenizer.is_special(int(token))]


def _spelled(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return " ".join(tokenizer.decode([token], keep_special=True) for token in tokens)


def prepare_model(config: FinetuneConfig, model: Decoder, unseen: list[int]) -> AdapterConfig | None:
    """Give a model the adapters that the method asks for, and let tokens it has never seen be trained besides; None where
    every weight is trained."""
    if config.method == "full":
        model.requires_grad_(True)
        return None
    if config.method == "qlora":
        quantize_layers(model, 4)
    if config.adapter is not None:
        adapter = open_adapter(config.adapter, model)
    else:
        adapter = AdapterConfig(
            config.rank, config.alpha, tuple(config.targets), config.adapter_dropout, config.method == "dora"
        )
        adapt(model, adapter, config.seed)
    if unseen:
        train_rows(model, unseen)
    return adapter


def keep_model(run: Run, artifact: Artifact, adapter: AdapterConfig | None, lessons: list[Lesson]) -> None:
    """Save the model, its adapters merged, and the adapters beside it where the family's layout has a place for them."""
    model = require_decoder(artifact)
    ends = {artifact.tokenizer.end_of_document, *_answer_ends(artifact.tokenizer, lessons)}
    generation = {"eos_token_id": sorted(ends) if len(ends) > 1 else ends.pop()}
    if adapter is None:
        save_artifact(run.model_path, model, artifact.tokenizer, generation=generation)
        return
    save_artifact(run.model_path, merged(model), artifact.tokenizer, generation=generation)
    if model.embedding.weight.requires_grad:  # PEFT's layout has adapters of layers, not of tokens
        return
    try:
        save_adapter(run.path / "adapter", model, adapter, str(artifact.path))
    except InputError as error:
        if "one matrix" not in error.what:
            raise


def _answer_ends(tokenizer: Tokenizer, lessons: list[Lesson]) -> set[int]:
    """The special tokens that answers end with: those at which generation stops."""
    ends = {int(lesson.tokens[lesson.learned][-1]) for lesson in lessons[:100]}
    return {token for token in ends if tokenizer.is_special(token)}


def _optimization(config: FinetuneConfig) -> OptimizationConfig:
    gentle = 0.1 if config.task in BETAS else 1.0
    rate = config.learning_rate or gentle * LEARNING_RATES[config.method]
    shrink = config.weight_decay if config.method == "full" else 0.0  # rows that are not trained must stay
    return OptimizationConfig("adamw", rate, rate, shrink, config.clip, config.warmup, config.decay)


def _course(
    config: FinetuneConfig,
    device: Device,
    artifact: Artifact,
    rows: Lessons,
    held_out: list[Lesson],
    steps: int,
) -> Course:
    """What is trained: the next token of each answer, or a teacher's odds of it."""
    model, tokenizer = require_decoder(artifact), artifact.tokenizer
    out = Lessons(held_out, rows.context, rows.pad, config.seed)
    objective = _teach(config, tokenizer, device) if config.task == "distill" else next_token
    densities = {"train": _tokens_per_byte(tokenizer, rows), "validation": _tokens_per_byte(tokenizer, out)}
    return Course(
        model, objective, lesson_batches(rows, config, device), steps, config.rows * rows.context,
        flops_per_token(model.config, rows.context),
        lambda stop: validate_lessons(model, objective, out, config, device, stop),
        lambda: None,
        lambda loss, split: math.nan if config.task == "distill" else loss / math.log(2) * densities[split],
    )  # fmt: skip


def _teach(config: FinetuneConfig, tokenizer: Tokenizer, device: Device) -> Objective:
    """The objective of learning from a larger model."""
    teacher = open_artifact(config.teacher or "", dtype=device.compute_dtype, device=device.torch_device)
    if teacher.tokenizer.plain.get_vocab() != tokenizer.plain.get_vocab():
        raise InputError("the teacher has another tokenizer", "--teacher", "give one with the student's")
    return distillation(require_decoder(teacher), tokenizer.vocab_size, config.temperature)


def _preference_course(config: FinetuneConfig, course: Course, pairs: list[Comparisons]) -> Course:
    """The same course, on comparisons."""
    figures, (learned, out) = Figures(), pairs
    beta = BETAS[config.task] if config.beta is None else config.beta
    objective = preference_objective(config.task, beta, config.gamma, figures)
    lengths = [len(one.first.tokens) + len(one.second.tokens) for one in learned.items]
    return replace(
        course, objective=objective, batches=learned.batches(config.rows),
        tokens=config.rows * sum(lengths) // len(lengths),
        validate=lambda stop: out.validate(course.model, objective, VALIDATION_ROWS, stop),
        bits_per_byte=lambda loss, split: math.nan, figures=figures.take,
    )  # fmt: skip


def _tokens_per_byte(tokenizer: Tokenizer, rows: Lessons) -> float:
    """Learned tokens for each byte of the answers' text."""
    learned = [lesson.tokens[lesson.learned].tolist() for lesson in rows.lessons[:1000]]
    size = sum(len(tokenizer.decode(tokens).encode("utf-8", "replace")) for tokens in learned)
    return sum(map(len, learned)) / max(1, size)


def lesson_batches(
    rows: Lessons, config: FinetuneConfig, device: Device
) -> Callable[[int], Iterator[TokenBatch]]:
    """The micro-batches of this process, as a function of the step alone."""

    def batches(step: int) -> Iterator[TokenBatch]:
        whole = rows.batch(step, config.rows)
        own = np.array_split(np.arange(config.rows), device.world_size)[device.rank]
        share = -(-config.rows // device.world_size)
        for piece in np.array_split(own, -(-share // config.micro_rows)):
            start, stop = (int(piece[0]), int(piece[-1]) + 1) if len(piece) else (0, 0)
            yield to_device(take_rows(whole, start, stop), device, True)

    return batches


@torch.no_grad()
def validate_lessons(
    model: Decoder,
    objective: Objective,
    held_out: Lessons,
    config: FinetuneConfig,
    device: Device,
    stop: Callable[[], bool],
) -> float | None:
    """Mean loss, in nats per learned token, on the same held-out rows every time; None when asked to stop meanwhile."""
    model.eval()
    count = min(VALIDATION_ROWS, held_out.rows)
    whole = held_out.batch(0, count)
    loss_sum, weight = 0.0, 0
    own = np.array_split(np.arange(count), device.world_size)[device.rank]
    for piece in np.array_split(own, max(1, -(-len(own) // config.micro_rows))):
        if stop():
            return None
        if len(piece):
            rows = take_rows(whole, int(piece[0]), int(piece[-1]) + 1)
            loss, learned = objective(model, to_device(rows, device, True))
            loss_sum, weight = loss_sum + float(loss), weight + learned
    loss_sum, total = sum_numbers([loss_sum, float(weight)])
    model.train()
    return loss_sum / max(total, 1.0)


def _predict(
    config: FinetuneConfig,
    run: Run,
    device: Device,
    course: Course,
    optimizer: MasterOptimizer,
    model: Decoder,
    context: int,
) -> Prediction:
    """What the run will need: its time from one micro-batch that is computed here; measured once, then read from
    run.json."""
    known = run.read()
    if "predicted" in known:
        return Prediction(**known["predicted"])
    baseline = 0 if device.kind == "cuda" else process_memory()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    require_free(run.path, 3 * weights)
    started = time.perf_counter()
    batch = next(course.batches(0))
    loss, _ = course.objective(model, batch)
    loss.backward()
    optimizer.accumulate()
    optimizer.clear()
    course.figures()  # what this pass counted is no part of the run
    share = -(-config.rows // device.world_size)
    seconds = (time.perf_counter() - started) * -(-share // config.micro_rows) * course.steps
    trained = sum(master.numel() for master in optimizer.masters.values())
    memory = 12 * trained + activation_memory(model.config, config.micro_rows, context, device.compute_dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    predicted = Prediction(
        parameters, course.flops * course.tokens * course.steps, memory, seconds, seconds * power(device),
        "one pass timed on this machine",
    )  # fmt: skip
    if device.rank == 0:
        run.update(predicted=asdict(predicted), baseline_memory=baseline, device=asdict(device), seed=config.seed,
                   licence=config.licence, method=config.method, task=config.task, base=str(config.model), optimization=asdict(optimizer.config))  # fmt: skip
    return predicted
