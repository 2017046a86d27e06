"""What a training run will need, before it starts: the shape a size stands for, its memory, time and energy.

Time is measured, not guessed: a few steps of the real shape are timed on the machine that will train. Memory is
counted: weights, gradients, optimizer state, and what each layer keeps for its backward pass. Knows nothing of text.
"""

import math
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from glasshouse.device import Device
from glasshouse.errors import InputError
from glasshouse.models.decoder import Decoder, DecoderConfig, initialize
from glasshouse.models.encoder import Encoder, EncoderConfig
from glasshouse.training.objectives import CHUNK_SCORES, IGNORED, TokenBatch, objective_for
from glasshouse.training.optimization import MasterOptimizer, OptimizationConfig, is_hidden_matrix

WATTS_PER_CORE = 9.0
"""Power that one busy core of a server CPU is taken to draw where the machine has no meter."""

GPU_WATTS = 500.0
"""Power that a busy data-centre GPU is taken to draw where the machine has no meter."""

GPU_RATE, GPU_UTILIZATION = 989e12, 0.45
"""Dense bfloat16 rate of an H100 by its data sheet, and the share of it that training is taken to reach: used only to
plan for GPUs that are not here."""

MEASURING = 6.0
"""Seconds after which no further pass is timed."""

MICRO_TOKENS_CPU, MICRO_TOKENS_GPU = 8192, 65536
"""Tokens computed at once where nothing else is asked for."""

TRAINING_SHARE = 0.93
"""Share of `minutes` that goes to training steps; the rest to validation and saving."""

WORKSPACE = 110 * 10**6
"""Bytes that PyTorch's kernels and autograd take beside the tensors of a step."""

MASK_SHARE = 0.3
"""Share of an encoder's tokens that its head is taken to read, for predictions alone."""

COMPILE_AFTER = 300.0
"""Seconds of training above which layers are compiled."""


@dataclass(frozen=True)
class Size:
    """What one value of the `--size` dial stands for.

    Args:
        layers: blocks.
        width: embedding width.
        heads: query heads.
        key_value_heads: key and value heads.
        feed_forward: width inside the feed-forward network.
        context: tokens in a row.
        batch_tokens: tokens per optimizer step.
        learning_rate: peak learning rate of AdamW.
        matrix_learning_rate: peak learning rate of Muon.
    """

    layers: int
    width: int
    heads: int
    key_value_heads: int
    feed_forward: int
    context: int
    batch_tokens: int
    learning_rate: float
    matrix_learning_rate: float


SIZES = {
    "nano": Size(2, 64, 2, 2, 192, 64, 1024, 1e-2, 3e-2),
    "mini": Size(4, 128, 4, 4, 384, 256, 4096, 6e-3, 2e-2),
    "tiny": Size(4, 256, 4, 4, 704, 256, 4096, 6e-3, 2e-2),
    "small": Size(6, 384, 6, 6, 1024, 256, 8192, 4e-3, 2e-2),
    "medium": Size(8, 512, 8, 4, 1408, 512, 32768, 3e-3, 1.5e-2),
    "base": Size(12, 768, 12, 4, 2048, 1024, 131072, 2e-3, 1e-2),
    "large": Size(24, 1536, 24, 8, 4096, 2048, 524288, 1e-3, 6e-3),
}


@dataclass(frozen=True)
class Shape:
    """What is trained: the model, the rows of a step, and how many steps.

    Args:
        model: the model's shape.
        rows: rows of a step, over all micro-batches and processes.
        micro_rows: rows computed at once by one process.
        context: tokens of a row.
        steps: optimizer steps.
    """

    model: DecoderConfig | EncoderConfig
    rows: int
    micro_rows: int
    context: int
    steps: int

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.rows * self.context * self.steps


@dataclass(frozen=True)
class Prediction:
    """What a run will need.

    Args:
        parameters: weights of the model.
        flops: floating-point operations of the whole run.
        memory: most bytes held.
        seconds: wall-clock time of the training steps.
        joules: energy.
        method: how the time was found; the energy is the time at an assumed power.
    """

    parameters: int
    flops: float
    memory: int
    seconds: float
    joules: float
    method: str


@dataclass(frozen=True)
class ShapeRequest:
    """What was asked for; what is None follows from the size.

    Args:
        size: value of the dial.
        minutes: time to train, which sets the steps.
        epochs: passes over the corpus, which set the steps.
        steps: optimizer steps.
        layers, width, heads, key_value_heads, feed_forward, context, batch_tokens: as in `Size`.
        micro_rows: rows computed at once.
        family: "decoder" or "encoder".
        layout: of a decoder: "qwen3" or "llama".
        dropout: share of activations dropped.
        compile: "auto", "on" or "off".
    """

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
    layout: str = "llama"
    dropout: float = 0.0
    compile: str = "auto"


