"""The stage that turns a corpus into a language model: `pretrain(config, run)`.

It wires the parts together: shape, prediction, model, session. What each part does is in its own module.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from glasshouse.artifact import save_artifact
from glasshouse.device import Device, forget_peak_memory, open_device, process_memory
from glasshouse.errors import InputError
from glasshouse.files import require_free, sha256_file
from glasshouse.inference.engine import generate
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.models.decoder import Decoder, DecoderConfig, initialize
from glasshouse.models.encoder import Encoder, EncoderConfig, HeadConfig
from glasshouse.run import Run
from glasshouse.text.masking import Masking, hide_tokens
from glasshouse.text.packing import Batch, Corpus, Split, batch, open_corpus, take_rows
from glasshouse.text.reading import with_mask, words_of
from glasshouse.text.tokenizer import Tokenizer, open_tokenizer
from glasshouse.training.distributed import (
    StopSignal,
    process_group,
    require_agreement,
    sum_numbers,
    wait_for_all,
)
from glasshouse.training.objectives import (
    TokenBatch,
    masked_token,
    next_token,
    objective_for,
    to_device,
)
from glasshouse.training.optimization import MasterOptimizer, OptimizationConfig
from glasshouse.training.plan import (
    Prediction,
    Shape,
    ShapeRequest,
    compile_layers,
    flops_per_token,
    make_model,
    matmul_rate,
    model_memory,
    predict,
    requested_size,
    settle,
    size_of,
)  # fmt: skip
from glasshouse.training.progress import Progress, Scalars
from glasshouse.training.session import Course, Training, announce, close, resume, train

Hide = Callable[[Batch, int], Batch]
"""From the rows of a step and its number to the same with tokens hidden, which the labels then name."""

VALIDATION_ROWS = 64
SAMPLE_TOKENS = 60


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
        family: "decoder" (writes: guesses the next token) or "encoder" (reads: guesses hidden tokens).
        mask_share: of an encoder's tokens that are hidden.
        mask_unit: what of them is hidden at once: a "token", a whole "word" or a "span" of words.
        layout: of a decoder: "qwen3" (norms on queries and keys) or "llama" (none).
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
    family: str = "decoder"
    mask_share: float = 0.3
    mask_unit: str = "token"
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


def pretrain(config: PretrainConfig, run: Run) -> None:
    """Train a decoder or an encoder on a prepared corpus; goes on where it stopped when the run holds a saved state.

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
        tokenizer = with_mask(tokenizer) if config.family == "encoder" else tokenizer
        optimization = chosen_optimization(config)
        shape, compiled, predicted = _settle(config, run, device, corpus, optimization)
        model = make_model(shape.model)
        initialize(model, config.seed)
        masters = dict(model.named_parameters())
        model = model.to(device.torch_device, device.compute_dtype)
        if compiled:
            compile_layers(model)
        optimizer = MasterOptimizer(model, optimization, masters)
        del masters
        history = resume(run, optimizer, device.rank == 0)
        with Progress(shape.steps, history.step, quiet=device.rank > 0) as progress:
            course = _course(config, run, device, corpus, tokenizer, shape, model)
            training = Training(config, run, device, course, optimizer, progress, Scalars(run.path, device.rank > 0),
                                stop, matmul_rate(device), history)  # fmt: skip
            passes = shape.tokens / corpus.split("train").tokens
            progress.say(
                f"{predicted.parameters / 1e6:.1f}M weights: {shape.model.num_layers} layers, width {shape.model.embedding_dim}, "
                f"vocabulary {shape.model.vocab_size}; {shape.steps} steps of {course.tokens:,} tokens, {passes:.1f} passes over the corpus"
            )
            announce(training, predicted)
            close(training, predicted, train(training))


def _course(
    config: PretrainConfig,
    run: Run,
    device: Device,
    corpus: Corpus,
    tokenizer: Tokenizer,
    shape: Shape,
    model: Decoder | Encoder,
) -> Course:
    """What is trained: to guess the next token of each document of the corpus, or those that are hidden."""
    if isinstance(model, Encoder):
        return _masked_course(config, run, device, corpus, tokenizer, shape, model)
    isolate = config.isolate_documents
    parts = {name: corpus.split(name) for name in ("train", "validation")}
    bits_per_token = {name: part.tokens / part.bytes / math.log(2) for name, part in parts.items()}

    def sample() -> tuple[str, str]:
        return config.sample_prompt, sample_text(model, tokenizer, config.sample_prompt, config.seed)

    return Course(
        model, next_token, micro_batches(parts["train"], shape, device, isolate), shape.steps,
        shape.rows * shape.context, flops_per_token(shape.model, shape.context),
        lambda stop: validate(model, parts["validation"], shape, device, isolate, stop),
        lambda: save_artifact(run.model_path, model, tokenizer),
        lambda loss, split: loss * bits_per_token[split],
        sample if config.sample_prompt else None,
    )  # fmt: skip


