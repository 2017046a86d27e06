"""The encoder: a Transformer in which every token sees the whole of its document, both ways.

One class covers the layouts of ModernBERT (the native one: Warner et al. 2024, arXiv:2412.13663), BERT (Devlin et al.
2018, arXiv:1810.04805; MiniLM is one) and RoBERTa (Liu et al. 2019, arXiv:1907.11692); what differs between them, and
what is made of the hidden vectors, is a value in the config. Pure torch: tensors in, tensors out. Knows no text, no
files and no training.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from glasshouse.models.attention import Attention, Mask, additive
from glasshouse.models.layers import (
    ACTIVATIONS,
    Embedding,
    FeedForward,
    Linear,
    Tap,
    drop,
    norm_layer,
    rotary_frequencies,
    rotary_table,
    touch,
)

PADDING = -1
"""The number of the document that padding belongs to."""


@dataclass(frozen=True)
class HeadConfig:
    """What is made of the hidden vectors.

    Args:
        kind: "masked" (scores for the token under each mask), "sequence" (scores for the labels of the whole text),
            "token" (for the labels of each token), "span" (for each token to be the first or the last of an answer),
            "pooler" (BERT's vector of the whole text) or "none".
        labels: names of the labels, in the order of their scores; for "sequence" and "token".
        pooling: what "sequence" reads: the "first" token, or the "mean" of all (ModernBERT only).
    """

    kind: str = "masked"
    labels: tuple[str, ...] = ()
    pooling: str = "first"

    @property
    def outputs(self) -> int:
        """Scores of each vector beside those of tokens: one a label, or those of an answer's two ends."""
        return 2 if self.kind == "span" else len(self.labels)


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder.

    Args:
        vocab_size: number of tokens.
        embedding_dim: width of the residual stream.
        num_layers: number of blocks.
        num_heads: attention heads; they share the width evenly.
        feed_forward_dim: width inside the feed-forward network.
        context_length: most positions the model was made for.
        position: "rotary" or "learned".
        position_offset: rows of the table of learned positions that come before position 0 (RoBERTa: 2).
        rope_theta: base of the rotary frequencies in the layers that see the whole document.
        local_rope_theta: base of those in the layers that see its neighbourhood only.
        local_window: how far, to either side, a local layer sees; None where there is none.
        global_every: each so manieth layer, from the first on, sees the whole document; the others are local.
        token_types: how many parts of a text (question, passage) have an embedding of their own; 0 for none.
        norm_place: "before" each half of a block, with one more at the end, or "after" (post-norm).
        norm_epsilon: epsilon of the norms.
        activation: a key of `layers.ACTIVATIONS`.
        gated: whether the feed-forward network has a gate.
        bias: "none" or "all": whether matrices and norms have biases.
        dropout: probability of dropping an activation of the residual stream in training.
        head: what is made of the hidden vectors.
    """

    vocab_size: int
    embedding_dim: int
    num_layers: int
    num_heads: int
    feed_forward_dim: int
    context_length: int
    position: str = "rotary"
    position_offset: int = 0
    rope_theta: float = 160_000.0
    local_rope_theta: float = 10_000.0
    local_window: int | None = 64
    global_every: int = 3
    token_types: int = 0
    norm_place: str = "before"
    norm_epsilon: float = 1e-5
    activation: str = "gelu"
    gated: bool = True
    bias: str = "none"
    dropout: float = 0.0
    head: HeadConfig = HeadConfig()

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.embedding_dim // self.num_heads

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees only the neighbourhood of each token."""
        return self.local_window is not None and layer % self.global_every != 0


Sight = tuple[tuple[Tensor, Tensor] | None, Tensor | None]
"""What a layer is told of positions: the rotary table, and the additive mask; None for neither."""


class EncoderLayer(nn.Module):
    """One block: attention, then the feed-forward network, each added to the stream and normed before or after.

    Args:
        config: the encoder's shape.
        index: number of the layer, from 0.
    """

    def __init__(self, config: EncoderConfig, index: int):
        super().__init__()
        self.index, self.dropout = index, config.dropout
        self.norm_first = config.norm_place == "before"
        biased = config.bias == "all"
        # ModernBERT's first block reads the embedding's norm; a second one would do nothing
        normed = not (self.norm_first and index == 0)
        width, epsilon = config.embedding_dim, config.norm_epsilon
        self.attention_norm = norm_layer("layer", width, epsilon, biased) if normed else None
        self.attention = Attention(
            width, config.num_heads, config.num_heads, config.head_dim, config.bias, None
        )
        self.feed_forward_norm = norm_layer("layer", width, epsilon, biased)
        self.feed_forward = FeedForward(
            width, config.feed_forward_dim, config.activation, config.gated, biased
        )

    def forward(self, hidden: Tensor, sight: Sight, tap: Tap | None = None) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        index = 0 if tap is None else self.index
        name = "" if tap is None else f"layers.{index}"
        hidden = touch(tap, f"{name}.residual_before", hidden)
        normed = hidden if self.attention_norm is None or not self.norm_first else self.attention_norm(hidden)
        read = self.attention(normed, *sight, False, None, index, tap)
        hidden = self._add(hidden, read, self.attention_norm)
        hidden = touch(tap, f"{name}.residual_middle", hidden)
        normed = self.feed_forward_norm(hidden) if self.norm_first else hidden
        written = self.feed_forward(normed, tap, f"{name}.feed_forward")
        return touch(tap, f"{name}.residual_after", self._add(hidden, written, self.feed_forward_norm))

    def _add(self, hidden: Tensor, change: Tensor, norm: nn.Module | None) -> Tensor:
        hidden = hidden + drop(change, self.dropout, self.training)
        return hidden if self.norm_first or norm is None else norm(hidden)


class Head(nn.Module):
    """What turns hidden vectors into scores; which of its parts there are depends on the layout and the kind.

    Args:
        config: the encoder's shape.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        head, width, modern = config.head, config.embedding_dim, config.norm_place == "before"
        biased = config.bias == "all"
        squashed = head.kind in ("sequence", "pooler") and not modern
        self.activation = torch.tanh if squashed else ACTIVATIONS[config.activation]
        dense = modern or head.kind in ("masked", "sequence", "pooler")
        self.dense = Linear(width, width, bias=biased) if dense else None
        normed = modern or head.kind == "masked"
        self.norm = norm_layer("layer", width, config.norm_epsilon, biased) if normed else None
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if head.kind == "masked" else None
        self.output = Linear(width, head.outputs) if head.outputs else None

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., D]: what the scores, or the vector of the text, are made of."""
        if self.dense is not None:
            hidden = self.activation(self.dense(hidden))
        return hidden if self.norm is None else self.norm(hidden)


class Encoder(nn.Module):
    """A model that reads.

    Args:
        config: its shape.
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        width = config.embedding_dim
        biased, epsilon = config.bias == "all", config.norm_epsilon
        self.embedding = Embedding(config.vocab_size, width)
        rows = config.context_length + config.position_offset
        self.position_embedding = Embedding(rows, width) if config.position == "learned" else None
        self.token_type_embedding = Embedding(config.token_types, width) if config.token_types else None
        self.embedding_norm = norm_layer("layer", width, epsilon, biased)
        self.layers = nn.ModuleList(EncoderLayer(config, index) for index in range(config.num_layers))
        self.norm = norm_layer("layer", width, epsilon, biased) if config.norm_place == "before" else None
        self.head = None if config.head.kind == "none" else Head(config)

    @property
    def output_weight(self) -> Tensor:
        """The matrix that turns what the head makes of a hidden vector into scores of tokens: [vocab_size, D]."""
        return self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        token_types: Tensor | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """The hidden vector of each token.

        Args:
            tokens: token ids, int64 [B, T].
            mask: bool [B, T], False where there is only padding, at the end of a row: no token sees it.
            positions: position of each token in its document, [B, T]; 0, 1, ... when None.
            documents: number of the document of each token, [B, T], none negative: tokens see only their own document.
            token_types: which part of the text each token belongs to, [B, T]; all to part 0 when None.
            tap: shown every named activation, and may replace it.

        Returns:
            [B, T, D]; those of padding mean nothing.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        hidden = self.embedding(tokens)
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(positions + self.config.position_offset)
        if self.token_type_embedding is not None:
            hidden = hidden + self.token_type_embedding(
                torch.zeros_like(tokens) if token_types is None else token_types
            )
        hidden = drop(self.embedding_norm(hidden), self.config.dropout, self.training)
        hidden = touch(tap, "embedding", hidden)
        sights = self._sights(positions, _borders(mask, documents), hidden)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, sights[self.config.is_local(index)], tap)
        return hidden if self.norm is None else touch(tap, "norm", self.norm(hidden))

    def logits(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Hidden vectors [B, T, D] to the head's scores.

        Args:
            hidden: what `forward` gave.
            mask: as in `forward`; used where the head reads the mean of all tokens.

        Returns:
            "masked": [B, T, vocab_size]; "token": [B, T, labels]; "span": [B, T, 2]; "sequence": [B, labels];
            "pooler": the vector of the text, [B, D]; "none": `hidden`.
        """
        if self.head is None:
            return hidden
        if self.config.head.kind in ("sequence", "pooler"):
            hidden = hidden[:, 0] if self.config.head.pooling == "first" else mean_of_tokens(hidden, mask)
        made = self.head(hidden)
        if self.head.bias is not None:
            return functional.linear(made, self.output_weight, self.head.bias)
        return made if self.head.output is None else self.head.output(made)

    def masked(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What scores of hidden tokens are made of: hidden vectors [N, D] to [N, D], which `output_weight` multiplies,
        and the bias that is added, [vocab_size].

        Raises:
            ValueError: the head is another one.
        """
        if self.head is None or self.head.bias is None:
            raise ValueError(f"a {self.config.head.kind!r} head gives no scores of tokens")
        return self.head(hidden), self.head.bias

    def _sights(self, positions: Tensor, documents: Tensor | None, hidden: Tensor) -> tuple[Sight, Sight]:
        """What the layers see that see everything, and what the local ones see."""
        config = self.config
        everything = self._sight(positions, documents, hidden, config.rope_theta, None)
        if config.local_window is None:
            return everything, everything
        return everything, self._sight(
            positions, documents, hidden, config.local_rope_theta, config.local_window + 1
        )

    def _sight(
        self, positions: Tensor, documents: Tensor | None, hidden: Tensor, theta: float, window: int | None
    ) -> Sight:
        rotary = None
        if self.config.position == "rotary":
            frequencies = rotary_frequencies(self.config.head_dim, theta, None).to(positions.device)
            rotary = rotary_table(positions, frequencies, hidden.dtype)
        length, mask = hidden.shape[1], Mask(False, window, documents)
        if mask.is_plain(length, length):
            return rotary, None
        return rotary, additive(mask.seen(length, length, hidden.device), hidden.dtype)


def _borders(mask: Tensor | None, documents: Tensor | None) -> Tensor | None:
    """Documents with padding as one of its own, which sees itself, so that no row of scores is empty."""
    if mask is None:
        return documents
    numbers = torch.zeros_like(mask, dtype=torch.int64) if documents is None else documents
    return numbers.masked_fill(~mask, PADDING)


def mean_of_tokens(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the vectors of a text, padding left out: [B, T, D] and bool [B, T] to [B, D]."""
    if mask is None:
        return hidden.mean(dim=1)
    weight = mask[:, :, None].to(hidden.dtype)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)


def with_head(model: Encoder, head: HeadConfig, seed: int) -> Encoder:
    """The same encoder with another head: the body's weights are shared, not copied; those that the new head alone has
    are drawn with deviation 0.02.

    ModernBERT's head keeps what comes before its scores, and so does BERT's that makes one vector of the text.
    """
    if head == model.config.head:
        return model
    with torch.device("meta"):
        changed = Encoder(replace(model.config, head=head))
    kinds, pooled = {head.kind, model.config.head.kind}, {"sequence", "pooler"}
    kept = ("head.dense.", "head.norm.") if model.config.norm_place == "before" or kinds <= pooled else ()
    generator = torch.Generator().manual_seed(seed)
    known, weight, state = model.state_dict(), model.embedding.weight, {}
    for name, parameter in changed.state_dict().items():
        if name in known and (not name.startswith("head.") or name.startswith(kept)):
            state[name] = known[name]
            continue
        drawn = torch.zeros(parameter.shape)
        if parameter.dim() == 2:
            drawn.normal_(0.0, 0.02, generator=generator)
        elif name == "head.norm.weight":
            drawn.fill_(1.0)
        state[name] = drawn.to(weight.device, weight.dtype)
    changed.load_state_dict(state, assign=True)
    return changed.train(model.training)
