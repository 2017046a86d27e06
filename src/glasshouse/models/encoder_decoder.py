"""The encoder-decoder: one stack reads a source both ways, another writes a target one token after the other.

One class covers the layouts of T5 (v1.1, the native one, and the original), Marian, which is the layout of *Attention Is
All You Need* (Vaswani et al. 2017, arXiv:1706.03762), and BART; what differs between them is a value in the config. Pure
torch: tensors in, tensors out. Knows no text, no files, no training and no search.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from glasshouse.models.attention import Attention, Mask, additive, attend, attend_explicitly
from glasshouse.models.layers import Embedding, FeedForward, Linear, Tap, drop, norm_layer, touch

LEARNED_OFFSET = 2
"""Rows at the start of BART's table of positions that stand for none."""

FEW = 4096
"""Queries times keys up to which attention is spelled out where no gradient is wanted: PyTorch's own is slower there."""

KeyValues = Sequence[tuple[Tensor, Tensor]]
"""Keys and values, each [B, H, S, d], of each layer."""


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """The shape of an encoder-decoder.

    Args:
        vocab_size: number of tokens, shared by source and target.
        embedding_dim: width of the residual stream.
        num_encoder_layers: blocks that read the source.
        num_decoder_layers: blocks that write the target.
        num_heads: heads of every attention.
        head_dim: width of a head.
        feed_forward_dim: width inside the feed-forward networks.
        context_length: most positions of either side.
        position: "relative" (T5: a learned bias on the scores), "sinusoidal" or "learned".
        relative_buckets: number of relative biases of a head, and the distance from which all share the last.
        norm: "rms" or "layer".
        norm_epsilon: epsilon of the norms.
        norm_place: "before" each half of a block, with one more at a stack's end, or "after" (post-norm).
        activation: a key of `layers.ACTIVATIONS`.
        gated: whether the feed-forward networks have a gate.
        bias: "none" or "all"; with "all" the logits have one too.
        embedding_scale: what embeddings are multiplied by.
        output: "untied" (a head of its own), "tied" (the embedding) or "scaled" (the embedding, on hidden vectors
            divided by the root of their width: the original T5).
        dropout: probability of dropping an activation of the residual stream in training.
    """

    vocab_size: int
    embedding_dim: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    feed_forward_dim: int
    context_length: int
    position: str = "relative"
    relative_buckets: tuple[int, int] = (32, 128)
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    norm_place: str = "before"
    activation: str = "gelu_tanh"
    gated: bool = True
    bias: str = "none"
    embedding_scale: float = 1.0
    output: str = "untied"
    dropout: float = 0.0

    @property
    def score_scale(self) -> float:
        """What query · key is multiplied by: T5, which has relative positions, leaves the scores as they are."""
        return 1.0 if self.position == "relative" else self.head_dim**-0.5