def _masked_course(
    config: PretrainConfig,
    run: Run,
    device: Device,
    corpus: Corpus,
    tokenizer: Tokenizer,
    shape: Shape,
    model: Encoder,
) -> Course:
    """What is trained: to guess the hidden tokens of each document. Their loss says nothing of a byte."""
    isolate, train, held_out = config.isolate_documents, corpus.split("train"), corpus.split("validation")
    return Course(
        model, masked_token, micro_batches(train, shape, device, isolate, hiding(config, tokenizer, config.seed)), shape.steps,
        shape.rows * shape.context, flops_per_token(shape.model, shape.context),
        lambda stop: validate(model, held_out, shape, device, isolate, stop, hiding(config, tokenizer, 0)),
        lambda: save_artifact(run.model_path, model, tokenizer),
        lambda loss, split: math.nan,
    )  # fmt: skip


def hiding(config: PretrainConfig, tokenizer: Tokenizer, seed: int) -> Hide:
    """What hides tokens of a step's rows: a function of the seed and the step alone."""
    masking, words, mask = Masking(config.mask_share, config.mask_unit), words_of(tokenizer), tokenizer.mask
    if mask is None:
        raise InputError(
            "the tokenizer has no token for what is hidden", str(config.corpus), "prepare it again"
        )

    def hide(rows: Batch, step: int) -> Batch:
        shown, labels = hide_tokens(rows.tokens, words, mask, masking, seed, step)
        return replace(rows, tokens=shown, labels=labels)

    return hide


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
    shape = Shape(**{**known, "model": _model_config(known["model"])})
    return shape, facts["compiled"], Prediction(**facts["predicted"])


def _model_config(facts: dict[str, Any]) -> DecoderConfig | EncoderConfig:
    """A model's shape as run.json holds it."""
    if "head" not in facts:
        return DecoderConfig(**facts)
    head = HeadConfig(**{**facts["head"], "labels": tuple(facts["head"]["labels"])})
    return EncoderConfig(**{**facts, "head": head})


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


def micro_batches(
    split: Split, shape: Shape, device: Device, isolate: bool, hide: Hide | None = None
) -> Callable[[int], Iterator[TokenBatch]]:
    """The micro-batches of this process, as a function of the step alone.

    What is hidden is decided for all rows of a step at once, so it does not depend on how they are shared out. Every
    process takes its share of the step's rows; shares may differ by one row, which summed losses allow.
    """

    def batches(step: int) -> Iterator[TokenBatch]:
        rows = batch(split, step, shape.rows, shape.context, device.seed)
        rows = rows if hide is None else hide(rows, step)
        own = np.array_split(np.arange(shape.rows), device.world_size)[device.rank]
        for piece in np.array_split(own, most_pieces(shape, device.world_size)):
            yield to_device(
                take_rows(rows, int(piece[0]), int(piece[-1]) + 1) if len(piece) else take_rows(rows, 0, 0),
                device,
                isolate,
            )

    return batches


def most_pieces(shape: Shape, world_size: int) -> int:
    """Micro-batches of the process with the most rows: all processes make as many, so that they stay in step."""
    share = -(-shape.rows // world_size)
    return -(-share // shape.micro_rows)


@torch.no_grad()
def validate(
    model: nn.Module,
    split: Split,
    shape: Shape,
    device: Device,
    isolate: bool,
    stop: Callable[[], bool],
    hide: Hide | None = None,
) -> float | None:
    """Mean loss, in nats per token, on the same rows every time; None when asked to stop before the end.

    With `hide`, of the tokens that it hides in step 0.

    Raises:
        InputError: the split has no row of this length.
    """
    model.eval()
    rows = min(VALIDATION_ROWS, max(1, split.tokens // (shape.context + 1)))
    fixed = batch(split, 0, rows, shape.context, 0)
    fixed = fixed if hide is None else hide(fixed, 0)
    objective = objective_for(shape.model)
    loss_sum, weight = 0.0, 0
    own = np.array_split(np.arange(rows), device.world_size)[device.rank]
    for piece in np.array_split(own, max(1, -(-rows // device.world_size // shape.micro_rows))):
        if stop():
            return None
        if len(piece):
            loss, count = objective(
                model, to_device(take_rows(fixed, int(piece[0]), int(piece[-1]) + 1), device, isolate)
            )
            loss_sum, weight = loss_sum + float(loss), weight + count
    loss_sum, total = sum_numbers([loss_sum, float(weight)])
    model.train()
    if total == 0:
        raise InputError("the validation split has nothing to predict", "corpus", "prepare it with more text")
    return loss_sum / total


def sample_text(model: Decoder, tokenizer: Tokenizer, prompt: str, seed: int) -> str:
    """What the model writes after a prompt, as it comes."""
    config = GenerationConfig(max_new_tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.95, seed=seed)
    model.eval()
    text = "".join(token.text for token in generate(model, tokenizer, tokenizer.prompt(prompt), config))
    model.train()
    return text
