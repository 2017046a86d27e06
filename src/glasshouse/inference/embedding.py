"""Texts as vectors: the mean of a model's last hidden vectors, of length one, so that a dot product compares texts.

For an encoder that was trained for it (MiniLM and its like: Reimers and Gurevych 2019, arXiv:1908.10084) that is the
published recipe. For a decoder and for the encoder of an encoder-decoder it is what their hidden vectors happen to tell:
usable for near-duplicates and rough search, not trained for meaning. Knows artifacts; nothing of servers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from glasshouse.artifact import Artifact
from glasshouse.errors import InputError
from glasshouse.models.decoder import Decoder
from glasshouse.models.encoder import Encoder, mean_of_tokens
from glasshouse.models.huggingface import Model
from glasshouse.text.reading import read_text

BATCH_TOKENS = 8192
"""Tokens read at once, padding included."""


@torch.inference_mode()
def embed(model: Model, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean of the hidden vectors of each row's tokens, scaled to length one.

    Args:
        model: of any family, in evaluation mode.
        tokens: token ids, int64 [B, T].
        mask: bool [B, T], False at padding, which stands at the end of a row; None where there is none.

    Returns:
        float32 [B, D].
    """
    if isinstance(model, Encoder):
        hidden = model(tokens, mask=mask)
    elif isinstance(model, Decoder):
        hidden = model(tokens)  # no token sees the padding after it
    else:
        hidden = model.encode(tokens, mask)
    return functional.normalize(mean_of_tokens(hidden.float(), mask), dim=-1)


def embed_texts(artifact: Artifact, texts: Sequence[str]) -> Tensor:
    """One vector per text, with the begin and end tokens that the tokenizer's file asks for; no text is cut.

    Args:
        artifact: the model.
        texts: any strings; what spells a special token is read as plain text.

    Returns:
        float32 [N, D] on the CPU, each of length one: the dot product of two is their cosine.

    Raises:
        InputError: a text is longer than the model reads, or the vectors are not finite.
    """
    empty = [artifact.tokenizer.end_of_document]  # a text in which a tokenizer sees nothing at all
    return embed_tokens(artifact.model, [read_text(artifact.tokenizer, text).ids or empty for text in texts])


def embed_tokens(model: Model, texts: Sequence[Sequence[int]]) -> Tensor:
    """One vector per text given as token ids; texts of like length are read together.

    Raises:
        InputError: a text has no token, one that the model does not know, or more than it reads; or the vectors are not
            finite.
    """
    for number, text in enumerate(texts):
        _require_readable(model, text, number)
    result = torch.zeros(len(texts), model.config.embedding_dim)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    for numbers in _batches(order, [len(text) for text in texts]):
        longest = len(texts[numbers[-1]])
        padded = [[*texts[number], *[0] * (longest - len(texts[number]))] for number in numbers]
        lengths = torch.tensor([len(texts[number]) for number in numbers])
        mask = torch.arange(longest)[None] < lengths[:, None]
        device = model.output_weight.device
        seen = None if bool(mask.all()) else mask.to(device)
        result[numbers] = embed(model, torch.tensor(padded, device=device), seen).cpu()
    if not torch.isfinite(result).all():
        raise InputError(
            "the vectors are not finite numbers", "model", "its weights are damaged or training diverged"
        )
    return result


def _require_readable(model: Model, text: Sequence[int], number: int) -> None:
    if not 0 < len(text) <= model.config.context_length:
        raise InputError(
            f"text {number} has {len(text):,} tokens and the model reads 1 to {model.config.context_length:,}",
            "input", "split it into shorter texts",
        )  # fmt: skip
    if min(text) < 0 or max(text) >= model.config.vocab_size:
        raise InputError(
            f"text {number} has a token outside the vocabulary of {model.config.vocab_size:,}", "input",
            "use the model's tokenizer",
        )  # fmt: skip


def _batches(order: list[int], lengths: list[int]) -> list[list[int]]:
    """Texts in order of length, cut where a batch padded to its longest would be too large."""
    batches: list[list[int]] = []
    for number in order:
        if batches and (len(batches[-1]) + 1) * lengths[number] <= BATCH_TOKENS:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
