"""A model as ONNX graphs in float32, and the same graphs run by onnxruntime.

A decoder's graph takes the keys and values of the tokens before and gives them back grown, so that it writes text one
token at a time; with none before, it reads a whole text. An encoder-decoder has two graphs. Inputs and outputs are named
as the field's exporters name them. Knows graphs; nothing of prompts or tokenizers.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from glasshouse.export.library import require_library
from glasshouse.models.attention import Mask, additive, attend
from glasshouse.models.decoder import Decoder
from glasshouse.models.encoder import Encoder
from glasshouse.models.encoder_decoder import EncoderDecoder
from glasshouse.models.huggingface import Model
from glasshouse.models.layers import Tap

MODEL_FILE, SOURCE_FILE, TARGET_FILE = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"
EXTERNAL_BYTES = 2**30
"""Weights larger than this lie in a file beside the graph: one file of ONNX holds at most 2 GB."""
EXAMPLE = (2, 12)
"""Rows and tokens of the example that a graph is traced with; both may be anything when it runs."""


class _GivenPast:
    """A cache that is handed everything and gives everything back: the graph itself keeps nothing."""

    def __init__(self, past: Sequence[Tensor]):
        self.past, self.present = past, list[Tensor]()

    @property
    def length(self) -> int:
        return self.past[0].shape[2]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int | None,
        tap: Tap | None,
        name: str,
    ) -> Tensor:
        key = torch.cat([self.past[2 * layer], key], dim=2)
        value = torch.cat([self.past[2 * layer + 1], value], dim=2)
        self.present += [key, value]
        seen = Mask(True, window).seen(query.shape[2], key.shape[2], query.device)
        return attend(query, key, value, additive(seen, query.dtype), False, tap, name)


class _DecoderGraph(nn.Module):
    """Tokens and the past to logits and the present."""

    def __init__(self, model: Decoder):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        cache = _GivenPast(past)
        return self.model.logits(self.model(tokens, cache=cache)), *cache.present


class _EncoderGraph(nn.Module):
    """Tokens and mask to hidden vectors and, where there is a head, its scores."""

    def __init__(self, model: Encoder):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, types: Tensor | None = None) -> tuple[Tensor, ...]:
        seen = mask.bool()
        hidden = self.model(tokens, mask=seen, token_types=types)
        return (hidden,) if self.model.head is None else (hidden, self.model.logits(hidden, seen))


class _SourceGraph(nn.Module):
    """Tokens and mask of a source to what the decoder remembers of it."""

    def __init__(self, model: EncoderDecoder):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.model.encode(tokens, mask.bool())


class _TargetGraph(nn.Module):
    """Tokens of a target, and what is remembered of the source, to logits."""

    def __init__(self, model: EncoderDecoder):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return self.model.logits(self.model(tokens, memory=memory, memory_mask=mask.bool()))


def past_names(layers: int, kind: str) -> list[str]:
    """The names of keys and values, layer by layer; `kind` is "past_key_values" or "present"."""
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def save_graphs(folder: Path, model: Model, external_bytes: int = EXTERNAL_BYTES) -> None:
    """Write the graph or graphs of a model, their weights in a second file where they are large.

    A decoder, `MODEL_FILE`: input_ids int64 [B, T] and past_key_values.N.key and .value, float32 [B, G, S, d] with S = 0
    where nothing was read, to logits [B, T, vocab_size] and present.N.key and .value [B, G, S + T, d]. An encoder,
    `MODEL_FILE`: input_ids, attention_mask and, where it has types, token_type_ids, int64 [B, T], to last_hidden_state
    [B, T, D] and, where it has a head, logits. An encoder-decoder, `SOURCE_FILE`: input_ids and attention_mask to
    last_hidden_state; and `TARGET_FILE`: input_ids, encoder_hidden_states and encoder_attention_mask to logits.

    Args:
        folder: where to.
        model: in float32.
        external_bytes: weights larger than this lie in a file of their own.

    Raises:
        InputError: a library is missing.
        OSError: the disk is full.
    """
    if isinstance(model, Decoder):
        _save_decoder(folder, model, external_bytes)
    elif isinstance(model, Encoder):
        _save_encoder(folder, model, external_bytes)
    else:
        _save_encoder_decoder(folder, model, external_bytes)


def _save_decoder(folder: Path, model: Decoder, external_bytes: int) -> None:
    config = model.config
    rows, tokens = EXAMPLE
    past = [
        torch.zeros(rows, config.num_key_value_heads, 5, config.head_dim)
        for _ in range(2 * config.num_layers)
    ]
    batch, earlier = Dim("batch"), Dim("past_sequence_length")
    shapes = ({0: batch, 1: Dim("sequence_length")}, [{0: batch, 2: earlier} for _ in past])
    names = ["input_ids", *past_names(config.num_layers, "past_key_values")]
    outputs = ["logits", *past_names(config.num_layers, "present")]
    example = (torch.zeros(rows, tokens, dtype=torch.int64), past)
    _save_graph(folder / MODEL_FILE, _DecoderGraph(model), example, shapes, (names, outputs), external_bytes)


def _save_encoder(folder: Path, model: Encoder, external_bytes: int) -> None:
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if model.config.token_types else [])
    outputs = ["last_hidden_state"] + (["logits"] if model.head is not None else [])
    tokens = torch.zeros(EXAMPLE, dtype=torch.int64)
    example = (tokens, torch.ones_like(tokens), torch.zeros_like(tokens))[: len(names)]
    shapes = tuple({0: Dim("batch"), 1: Dim("sequence_length")} for _ in names)
    _save_graph(folder / MODEL_FILE, _EncoderGraph(model), example, shapes, (names, outputs), external_bytes)


def _save_encoder_decoder(folder: Path, model: EncoderDecoder, external_bytes: int) -> None:
    batch, source, target = Dim("batch"), Dim("encoder_sequence_length"), Dim("sequence_length")
    tokens = torch.zeros(EXAMPLE, dtype=torch.int64)
    mask, names = torch.ones_like(tokens), ["input_ids", "attention_mask"]
    shapes = ({0: batch, 1: source}, {0: batch, 1: source})
    graph = _SourceGraph(model)
    graphs = (names, ["last_hidden_state"])
    _save_graph(folder / SOURCE_FILE, graph, (tokens, mask), shapes, graphs, external_bytes)
    names = ["input_ids", "encoder_hidden_states", "encoder_attention_mask"]
    example = (tokens[:, :-1], torch.zeros(*EXAMPLE, model.config.embedding_dim), mask)
    shapes = ({0: batch, 1: target}, *shapes)
    _save_graph(
        folder / TARGET_FILE, _TargetGraph(model), example, shapes, (names, ["logits"]), external_bytes
    )


def _save_graph(
    path: Path,
    graph: nn.Module,
    example: tuple[Any, ...],
    shapes: tuple[Any, ...],
    names: tuple[list[str], list[str]],
    external_bytes: int,
) -> None:
    onnx = require_library("onnx")
    require_library("onnxscript")
    # The exporter speaks of its own affairs (torchvision is not there, a name of PyTorch's is deprecated).
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph.eval(), example, dynamo=True, dynamic_shapes=shapes, input_names=names[0],
                output_names=names[1], verbose=False,
            )  # fmt: skip
    finally:
        log.setLevel(level)
    assert program is not None
    size = sum(parameter.nbytes for parameter in graph.parameters())
    program.save(path, external_data=size > external_bytes)
    onnx.checker.check_model(path)