class TargetCache(Protocol):
    """What the decoder needs of a cache of the keys and values of the target's earlier tokens."""

    @property
    def length(self) -> int:
        """Tokens already in the cache."""
        ...

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, H, T, d] keys and values of a layer; return all of them, [B, H, length + T, d]."""
        ...


def relative_bucket(distance: Tensor, causal: bool, buckets: int, furthest: int) -> Tensor:
    """The number of the learned bias of each distance (key position minus query position).

    Half of the buckets of a direction hold one distance each, the others logarithmically growing ranges; all distances
    from `furthest` on share the last. Without `causal` either direction has half of the buckets. Source: Raffel et al.
    2020 (arXiv:1910.10683), section 2.1.
    """
    if causal:
        offset, distance = torch.zeros_like(distance), (-distance).clamp_min(0)
    else:
        buckets //= 2
        offset, distance = (distance > 0).long() * buckets, distance.abs()
    exact = buckets // 2
    growth = torch.log(distance.clamp_min(1).float() / exact) / math.log(furthest / exact)
    far = (exact + (growth * (buckets - exact)).long()).clamp_max(buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The fixed position vectors of Vaswani et al. 2017, section 3.5: [T] to [T, width], all sines before all cosines."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, device=positions.device).float() / width)
    angles = positions.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()[:, : width // 2]], dim=-1).to(dtype)


def read_once(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """What one scaled query of each row reads: [B, H, 1, d] of keys and values [B, H, S, d].

    Many small products are quicker number by number, position by position, above all where the keys of a position lie
    together.
    """
    key, value = key.permute(2, 0, 1, 3), value.permute(2, 0, 1, 3)
    scores = (key * query[:, :, 0]).sum(-1)
    if mask is not None:
        scores = scores + mask[:, :, 0].permute(2, 0, 1)
    pattern = torch.softmax(scores, dim=0)
    return (pattern[..., None] * value).sum(0)[:, :, None]


class Block(nn.Module):
    """One block: self-attention, in a decoder cross-attention, then the feed-forward network, each with its norm.

    Args:
        config: the model's shape.
        crosses: whether it reads a memory.
        name: what its activations are called, like "decoder.layers.0".
    """

    def __init__(self, config: EncoderDecoderConfig, crosses: bool, name: str):
        super().__init__()
        self.name, self.config = name, config

        def attention() -> Attention:
            return Attention(
                config.embedding_dim, config.num_heads, config.num_heads, config.head_dim, config.bias, None
            )

        def norm() -> nn.Module:
            return norm_layer(config.norm, config.embedding_dim, config.norm_epsilon)

        self.attention, self.attention_norm = attention(), norm()
        self.cross_attention = attention() if crosses else None
        self.cross_attention_norm = norm() if crosses else None
        self.feed_forward = FeedForward(
            config.embedding_dim,
            config.feed_forward_dim,
            config.activation,
            config.gated,
            config.bias == "all",
        )
        self.feed_forward_norm = norm()

    def key_values(self, attention: Attention, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of hidden vectors [B, S, D]: each [B, H, S, d]."""
        return self._heads(attention.key(hidden)), self._heads(attention.value(hidden))

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        causal: bool,
        memory: tuple[Tensor, Tensor] | None,
        memory_mask: Tensor | None,
        cache: tuple[int, TargetCache] | None,
        tap: Tap | None,
    ) -> Tensor:
        """[B, T, D] to [B, T, D].

        Args:
            hidden: the stream.
            mask: additive mask of the self-attention, with the relative bias where there is one.
            causal: whether no position sees a later one.
            memory: keys and values of the cross-attention.
            memory_mask: its additive mask.
            cache: the number of this layer in the cache of the target's earlier tokens, and the cache.
            tap: shown every activation.
        """
        hidden = touch(tap, f"{self.name}.residual_before", hidden)
        normed = self._before(self.attention_norm, hidden)
        key, value = self.key_values(self.attention, normed)
        if cache is not None:
            key, value = cache[1].extend(cache[0], key, value)
        read = self._read(self.attention, normed, (key, value), mask, causal, tap, "attention")
        hidden = self._after(self.attention_norm, hidden, read)
        if self.cross_attention is not None and self.cross_attention_norm is not None and memory is not None:
            hidden = touch(tap, f"{self.name}.residual_cross", hidden)
            normed = self._before(self.cross_attention_norm, hidden)
            read = self._read(
                self.cross_attention, normed, memory, memory_mask, False, tap, "cross_attention"
            )
            hidden = self._after(self.cross_attention_norm, hidden, read)
        hidden = touch(tap, f"{self.name}.residual_middle", hidden)
        normed = self._before(self.feed_forward_norm, hidden)
        written = self.feed_forward(normed, tap, f"{self.name}.feed_forward")
        return touch(tap, f"{self.name}.residual_after", self._after(self.feed_forward_norm, hidden, written))

    def _read(
        self,
        attention: Attention,
        hidden: Tensor,
        memory: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        tap: Tap | None,
        name: str,
    ) -> Tensor:
        """What attention reads of given keys and values: [B, T, D].

        With a k-th of the rows of keys, each of them serves k rows of queries in turn: the beams of one source.
        """
        name = f"{self.name}.{name}"
        key, value = memory
        query = touch(tap, f"{name}.query", self._heads(attention.query(hidden)))
        key, value = touch(tap, f"{name}.key", key), touch(tap, f"{name}.value", value)
        shared = query.shape[0] // key.shape[0]
        if shared > 1:
            query = query.unflatten(0, (-1, shared)).transpose(1, 2).flatten(2, 3)
        if query.requires_grad or tap is not None or query.shape[2] * key.shape[2] > FEW:
            read = attend(query, key, value, mask, causal, tap, name, self.config.score_scale)
        elif query.shape[2] == 1:
            read = read_once(query * self.config.score_scale, key, value, mask)
        else:
            future = additive(Mask().seen(query.shape[2], key.shape[2], query.device), query.dtype)
            mask = future if causal and mask is None else mask
            read = attend_explicitly(query * self.config.score_scale, key, value, mask, None, name)
        if shared > 1:
            read = read.unflatten(2, (shared, -1)).transpose(1, 2).flatten(0, 1)
        read = touch(tap, f"{name}.read", read.transpose(1, 2).flatten(2))
        return touch(tap, f"{name}.output", attention.output(read))

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def _before(self, norm: nn.Module, hidden: Tensor) -> Tensor:
        return norm(hidden) if self.config.norm_place == "before" else hidden

    def _after(self, norm: nn.Module, hidden: Tensor, written: Tensor) -> Tensor:
        summed = hidden + drop(written, self.config.dropout, self.training)
        return summed if self.config.norm_place == "before" else norm(summed)


