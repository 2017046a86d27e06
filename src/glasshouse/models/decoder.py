"""The decoder: a causal Transformer that predicts the next token.

One class covers the layouts of Qwen3, Llama, Mistral, Qwen2 and GPT-2; what differs between them is a value in the
config. Pure torch: tensors in, tensors out. Knows no text, no files and no training.
"""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from glasshouse.errors import InputError
from glasshouse.models import native
from glasshouse.models.attention import Attention, Cache, Mask, additive
from glasshouse.models.layers import (
    Embedding,
    FeedForward,
    Linear,
    QuantizedLinear,
    RootMeanSquareNorm,
    Tap,
    make_matrices,
    multiply,
    norm_layer,
    rotary_frequencies,
    rotary_table,
    touch,
)


@dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder.

    Args:
        vocab_size: number of tokens.
        embedding_dim: width of the residual stream.
        num_layers: number of blocks.
        num_heads: query heads.
        num_key_value_heads: key and value heads; divides num_heads.
        head_dim: width of a head.
        feed_forward_dim: width inside the feed-forward network.
        context_length: most positions the model was made for.
        position: "rotary" or "learned".
        rope_theta: base of the rotary frequencies.
        rope_scaling: rotary scaling as Hugging Face writes it ("linear" or "llama3"), or None.
        norm: "rms" or "layer".
        norm_epsilon: epsilon of the norms.
        activation: "silu" or "gelu_tanh".
        gated: whether the feed-forward network has a gate.
        bias: "none", "query_key_value" or "all".
        query_key_norm: whether queries and keys are normed.
        sliding_window: how far back a position sees, or None for all the way.
        tie_embeddings: whether the output head is the embedding.
        dropout: probability of dropping an activation of the residual stream in training.
    """

    vocab_size: int
    embedding_dim: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    feed_forward_dim: int
    context_length: int
    position: str = "rotary"
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    activation: str = "silu"
    gated: bool = True
    bias: str = "none"
    query_key_norm: bool = True
    sliding_window: int | None = None
    tie_embeddings: bool = True
    dropout: float = 0.0


class NativeBlock:
    """A decoder's block, checked once, as the library takes it.

    Args:
        heads: matrices of queries, keys and values.
        output: the matrix that writes what was read.
        feed_forward: its first matrices, with their activation, and its last.
        norms: weights of the norms before attention and before the feed-forward network, and their epsilon.
        counts: query heads and key heads.
        head_norms: of queries and keys, or None.
        window: how many positions back a query sees, itself included; None for all.
    """

    def __init__(
        self,
        heads: native.Matrices,
        output: native.Matrices,
        feed_forward: tuple[native.Matrices, native.Matrices],
        norms: tuple[Tensor, Tensor, float],
        counts: tuple[int, int],
        head_norms: native.HeadNorms | None,
        window: int | None,
    ):
        first, second = feed_forward
        number = counts[0] + 2 * counts[1]
        self.heads, self.counts, self.head_norms, self.head_dim = (
            heads,
            counts,
            head_norms,
            heads.columns // number,
        )
        fits = heads.columns == number * self.head_dim and output.width == counts[0] * self.head_dim
        fits = (
            fits
            and heads.width == output.columns == first.width == second.columns
            and first.columns == second.width
        )
        native.require(fits and counts[0] % counts[1] == 0, "the parts of a block must fit")
        for weight in norms[:2]:
            native.require(weight.dtype == heads.dtype and weight.numel() == heads.width, "norms must fit")
        self.is_plain = any(part.is_plain for part in (heads, output, first, second))
        self._parts = (heads, output, first, second, norms)
        addresses = (heads.address, output.address, first.address, second.address)
        numbers = (
            norms[0].data_ptr(),
            norms[1].data_ptr(),
            counts[1],
            window or 0,
            self.head_dim**-0.5,
            norms[2],
        )
        self._struct = native.BlockStructure(*addresses, *numbers)
        self.address = ctypes.addressof(self._struct)

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """None in a copy of a model, and in another process: it makes its own."""
        return native.nothing, ()


def compute_block(
    hidden: Tensor, by: NativeBlock, pages: native.Pages, rotary: tuple[Tensor, Tensor] | None
) -> Tensor:
    """A decoder's block for one new token of each text: [1, N, width] to the same, N at least the texts; rows beyond
    them are padding. The numbers are those of its parts one by one."""
    rows = native.rows_of(hidden, by.heads)
    native.require(
        hidden.shape[0] == 1 and rows >= pages.texts and pages.keys.dtype == hidden.dtype,
        "a row for each text",
    )
    native.require(pages.keys.shape[2:] == (by.counts[1], by.head_dim), "heads must fit")
    turned = native.turn(hidden, by.head_dim, by.counts, by.head_norms, rotary)
    out = torch.empty_like(hidden)
    native.serving().glasshouse_block(
        hidden.data_ptr(), rows, by.address, ctypes.addressof(turned), pages.address, pages.texts, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


class _Kept:
    """A layer as the C++ kernels take it, and what tells whether it still is that layer.

    Args:
        layer: the layer.
        dtype: number format of its activations.
    """

    def __init__(self, layer: "DecoderLayer", dtype: torch.dtype):
        self.dtype, self.block = dtype, layer.native_parts(dtype)
        modules = list(layer.modules())
        self._slots = [(one._modules, key, child) for one in modules for key, child in one._modules.items()]
        parameters = [(one._parameters, key) for one in modules for key in one._parameters]
        buffers = [(one._buffers, key) for one in modules for key in one._buffers]
        self._leaves: list[tuple[Any, str]] = [
            (place, key) for place, key in (*parameters, *buffers) if place[key] is not None
        ]
        self._addresses = self._places()

    def _places(self) -> list[int]:
        """Where the weights lie: those that are kept stay alive, so no others can lie there."""
        return [place[key].data_ptr() for place, key in self._leaves]

    def is_current(self) -> bool:
        """Whether no module was replaced, and no weight replaced or moved."""
        return (
            all(place.get(key) is child for place, key, child in self._slots)
            and self._places() == self._addresses
        )

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """None in a copy of a model, and in another process: it makes its own."""
        return native.nothing, ()


class DecoderLayer(nn.Module):
    """One block: attention, then the feed-forward network, each on a normed copy and added back to the stream.

    Args:
        config: the decoder's shape.
        index: number of the layer, from 0.
    """

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.index = index
        self.dropout = config.dropout
        self.attention_norm = norm_layer(config.norm, config.embedding_dim, config.norm_epsilon)
        self.attention = Attention(
            config.embedding_dim, config.num_heads, config.num_key_value_heads, config.head_dim, config.bias,
            config.norm_epsilon if config.query_key_norm else None, config.sliding_window,
        )  # fmt: skip
        self.feed_forward_norm = norm_layer(config.norm, config.embedding_dim, config.norm_epsilon)
        self.feed_forward = FeedForward(
            config.embedding_dim,
            config.feed_forward_dim,
            config.activation,
            config.gated,
            config.bias == "all",
        )

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        causal: bool,
        cache: Cache | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        if tap is None and isinstance(cache, native.Paged) and native.suits(hidden):
            block = self._native_block(hidden)
            if block is not None:
                return compute_block(hidden.contiguous(), block, cache.pages(self.index), rotary)
        # The index is looked up only where it is needed: a compiled layer that knew it could serve no other layer.
        index = 0 if tap is None and cache is None else self.index
        name = "" if tap is None else f"layers.{index}"
        hidden = touch(tap, f"{name}.residual_before", hidden)
        read = self.attention(self.attention_norm(hidden), rotary, mask, causal, cache, index, tap)
        hidden = touch(tap, f"{name}.residual_middle", hidden + self._drop(read))
        written = self.feed_forward(self.feed_forward_norm(hidden), tap, f"{name}.feed_forward")
        return touch(tap, f"{name}.residual_after", hidden + self._drop(written))

    def _native_block(self, hidden: Tensor) -> NativeBlock | None:
        """All of it as the C++ kernels take it, where those serve; kept until a part is replaced or moved."""
        kept: _Kept | None = self.__dict__.get("_kept")
        if kept is None or not kept.is_current() or kept.dtype != hidden.dtype:
            kept = self.__dict__["_kept"] = _Kept(self, hidden.dtype)
        few = hidden.numel() <= native.MOST_ROWS * hidden.shape[-1]
        return kept.block if kept.block is not None and (few or not kept.block.is_plain) else None

    def native_parts(self, dtype: torch.dtype) -> NativeBlock | None:
        """The block as the C++ kernels take it; None where it has parts that they do not know."""
        before, between, attention, feed_forward = (
            self.attention_norm,
            self.feed_forward_norm,
            self.attention,
            self.feed_forward,
        )
        if not isinstance(before, RootMeanSquareNorm) or not isinstance(between, RootMeanSquareNorm):
            return None
        known = feed_forward.activation_name in native.ACTIVATIONS and not (self.training and self.dropout)
        if not known or before.weight.dtype != dtype or between.weight.dtype != dtype:
            return None
        names = ("up",) if feed_forward.gate is None else ("gate", "up")
        wanted = (
            (attention, ("query", "key", "value"), ""), (attention, ("output",), ""),
            (feed_forward, names, feed_forward.activation_name), (feed_forward, ("down",), ""),
        )  # fmt: skip
        parts = [
            make_matrices([owner._modules[name] for name in some], dtype, act) for owner, some, act in wanted
        ]
        heads, output, first, second = parts
        if heads is None or output is None or first is None or second is None:
            return None
        weights = (before.weight, between.weight, before.epsilon)
        counts = (attention.heads, attention.key_value_heads)
        return NativeBlock(
            heads, output, (first, second), weights, counts, attention.head_norms(), attention.window
        )

    def _drop(self, hidden: Tensor) -> Tensor:
        return functional.dropout(hidden, self.dropout, self.training) if self.dropout else hidden


class Decoder(nn.Module):
    """A causal language model.

    Args:
        config: its shape.
    """

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.embedding_dim)
        learned = config.position == "learned"
        self.position_embedding = Embedding(config.context_length, config.embedding_dim) if learned else None
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = norm_layer(config.norm, config.embedding_dim, config.norm_epsilon)
        # A quantized model has a head of its own even where the config ties it: look-up and logits differ in precision.
        self.head: Linear | QuantizedLinear | None = (
            None if config.tie_embeddings else Linear(config.embedding_dim, config.vocab_size, bias=False)
        )

    @property
    def output_weight(self) -> Tensor:
        """The matrix that turns a hidden vector into logits: [vocab_size, D]."""
        if self.head is None or self.config.tie_embeddings:
            return self.embedding.weight
        return self.head.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """The hidden vector after each token.

        Args:
            tokens: token ids, int64 [B, T].
            positions: position of each token in its document, [B, T]; counted from the cache's length when None.
            documents: number of the document of each token, [B, T]: tokens see only their own document. Not with a
                cache, which holds one document a row.
            cache: keys and values of the tokens before these; extended by these.
            tap: shown every named activation, and may replace it.

        Returns:
            [B, T, D], normed, ready for `logits`.
        """
        start = 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        hidden = self.embedding(tokens)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(positions)
        hidden = touch(tap, "embedding", hidden)
        rotary = self._rotary(positions, hidden.dtype)
        mask, causal = self._mask(documents, hidden) if cache is None else (None, True)
        for layer in self.layers:
            hidden = layer(hidden, rotary, mask, causal, cache, tap)
        return touch(tap, "norm", self.norm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden vectors [..., D] to one score per token of the vocabulary, [..., vocab_size]."""
        return (
            self.head(hidden)
            if isinstance(self.head, QuantizedLinear)
            else multiply(hidden, self.output_weight)
        )

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if self.config.position != "rotary":
            return None
        frequencies = rotary_frequencies(
            self.config.head_dim, self.config.rope_theta, self.config.rope_scaling
        )
        return rotary_table(positions, frequencies.to(positions.device), dtype)

    def _mask(self, documents: Tensor | None, hidden: Tensor) -> tuple[Tensor | None, bool]:
        """The additive mask shared by every layer (None for the plain triangle), and whether no query sees later keys."""
        mask, queries = Mask(True, self.config.sliding_window, documents), hidden.shape[1]
        if mask.is_plain(queries, queries):
            return None, queries > 1
        return additive(mask.seen(queries, queries, hidden.device), hidden.dtype), queries > 1