@dataclass(frozen=True)
class Plan:
    """What is trained and how long a step of it takes.

    Args:
        shape: model, rows and steps.
        step_seconds: seconds of an optimizer step.
        method: how they were found.
        compiled: whether layers are compiled.
    """

    shape: Shape
    step_seconds: float
    method: str
    compiled: bool


def size_of(name: str) -> Size:
    """The numbers behind one value of the dial.

    Raises:
        InputError: there is no such size.
    """
    if name not in SIZES:
        raise InputError(f"unknown size {name!r}", "--size", f"use one of {', '.join(SIZES)}")
    return SIZES[name]


def requested_size(request: ShapeRequest) -> Size:
    """The size that was asked for, with every number that was given in place of its own.

    Raises:
        InputError: a number is not positive, or numbers do not fit together.
    """
    size = size_of(request.size)
    names = [item.name for item in fields(Size)]
    given = {name: getattr(request, name, None) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    for name in [*given, "minutes", "epochs", "steps", "micro_rows"]:
        value = getattr(request, name)
        if value is not None and value <= 0:
            raise InputError(f"{name} must be above 0, not {value}", f"--{name}", "give a larger number")
    if "width" in given and "heads" not in given:
        given["heads"] = max(1, given["width"] // 64)
    if "heads" in given and "key_value_heads" not in given:
        given["key_value_heads"] = given["heads"]
    if "width" in given and "feed_forward" not in given:
        given["feed_forward"] = math.ceil(given["width"] * 8 / 3 / 64) * 64
    size = replace(size, **given)
    if size.width % size.heads or size.width // size.heads % 2:
        raise InputError(
            f"width {size.width} does not split into {size.heads} heads of an even width",
            "--heads",
            "choose heads that divide the width",
        )
    if size.heads % size.key_value_heads:
        raise InputError(
            f"{size.heads} heads cannot share {size.key_value_heads} key_value_heads",
            "--key_value_heads",
            "choose a divisor of the heads",
        )
    if size.batch_tokens < size.context:
        raise InputError(
            f"batch_tokens {size.batch_tokens} is less than one row of {size.context}",
            "--batch_tokens",
            "make it at least the context",
        )
    return size


def decoder_shape(size: Size, vocab_size: int, layout: str = "llama", dropout: float = 0.0) -> DecoderConfig:
    """The decoder that a size stands for.

    Raises:
        InputError: the layout is unknown.
    """
    if layout not in ("qwen3", "llama"):
        raise InputError(f"unknown layout {layout!r}", "--layout", "use qwen3 or llama")
    return DecoderConfig(
        vocab_size=vocab_size, embedding_dim=size.width, num_layers=size.layers, num_heads=size.heads,
        num_key_value_heads=size.key_value_heads, head_dim=size.width // size.heads,
        feed_forward_dim=size.feed_forward, context_length=max(size.context, 128),
        query_key_norm=layout == "qwen3", dropout=dropout,
    )  # fmt: skip


def encoder_shape(size: Size, vocab_size: int, dropout: float = 0.0) -> EncoderConfig:
    """The encoder that a size stands for: ModernBERT's layout, and one token more, the mask."""
    return EncoderConfig(vocab_size + 1, size.width, size.layers, size.heads, size.feed_forward,
                         max(size.context, 128), dropout=dropout)  # fmt: skip


def make_model(config: DecoderConfig | EncoderConfig) -> Decoder | Encoder:
    """A model of this shape, of its family."""
    return Encoder(config) if isinstance(config, EncoderConfig) else Decoder(config)


def settle(
    request: ShapeRequest,
    optimization: OptimizationConfig,
    device: Device,
    vocab_size: int,
    corpus_tokens: int,
) -> Plan:
    """Settle what is trained, and for how long.

    The steps come from `steps`, `epochs` or `minutes`; without any of them, 20 tokens per weight (Hoffmann et al.
    2022, arXiv:2203.15556) but at most 8 passes over the corpus.

    Raises:
        InputError: the request contradicts itself or cannot be met.
    """
    if sum(value is not None for value in (request.minutes, request.epochs, request.steps)) > 1:
        raise InputError(
            "minutes, epochs and steps are three ways to say one thing", "--steps", "give one of them"
        )
    if request.compile not in ("auto", "on", "off"):
        raise InputError(f"unknown compile {request.compile!r}", "--compile", "use auto, on or off")
    size = requested_size(request)
    if request.family not in ("decoder", "encoder"):
        raise InputError(f"unknown family {request.family!r}", "--family", "use decoder or encoder")
    if request.family == "encoder":
        model = encoder_shape(size, vocab_size, request.dropout)
    else:
        model = decoder_shape(size, vocab_size, request.layout, request.dropout)
    rows = size.batch_tokens // size.context
    most = max(1, (MICRO_TOKENS_GPU if device.kind == "cuda" else MICRO_TOKENS_CPU) // size.context)
    shape = Shape(model, rows, min(request.micro_rows or most, rows), size.context, 1)
    compiled = request.compile == "on"
    seconds, method = step_time(shape, optimization, device, compiled)
    steps = _steps(request, shape, seconds, corpus_tokens)
    if request.compile == "auto" and compiling_pays(seconds * steps, device):
        compiled = True
        seconds, method = step_time(shape, optimization, device, compiled)
        steps = _steps(request, shape, seconds, corpus_tokens)
    return Plan(replace(shape, steps=steps), seconds, method, compiled)


def _steps(request: ShapeRequest, shape: Shape, step_seconds: float, corpus_tokens: int) -> int:
    if request.steps is not None:
        return request.steps
    if request.minutes is not None:
        return max(1, int(request.minutes * 60 * TRAINING_SHARE / step_seconds))
    tokens = min(8.0 * corpus_tokens, 20.0 * parameter_count(shape.model))
    if request.epochs is not None:
        tokens = request.epochs * corpus_tokens
    return max(1, int(tokens / (shape.rows * shape.context)))


def compiling_pays(seconds: float, device: Device) -> bool:
    """Whether a run is long enough for compiled layers: they save about a seventh and take up to a minute to make."""
    compiler = device.kind == "cuda" or (device.kind == "cpu" and shutil.which("g++") is not None)
    return compiler and seconds > COMPILE_AFTER


def parameter_count(config: DecoderConfig | EncoderConfig) -> int:
    """Number of weights of a model of this shape."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_model(config).parameters())


def flops_per_token(config: DecoderConfig | EncoderConfig, context: int) -> float:
    """Operations of one training token, forward and backward: 6 per weight that multiplies, and causal attention.

    6 N + 6 L H d T, where N leaves out an embedding that is only looked up (Kaplan et al. 2020, arXiv:2001.08361, with
    the half of the attention scores that a causal mask uses). An encoder's tokens see both ways, in local layers their
    neighbourhood only, and its head reads hidden tokens alone, at most a third of all.
    """
    if isinstance(config, EncoderConfig):
        near = context if config.local_window is None else min(context, 2 * config.local_window + 1)
        seen = sum(near if config.is_local(layer) else context for layer in range(config.num_layers))
        head = config.embedding_dim * (config.vocab_size + config.embedding_dim)
        return 6.0 * (parameter_count(config) - head * (1 - MASK_SHARE)) + 12.0 * config.embedding_dim * seen
    looked_up = 0 if config.tie_embeddings else config.vocab_size * config.embedding_dim
    attention = config.num_layers * config.num_heads * config.head_dim * context
    return 6.0 * (parameter_count(config) - looked_up) + 6.0 * attention


def matmul_rate(device: Device, seconds: float = 0.4) -> float:
    """The best rate, in operations per second, at which this machine multiplies two square matrices."""
    width = 8192 if device.kind == "cuda" else 2048
    left = torch.randn(width, width, dtype=device.compute_dtype, device=device.torch_device)
    best, deadline = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < deadline:
        started = time.perf_counter()
        torch.mm(left, left)
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * width**3 / best


def model_memory(
    config: DecoderConfig | EncoderConfig, optimization: OptimizationConfig, dtype: torch.dtype
) -> int:
    """Bytes of weights, gradients and optimizer state.

    In float32 a weight takes 4 bytes and its gradient 4; in bfloat16 it takes 2, its float32 master 4, and the
    gradient 4 + 2. AdamW keeps 8 bytes for each, Muon 4 for each of its matrices.
    """
    with torch.device("meta"):
        parameters = dict(make_model(config).named_parameters())
    total = 0
    for name, parameter in parameters.items():
        muon = optimization.optimizer == "muon" and is_hidden_matrix(name, parameter)
        total += parameter.numel() * ((8 if dtype == torch.float32 else 12) + (4 if muon else 8))
    return total


def activation_memory(
    config: DecoderConfig | EncoderConfig,
    rows: int,
    context: int,
    dtype: torch.dtype,
    compiled: bool = False,
) -> int:
    """Bytes that one micro-batch keeps for its backward pass, the scores of the loss, and PyTorch's own workspace.

    Per token and layer, in numbers of the compute format: the stream and its normed copy before each of the two
    halves, queries, keys and values before and after rotation, what attention read, five copies of the width inside
    the feed-forward network, and two of the scores of every head; in bfloat16 the norms keep float32 copies besides.
    Compiled layers keep three quarters of that. Checked against measured peaks in the tests.
    """
    size = 4 if dtype == torch.float32 else 2
    width, inner = config.embedding_dim, config.feed_forward_dim
    queries = keys = config.num_heads * config.head_dim
    normed = 0
    if isinstance(config, DecoderConfig):
        keys = config.num_key_value_heads * config.head_dim
        normed = 3 * (queries + keys) if config.query_key_norm else 0
    per_token = (8 if dtype == torch.float32 else 13) * width + 5 * queries + 5 * keys + normed
    per_token += (5 if config.gated else 3) * inner + 2 * config.num_heads * context
    layers = config.num_layers * rows * context * per_token * size * (0.75 if compiled else 1.0)
    chunk = min(CHUNK_SCORES, rows * context * config.vocab_size)
    return int(layers) + chunk * (8 + 2 * size) + 3 * rows * context * width * size + WORKSPACE


def step_time(
    shape: Shape, optimization: OptimizationConfig, device: Device, compiled: bool
) -> tuple[float, str]:
    """Seconds of an optimizer step, and how they were found: timed here, or estimated for a GPU that is not here."""
    if device.kind != "cuda" or torch.cuda.is_available():
        return measure_step(shape, optimization, device, compiled), "steps timed on this machine"
    flops = flops_per_token(shape.model, shape.context) * shape.rows * shape.context
    method = f"{GPU_UTILIZATION:.0%} of an H100's {GPU_RATE / 1e12:.0f} TFLOP/s, not measured"
    return flops / (GPU_RATE * GPU_UTILIZATION * device.world_size), method


def measure_step(shape: Shape, optimization: OptimizationConfig, device: Device, compiled: bool) -> float:
    """Seconds of an optimizer step, timed on random tokens with a throw-away model.

    One pass at least and three at most, as long as they take less than `MEASURING` seconds together.
    """
    model, objective = make_model(shape.model), objective_for(shape.model)
    initialize(model, 0)
    model = model.to(device.torch_device, device.compute_dtype)
    if compiled:
        compile_layers(model)
    optimizer = MasterOptimizer(model, replace(optimization, learning_rate=0.0, matrix_learning_rate=0.0))
    tokens = torch.randint(
        shape.model.vocab_size, (shape.micro_rows, shape.context), device=device.torch_device
    )
    positions = torch.arange(shape.context, device=tokens.device).expand_as(tokens)
    labels = tokens
    if isinstance(shape.model, EncoderConfig):
        labels = tokens.masked_fill(torch.rand(tokens.shape, device=tokens.device) > MASK_SHARE, IGNORED)
    batch = TokenBatch(tokens, labels, positions, torch.zeros_like(tokens))

    def backward() -> None:
        loss, _ = objective(model, batch)
        loss.backward()
        optimizer.accumulate()

    backward()
    optimizer.step(0.0, 1.0)
    passes = [_timed(backward, device)]
    while len(passes) < 3 and sum(passes) < MEASURING:
        passes.append(_timed(backward, device))
    update = _timed(lambda: optimizer.step(0.0, 1.0), device)
    share = -(-shape.rows // device.world_size)
    return -(-share // shape.micro_rows) * statistics.median(passes) + update


def _timed(action: Callable[[], object], device: Device) -> float:
    started = time.perf_counter()
    action()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: Device) -> None:
    if device.kind == "cuda":
        torch.cuda.synchronize()


def compile_layers(model: Decoder | Encoder) -> None:
    """Let PyTorch fuse each layer. The layers share one compilation, so its cost does not grow with depth."""
    for layer in model.layers:
        layer.compile()


def predict(plan: Plan, optimization: OptimizationConfig, device: Device) -> Prediction:
    """What a run will need: its work, its memory, and the time and energy at the speed of its plan."""
    shape, dtype = plan.shape, device.compute_dtype
    memory = model_memory(shape.model, optimization, dtype)
    memory += activation_memory(shape.model, shape.micro_rows, shape.context, dtype, plan.compiled)
    seconds, watts = plan.step_seconds * shape.steps, power(device)
    return Prediction(
        parameter_count(shape.model),
        flops_per_token(shape.model, shape.context) * shape.tokens,
        memory,
        seconds,
        seconds * watts,
        plan.method,
    )


def power(device: Device) -> float:
    """Watts that the processes of a run are taken to draw; an assumption, named as such wherever it is printed."""
    each = GPU_WATTS if device.kind == "cuda" else WATTS_PER_CORE * device.threads
    return each * device.world_size