class Stack(nn.Module):
    """The encoder or the decoder: positions, blocks, and the last norm of a pre-norm stack.

    Args:
        config: the model's shape.
        name: "encoder" or "decoder"; the decoder is causal and reads a memory.
    """

    def __init__(self, config: EncoderDecoderConfig, name: str):
        super().__init__()
        self.name, self.config, self.causal = name, config, name == "decoder"
        count = config.num_decoder_layers if self.causal else config.num_encoder_layers
        relative, learned = config.position == "relative", config.position == "learned"
        self.relative_bias = Embedding(config.relative_buckets[0], config.num_heads) if relative else None
        rows = config.context_length + LEARNED_OFFSET
        self.position_embedding = Embedding(rows, config.embedding_dim) if learned else None
        self.embedding_norm = (
            norm_layer(config.norm, config.embedding_dim, config.norm_epsilon) if learned else None
        )
        self.layers = nn.ModuleList(
            Block(config, self.causal, f"{name}.layers.{index}") for index in range(count)
        )
        last = config.norm_place == "before"
        self.norm = norm_layer(config.norm, config.embedding_dim, config.norm_epsilon) if last else None

    def forward(
        self,
        embedded: Tensor,
        seen: Tensor | None,
        memory: KeyValues | None = None,
        memory_mask: Tensor | None = None,
        cache: TargetCache | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """Embeddings [B, T, D] to hidden vectors [B, T, D].

        Args:
            embedded: of the tokens.
            seen: [B, T], False at padding; None where there is none.
            memory: keys and values of each layer's cross-attention.
            memory_mask: the cross-attention's additive mask.
            cache: of the tokens before these.
            tap: shown every activation.
        """
        start = 0 if cache is None else cache.length
        hidden = touch(tap, f"{self.name}.embedding", self._place(embedded, start))
        hidden = drop(hidden, self.config.dropout, self.training)
        mask = self._mask(hidden, start, seen)
        for index, layer in enumerate(self.layers):
            hidden = layer(
                hidden,
                mask,
                self.causal and start == 0,
                None if memory is None else memory[index],
                memory_mask,
                None if cache is None else (index, cache),
                tap,
            )
        return touch(tap, f"{self.name}.norm", hidden if self.norm is None else self.norm(hidden))

    def _place(self, embedded: Tensor, start: int) -> Tensor:
        """Add the position vectors, where positions have vectors."""
        hidden = embedded * self.config.embedding_scale if self.config.embedding_scale != 1.0 else embedded
        positions = torch.arange(start, start + hidden.shape[1], device=hidden.device)
        if self.config.position == "sinusoidal":
            hidden = hidden + sinusoids(positions, hidden.shape[2], hidden.dtype)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(positions + LEARNED_OFFSET)
        return hidden if self.embedding_norm is None else self.embedding_norm(hidden)

    def _mask(self, hidden: Tensor, start: int, seen: Tensor | None) -> Tensor | None:
        """The additive mask of every self-attention: padding, the future, and the relative bias."""
        queries, keys = hidden.shape[1], start + hidden.shape[1]
        mask = additive(seen[:, None, None, :], hidden.dtype) if seen is not None else None
        if self.causal and queries > 1 and (start > 0 or mask is not None or self.relative_bias is not None):
            future = additive(Mask().seen(queries, keys, hidden.device), hidden.dtype)
            mask = future if mask is None else mask + future
        if self.relative_bias is None:
            return mask
        positions = torch.arange(keys, device=hidden.device)
        distance = positions[None, :] - positions[start:, None]
        bucket = relative_bucket(distance, self.causal, *self.config.relative_buckets)
        bias = self.relative_bias(bucket).permute(2, 0, 1)[None]
        return bias if mask is None else bias + mask


class EncoderDecoder(nn.Module):
    """A sequence-to-sequence model.

    Args:
        config: its shape.
    """

    def __init__(self, config: EncoderDecoderConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.embedding_dim)
        self.encoder = Stack(config, "encoder")
        self.decoder = Stack(config, "decoder")
        untied = config.output == "untied"
        self.head = Linear(config.embedding_dim, config.vocab_size, bias=False) if untied else None
        biased = config.bias == "all"
        self.logit_bias = nn.Parameter(torch.zeros(1, config.vocab_size)) if biased else None

    @property
    def output_weight(self) -> Tensor:
        """The matrix that turns a hidden vector into logits: [vocab_size, D]."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def output_bias(self) -> Tensor | None:
        """What is added to the logits: [vocab_size], or None."""
        return None if self.logit_bias is None else self.logit_bias.flatten()

    def encode(self, tokens: Tensor, mask: Tensor | None = None, *, tap: Tap | None = None) -> Tensor:
        """Read sources: what the decoder remembers of them.

        Args:
            tokens: token ids, int64 [B, S].
            mask: bool [B, S], True at tokens and False at padding; every row has a token. None where nothing is padding.
            tap: shown every named activation, and may replace it.

        Returns:
            [B, S, D]; what stands at padding means nothing.
        """
        return self.encoder(self.embedding(tokens), mask, tap=tap)

    def remember(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values that each decoder layer reads of a memory [B, S, D]: computed once for all steps of decoding."""
        known = [
            layer.key_values(layer.cross_attention, memory)
            for layer in self.decoder.layers
            if isinstance(layer, Block) and layer.cross_attention is not None
        ]
        return (
            known
            if memory.requires_grad
            else [(key.contiguous(), value.contiguous()) for key, value in known]
        )

    def forward(
        self,
        tokens: Tensor,
        *,
        memory: Tensor | KeyValues,
        memory_mask: Tensor | None = None,
        cache: TargetCache | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """The hidden vector after each token of the target.

        Args:
            tokens: target token ids, int64 [B, T], the first of a target being the start token.
            memory: what `encode` returned, [B, S, D], or what `remember` made of it. The latter may have a k-th of the
                rows: each serves k rows of targets in turn.
            memory_mask: the mask that `encode` was given, bool [B, S].
            cache: keys and values of the target's tokens before these; extended by these.
            tap: shown every named activation, and may replace it.

        Returns:
            [B, T, D], ready for `logits`.
        """
        known = self.remember(memory) if isinstance(memory, Tensor) else memory
        embedded = self.embedding(tokens)
        mask = None if memory_mask is None else additive(memory_mask[:, None, None, :], embedded.dtype)
        hidden = self.decoder(embedded, None, known, mask, cache, tap)
        return hidden * self.config.embedding_dim**-0.5 if self.config.output == "scaled" else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden vectors [..., D] to one score per token of the vocabulary, [..., vocab_size]."""
        return functional.linear(hidden, self.output_weight, self.output_bias)


def initialize_sequences(model: EncoderDecoder, seed: int) -> None:
    """Draw fresh weights, float32 on the CPU, so a seed gives the same weights on every device.

    Matrices and embeddings are normal with deviation 1 / sqrt(their width). In a pre-norm model the matrices that write
    to the stream are zero, so that a deep model starts as a shallow one (Zhang et al. 2019, arXiv:1901.09321); in a
    post-norm model that would leave every block without a gradient but one.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    writing = ("attention.output.weight", "feed_forward.down.weight")
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("bias") or name.endswith("relative_bias.weight"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            elif config.norm_place == "before" and name.endswith(writing):
                parameter.zero_()
            else:
                deviation = parameter.shape[1] ** -0.5
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator))
