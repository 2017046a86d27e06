"""The stage that turns pairs of texts into a model that writes one from the other: `pretrain_pairs(config, run)`.

It trains an encoder-decoder from scratch, as translation is learned: a tokenizer for both sides, batches of like length,
cross-entropy of the target given the source. What each part does is in its own module.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from glasshouse.artifact import save_artifact
from glasshouse.device import Device, forget_peak_memory, open_device, peak_memory, process_memory
from glasshouse.errors import InputError
from glasshouse.inference.search import BeamConfig, search_translations
from glasshouse.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, initialize_sequences
from glasshouse.run import Run
from glasshouse.text.pairs import SHOWN_ROWS, Pairs, PairStream, SequenceRows, encode_pairs, read_pairs
from glasshouse.text.tokenizer import Tokenizer, train_tokenizer
from glasshouse.training.distributed import StopSignal, process_group, require_agreement, sum_numbers
from glasshouse.training.objectives import SequenceBatch, sequence_to_sequence
from glasshouse.training.optimization import MasterOptimizer, OptimizationConfig
from glasshouse.training.plan import Prediction, matmul_rate, power
from glasshouse.training.progress import Progress, Scalars
from glasshouse.training.session import Course, Training, announce, close, resume, train

SAMPLE_TOKENS = 100
CONTEXT = 512
BEAMS, LENGTH_PENALTY = 4, 1.0
TIMED_STEPS = 3


@dataclass(frozen=True)
class PairsConfig:
    """Settings of `glasshouse pretrain --pairs`: an encoder-decoder, from scratch.

    Args:
        pairs: one file of rows (.tsv or .jsonl) or two files of lines, sources and targets; also .gz.
        validation: held-out pairs, given in the same way.
        columns: names of the source and the target column.
        layout: "marian" (the original Transformer) or "t5" (version 1.1).
        vocab_size: tokens shared by both sides.
        layers: blocks of the encoder, and of the decoder.
        width: embedding width.
        heads: attention heads.
        feed_forward: width inside the feed-forward networks.
        dropout: share of activations dropped in training.
        smoothing: share of each label that is spread over the vocabulary.
        epochs: passes over the pairs.
        minutes: or: train about this long on this machine.
        batch_tokens: tokens of a step, source and target together, padding included.
        optimizer: "muon" (hidden matrices by Muon, the rest by AdamW) or "adamw".
        learning_rate: peak learning rate of AdamW.
        matrix_learning_rate: peak learning rate of Muon.
        weight_decay: weight decay of matrices.
        clip: most the norm of the gradient may be; 0 for no limit.
        warmup: share of the steps over which the learning rate rises.
        decay: share of the steps, at the end, over which it falls.
        validations: how often, in the whole run, the validation loss is measured.
        early_stop: stop after this many validations without a better one; 0 never stops early.
        save_minutes: minutes between two saves of the state that --resume needs.
        bad_steps: stop after this many steps in a row whose loss is not a number.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32 or bfloat16.
        threads: CPU threads; 0 for all.
        seed: every random choice follows from it.
        licence: of the model, for its card.
    """

    pairs: tuple[Path, ...]
    validation: tuple[Path, ...]
    columns: tuple[str, ...] | None = None
    layout: str = "marian"
    vocab_size: int = 4000
    layers: int = 4
    width: int = 128
    heads: int = 4
    feed_forward: int = 512
    dropout: float = 0.15
    smoothing: float = 0.1
    epochs: float | None = None
    minutes: float | None = None
    batch_tokens: int = 4096
    optimizer: str = "muon"
    learning_rate: float = 4e-3
    matrix_learning_rate: float = 5e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: float = 0.05
    decay: float = 0.5
    validations: int = 20
    early_stop: int = 0
    save_minutes: float = 1.0
    bad_steps: int = 5
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    seed: int = 0
    licence: str = ""


@dataclass(frozen=True)
class Material:
    """What is learned from: both splits, read and encoded.

    Args:
        train: batches to learn from.
        validation: batches to measure on.
        tokenizer: of both sides.
        texts: the validation pairs as they were read.
        tokens_per_byte: target tokens per byte of target text, in "train" and "validation".
        digest: names the pairs.
        left_out: a line for each kind of row that was left out or is there twice.
    """

    train: PairStream
    validation: PairStream
    tokenizer: Tokenizer
    texts: Pairs
    tokens_per_byte: dict[str, float]
    digest: str
    left_out: tuple[str, ...]


def pretrain_pairs(config: PairsConfig, run: Run) -> None:
    """Train an encoder-decoder on pairs; goes on where it stopped when the run holds a saved state.

    Args:
        config: the settings.
        run: an open run folder; its model/ holds the best model so far from the first validation on.

    Raises:
        InputError: the settings, the pairs or the machine do not allow it.
    """
    device = open_device(config.device, config.dtype, config.seed, config.threads)
    lock = run.lock() if device.rank == 0 else nullcontext()
    with lock, process_group(device), StopSignal() as stop:
        forget_peak_memory(device)
        require_agreement("their settings", repr(config))
        material = _material(config, device)
        shape = sequence_shape(config, material.tokenizer.vocab_size)
        optimization = OptimizationConfig(
            config.optimizer, config.learning_rate, config.matrix_learning_rate, config.weight_decay, config.clip,
            config.warmup, config.decay,
        )  # fmt: skip
        steps, predicted = _settle(config, run, device, material, shape, optimization)
        model = EncoderDecoder(shape)
        initialize_sequences(model, config.seed)
        masters = dict(model.named_parameters())
        model = model.to(device.torch_device, device.compute_dtype)
        optimizer = MasterOptimizer(model, optimization, masters)
        del masters
        history = resume(run, optimizer, device.rank == 0)
        with Progress(steps, history.step, quiet=device.rank > 0) as progress:
            course = _course(config, run, device, material, model, steps)
            training = Training(config, run, device, course, optimizer, progress, Scalars(run.path, device.rank > 0),
                                stop, matmul_rate(device), history)  # fmt: skip
            for line in _facts(material, predicted, steps, config):
                progress.say(line)
            announce(training, predicted)
            close(training, predicted, train(training))


def _material(config: PairsConfig, device: Device) -> Material:
    columns = (config.columns[0], config.columns[1]) if config.columns and len(config.columns) == 2 else None
    if config.columns and columns is None:
        raise InputError(
            f"{len(config.columns)} columns", "--columns", "name the source and the target column"
        )
    texts, held_out = read_pairs(config.pairs, columns), read_pairs(config.validation, columns)
    tokenizer = train_tokenizer(
        (side for pair in texts.pairs for side in pair), config.vocab_size, exact=False
    )
    streams, rates = {}, {}
    for name, part in (("train", texts), ("validation", held_out)):
        sources, targets = encode_pairs(tokenizer, part.pairs, CONTEXT, device.threads)
        streams[name] = PairStream(
            sources, targets, tokenizer.pad, tokenizer.pad, config.batch_tokens, config.seed
        )
        size = sum(len(pair.target.encode()) for pair in part.pairs)
        rates[name] = sum(map(len, targets)) / size
    return Material(
        streams["train"],
        streams["validation"],
        tokenizer,
        held_out,
        rates,
        texts.digest,
        tuple(_left_out(texts)),
    )


def _left_out(texts: Pairs) -> Iterator[str]:
    """What is odd about the pairs, a line each."""
    if texts.empty:
        rows = ", ".join(map(str, texts.empty[:SHOWN_ROWS])) + (
            ", ..." if len(texts.empty) > SHOWN_ROWS else ""
        )
        yield f"left out {len(texts.empty):,} rows with an empty side: {rows}"
    if texts.repeated:
        yield f"{texts.repeated:,} rows say what an earlier row says, in the same words; they stay"


def sequence_shape(config: PairsConfig, vocab_size: int) -> EncoderDecoderConfig:
    """The model that the settings ask for.

    Raises:
        InputError: an unknown layout, or a width that the heads do not divide.
    """
    if config.width % config.heads:
        raise InputError(
            f"width {config.width} does not split into {config.heads} heads", "--heads", "choose a divisor"
        )
    shape = EncoderDecoderConfig(
        vocab_size=vocab_size, embedding_dim=config.width, num_encoder_layers=config.layers,
        num_decoder_layers=config.layers, num_heads=config.heads, head_dim=config.width // config.heads,
        feed_forward_dim=config.feed_forward, context_length=CONTEXT, dropout=config.dropout,
    )  # fmt: skip
    if config.layout == "t5":
        return shape
    if config.layout != "marian":
        raise InputError(f"unknown layout {config.layout!r}", "--layout", "use marian or t5")
    return replace(
        shape, position="sinusoidal", norm="layer", norm_epsilon=1e-5, norm_place="after", activation="relu",
        gated=False, bias="all", embedding_scale=config.width**0.5, output="tied",
    )  # fmt: skip


def _settle(
    config: PairsConfig,
    run: Run,
    device: Device,
    material: Material,
    shape: EncoderDecoderConfig,
    optimization: OptimizationConfig,
) -> tuple[int, Prediction]:
    """How many steps, and what they are predicted to need: measured once and read from run.json from then on."""
    if config.epochs is not None and config.minutes is not None:
        raise InputError("epochs and minutes are two ways to say one thing", "--epochs", "give one of them")
    facts = run.read()
    if "predicted" not in facts:
        print("timing a few steps on this machine ...", flush=True)
        baseline = process_memory()
        seconds = _step_seconds(material, shape, optimization, device)
        epochs = 30.0 if config.epochs is None else config.epochs
        steps = round(epochs * material.train.batches)
        if config.minutes is not None:
            steps = int(60 * config.minutes / seconds)
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in EncoderDecoder(shape).parameters())
        predicted = Prediction(
            parameters, sequence_flops(shape) * config.batch_tokens / 2 * steps, max(0, peak_memory(device) - baseline),
            seconds * steps, seconds * steps * power(device), "steps timed on this machine",
        )  # fmt: skip
        run.update(steps=max(1, steps), predicted=asdict(predicted), baseline_memory=baseline, device=asdict(device),
                   seed=config.seed, licence=config.licence, optimization=asdict(optimization),
                   corpus_digest=material.digest, model_shape=asdict(shape), matmul_rate=matmul_rate(device))  # fmt: skip
        facts = run.read()
    if facts["corpus_digest"] != material.digest:
        raise InputError(
            "the pairs are not those this run was started on", str(config.pairs[0]), "start a new run"
        )
    return facts["steps"], Prediction(**facts["predicted"])


def _step_seconds(
    material: Material, shape: EncoderDecoderConfig, optimization: OptimizationConfig, device: Device
) -> float:
    """Median seconds of a step, of a throw-away model."""
    model = EncoderDecoder(shape)
    initialize_sequences(model, 0)
    model = model.to(device.torch_device, device.compute_dtype).train()
    optimizer = MasterOptimizer(model, replace(optimization, learning_rate=0.0, matrix_learning_rate=0.0))
    objective, seconds = sequence_to_sequence(0.1), []
    for number in range(TIMED_STEPS + 1):
        started = time.perf_counter()
        loss, weight = objective(model, to_device(material.train.batch(number), device))
        loss.backward()
        optimizer.accumulate()
        optimizer.step(0.0, weight)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def sequence_flops(shape: EncoderDecoderConfig) -> float:
    """Operations of one training pair of tokens, one of the source and one of the target: 6 per weight that multiplies.

    The attention's own products, small at the length of a sentence, are left out.
    """
    with torch.device("meta"):
        model = EncoderDecoder(shape)
    layers = sum(p.numel() for n, p in model.named_parameters() if "layers." in n and p.dim() == 2)
    return 6.0 * (layers + shape.vocab_size * shape.embedding_dim)


def to_device(rows: SequenceRows, device: Device) -> SequenceBatch:
    """A batch as tensors on the device; the mask is left out where nothing is padding."""
    place = device.torch_device
    sources, tokens, labels = (
        torch.from_numpy(a).to(place) for a in (rows.sources, rows.tokens, rows.labels)
    )
    mask = None if rows.source_mask.all() else torch.from_numpy(rows.source_mask).to(place)
    return SequenceBatch(sources, mask, tokens, labels)


def _course(
    config: PairsConfig, run: Run, device: Device, material: Material, model: EncoderDecoder, steps: int
) -> Course:
    """What is trained: each token of the target, given the source."""
    tokenizer = material.tokenizer
    source = material.texts.pairs[0].source

    def batches(step: int) -> Iterator[SequenceBatch]:
        rows = material.train.batch(step)
        for piece in split_rows(rows, device.rank, device.world_size):
            yield to_device(piece, device)

    def sample() -> tuple[str, str]:
        return f"{source} => ", translate_one(model, tokenizer, material.validation.sources[0])

    ids = {"decoder_start_token_id": tokenizer.pad, "eos_token_id": tokenizer.end_of_document,
           "suppress_tokens": [tokenizer.pad], "num_beams": BEAMS, "length_penalty": LENGTH_PENALTY,
           "max_new_tokens": SAMPLE_TOKENS}  # fmt: skip
    return Course(
        model, sequence_to_sequence(config.smoothing), batches, steps, config.batch_tokens,
        sequence_flops(model.config) / 2, lambda stop: validate_pairs(model, material.validation, device, stop),
        lambda: save_artifact(run.model_path, model, tokenizer, generation=ids),
        lambda loss, split: loss / math.log(2) * material.tokens_per_byte[split], sample,
    )  # fmt: skip


def split_rows(rows: SequenceRows, rank: int, world_size: int) -> Iterator[SequenceRows]:
    """The share of a batch that one of several processes computes; nothing where there are fewer rows than processes."""
    chosen = np.arange(rank, len(rows.tokens), world_size)
    if len(chosen):
        yield SequenceRows(
            rows.sources[chosen], rows.source_mask[chosen], rows.tokens[chosen], rows.labels[chosen]
        )


@torch.no_grad()
def validate_pairs(
    model: EncoderDecoder, stream: PairStream, device: Device, stop: Callable[[], bool]
) -> float | None:
    """Mean loss of held-out targets, in nats per token, without smoothing; None when asked to stop before the end."""
    model.eval()
    objective, loss_sum, weight = sequence_to_sequence(), 0.0, 0
    for number in range(device.rank, stream.batches, device.world_size):
        if stop():
            model.train()
            return None
        loss, count = objective(model, to_device(stream.batch(number), device))
        loss_sum, weight = loss_sum + float(loss), weight + count
    model.train()
    loss_sum, total = sum_numbers([loss_sum, float(weight)])
    return loss_sum / total


def translate_one(model: EncoderDecoder, tokenizer: Tokenizer, source: np.ndarray) -> str:
    """What the model makes of one source at present, by the likeliest token each time."""
    model.eval()
    sources = torch.from_numpy(source).to(model.output_weight.device)[None]
    config = BeamConfig(beams=1, max_new_tokens=SAMPLE_TOKENS)
    [[found]] = search_translations(
        model, sources, None, config, start_token=tokenizer.pad, end_tokens=(tokenizer.end_of_document,)
    )
    model.train()
    return tokenizer.decode(found.tokens)


def _facts(material: Material, predicted: Prediction, steps: int, config: PairsConfig) -> Iterator[str]:
    """What is trained on what, in two lines, and a line of what was left out."""
    train, vocabulary = material.train, material.tokenizer.vocab_size
    yield (
        f"{predicted.parameters / 1e6:.1f}M weights: {config.layers} + {config.layers} layers, width {config.width}, "
        f"vocabulary {vocabulary:,}; {steps:,} steps, {steps / train.batches:.1f} passes over {len(train.sources):,} pairs"
    )
    yield f"padding: {train.padding():.1%} of what is computed"
    yield from material.left_out