def quantize_head(model: Decoder) -> None:
    """Give the model a head of int8; a tied embedding stays as it is for looking tokens up."""
    if not isinstance(model.head, QuantizedLinear):
        model.head = QuantizedLinear.from_linear(model.output_weight, None, 8)


def initialize(model: nn.Module, seed: int) -> None:
    """Draw fresh weights: normal with deviation 1 / sqrt(fan-in), and zero for the matrices that write to the stream.

    A block that starts at zero leaves the stream as it was, so a deep model starts as a shallow one (Zhang et al.
    2019, arXiv:1901.09321). Drawn in float32 on the CPU, so a seed gives the same weights on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith(("attention.output.weight", "feed_forward.down.weight")) or name.endswith(
                "bias"
            ):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                deviation = (
                    0.02 if "embedding" in name or name == "head.weight" else parameter.shape[1] ** -0.5
                )
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))


class Transformer(nn.Module):
    """A causal language model in one line, with fresh weights: token ids in, logits out.

    Its `decoder` is a `Decoder` in the layout of Llama, so it trains with the same loop (`train_steps(model.decoder,
    next_token, ...)`), generates with the same engine, and is saved with the same artifact as every other.

    Args:
        vocab_size: number of tokens.
        embedding_dim: width of the residual stream.
        num_heads: attention heads.
        num_layers: number of blocks.
        context_length: most positions the model is made for.
        dropout: probability of dropping an activation of the residual stream in training.
        seed: of the weights.

    Raises:
        InputError: the heads do not divide the width into even parts, or a size is not above 0.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        num_heads: int,
        num_layers: int,
        context_length: int = 1024,
        dropout: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        if min(vocab_size, embedding_dim, num_heads, num_layers, context_length) < 1:
            raise InputError("a size that is not above 0", "Transformer", "give whole numbers from 1")
        if embedding_dim % (2 * num_heads):
            what = f"embedding_dim {embedding_dim} does not split into {num_heads} heads of an even width"
            raise InputError(what, "Transformer", "give a multiple of 2 * num_heads")
        self.decoder = Decoder(
            DecoderConfig(
                vocab_size, embedding_dim, num_layers, num_heads, num_heads, embedding_dim // num_heads,
                feed_forward_dim=-(-embedding_dim * 8 // 3 // 64) * 64, context_length=context_length,
                query_key_norm=False, dropout=dropout,
            )
        )  # fmt: skip
        initialize(self.decoder, seed)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids, int64 [B, T], to the score of every token as the next one: [B, T, vocab_size]."""
        return self.decoder.logits(self.decoder(tokens))
