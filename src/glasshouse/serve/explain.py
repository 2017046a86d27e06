"""Why a text says what it says: for each token its odds, and for one position the lens and the attention.

The text may be finished or still being written: it is read again in one forward pass, which is exact, because a
decoder's odds do not depend on what comes later. Knows models and texts; of the server only its models by name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fastapi import APIRouter
from pydantic import Field, model_validator
from torch import Tensor

from glasshouse.artifact import Artifact
from glasshouse.errors import InputError
from glasshouse.interpret.attention import is_pattern, position_keeper, stack_layers
from glasshouse.interpret.lens import is_stream, lens_logits, likeliest_by_layer
from glasshouse.interpret.record import Recording, record
from glasshouse.models.decoder import Decoder
from glasshouse.serve.completions import plain_messages
from glasshouse.serve.schema import LONGEST_TEXT, MOST_MESSAGES, MOST_TOKENS, Fields, Message, TokenId
from glasshouse.text.tokenizer import Tokenizer

ROWS = 256
"""Positions whose odds are computed at once: a large vocabulary times a long text would not fit in memory."""
MOST_ALTERNATIVES = 50
LENS_TOKENS = 5
"""Tokens shown of each layer."""


class ExplainRequest(Fields):
    """What to explain: exactly one of `token_ids`, `prompt` and `messages`, and how deeply."""

    model: str = Field(max_length=1000, description="Name of the model.")
    token_ids: list[TokenId] | None = Field(
        None, max_length=MOST_TOKENS, description="The text as token ids."
    )
    prompt: str | None = Field(None, max_length=LONGEST_TEXT, description="The text.")
    messages: list[Message] | None = Field(
        None, max_length=MOST_MESSAGES, description="A conversation, rendered with the model's own template."
    )
    alternatives: int = Field(
        5, ge=0, le=MOST_ALTERNATIVES, description="Likeliest tokens shown beside each."
    )
    position: int | None = Field(
        None,
        ge=0,
        description="The last token that was read when the next one was chosen: for lens and attention.",
    )
    lens: bool = Field(False, description="What each layer would have said comes after the position.")
    attention: bool = Field(
        False, description="What the position reads of each earlier one, by layer and head."
    )

    @model_validator(mode="after")
    def _one_text(self) -> "ExplainRequest":
        if sum(text is not None for text in (self.token_ids, self.prompt, self.messages)) != 1:
            raise ValueError("give exactly one of token_ids, prompt and messages")
        return self


def explain_routes(find: Callable[[str], Artifact]) -> APIRouter:
    """The route POST /v1/explain.

    Args:
        find: the opened model of a name; raises what the server answers where there is none.
    """
    router = APIRouter()

    @router.post("/v1/explain")
    def explain_text(request: ExplainRequest) -> dict[str, Any]:
        artifact = find(request.model)
        tokens = request_tokens(artifact.tokenizer, request)
        return {"object": "explanation", "model": request.model} | explain(
            artifact,
            tokens,
            alternatives=request.alternatives,
            position=request.position,
            lens=request.lens,
            attention=request.attention,
        )

    return router


def request_tokens(tokenizer: Tokenizer, request: ExplainRequest) -> list[int]:
    """The token ids of a request's text, as the model reads it."""
    if request.token_ids is not None:
        return request.token_ids
    if request.messages is not None:
        return tokenizer.encode_chat(plain_messages(request.messages), add_generation_prompt=False)
    return tokenizer.prompt(request.prompt or "")


@torch.inference_mode()
def explain(
    artifact: Artifact,
    tokens: Sequence[int],
    *,
    alternatives: int = 5,
    position: int | None = None,
    lens: bool = False,
    attention: bool = False,
) -> dict[str, Any]:
    """The odds of each token of a text, and what went on inside the model at one position.

    Args:
        artifact: a decoder and its tokenizer.
        tokens: the text's ids.
        alternatives: how many of the likeliest tokens to show beside each.
        position: the last token that was read when the next one was chosen (the choice of token i was made at
            position i - 1); the last of the text when None.
        lens: add what each layer would have said comes after `position`.
        attention: add what `position` reads of each position up to itself.

    Returns:
        `tokens`: of each its id, text (joined they are the text, so one that ends inside a character may be empty),
        whether it is special, its probability, rank (from 1), entropy in nats and alternatives; the first token
        has no odds (None), because nothing comes before it. `lens`: per layer, from the embedding (0) on, the
        likeliest tokens. `attention`: [layer][head][position + 1 weights], each row summing to 1. Those not asked
        for are None.

    Raises:
        InputError: the model is no decoder, or the text is empty, too long, or not of its vocabulary.
    """
    model = artifact.model
    if not isinstance(model, Decoder):
        raise InputError("this model does not continue text", "model", "explain a decoder")
    _require_readable(artifact, tokens, position, alternatives)
    place = len(tokens) - 1 if position is None else position
    row = torch.tensor(tokens, device=model.output_weight.device)
    recording = _read(model, row, place, lens, attention)
    return {
        "tokens": _token_odds(model, artifact.tokenizer, recording.hidden[0], row, alternatives),
        "position": place if lens or attention else None,
        "lens": _lens(model, artifact.tokenizer, recording) if lens else None,
        "attention": _attention(recording, place) if attention else None,
    }


def _require_readable(
    artifact: Artifact, tokens: Sequence[int], position: int | None, alternatives: int
) -> None:
    vocabulary, room = artifact.tokenizer.vocab_size, artifact.config.context_length
    if not tokens:
        raise InputError("the text is empty", "token_ids", "give at least one token")
    if len(tokens) > room:
        raise InputError(
            f"{len(tokens):,} tokens where the model reads at most {room:,}", "token_ids", "cut it"
        )
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise InputError("not all ids are tokens of the model", "token_ids", f"give 0 to {vocabulary - 1}")
    if position is not None and not 0 <= position < len(tokens):
        raise InputError(f"position is {position}", "position", f"give 0 to {len(tokens) - 1}")
    if not 0 <= alternatives <= MOST_ALTERNATIVES:
        raise InputError(f"alternatives is {alternatives}", "alternatives", f"give 0 to {MOST_ALTERNATIVES}")


def _read(model: Decoder, row: Tensor, position: int, lens: bool, attention: bool) -> Recording:
    """One forward pass; recorded only where something is to be seen, because fused attention is faster."""
    if not lens and not attention:
        return Recording(model(row[None]), {})
    return record(
        model,
        row[None],
        lambda name: (lens and is_stream(name)) or (attention and is_pattern(name)),
        keep=position_keeper(position),
    )


def _token_odds(
    model: Decoder, tokenizer: Tokenizer, hidden: Tensor, row: Tensor, alternatives: int
) -> list[dict[str, Any]]:
    """Text and odds of each token: hidden [T, D], row [T]."""
    ids = row.tolist()
    odds: list[dict[str, Any]] = [
        {"probability": None, "rank": None, "entropy": None, "alternatives": []},
    ]
    for start in range(0, len(ids) - 1, ROWS):
        end = min(start + ROWS, len(ids) - 1)
        logits = model.logits(hidden[start:end])[:, : tokenizer.vocab_size].float()
        odds += _odds(logits, row[start + 1 : end + 1], tokenizer, alternatives)
    texts = token_texts(tokenizer, ids)
    return [
        {"id": token, "text": text, "special": tokenizer.is_special(token)} | facts
        for token, text, facts in zip(ids, texts, odds, strict=True)
    ]


def _odds(logits: Tensor, chosen: Tensor, tokenizer: Tokenizer, alternatives: int) -> list[dict[str, Any]]:
    """Odds of the chosen tokens [T] under softmax(logits [T, vocab_size])."""
    logs = logits.log_softmax(-1)
    mine = logs.gather(-1, chosen[:, None])
    chances = logs.exp()
    ranks = (logs > mine).sum(-1) + 1
    entropies = -(chances * logs).nan_to_num(0.0).sum(-1)  # 0 · log 0 is 0
    top = chances.topk(min(alternatives, logits.shape[-1]))
    columns = (mine[:, 0].exp(), ranks, entropies, top.indices, top.values)
    return [
        {
            "probability": probability,
            "rank": rank,
            "entropy": entropy,
            "alternatives": _likely(tokenizer, likely, likelihoods),
        }
        for probability, rank, entropy, likely, likelihoods in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]


def _likely(tokenizer: Tokenizer, ids: Sequence[int], chances: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {
            "id": token,
            "text": tokenizer.decode([token], keep_special=True),
            "special": tokenizer.is_special(token),
            "probability": chance,
        }
        for token, chance in zip(ids, chances, strict=True)
    ]


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text of each token, special ones spelled out; joined they are the whole text.

    A token that ends inside a character has the text up to there, maybe none, and the one that completes the
    character has all of it.
    """
    stream = tokenizer.decode_stream(keep_special=True)
    texts = [stream.step(token) for token in tokens]
    if texts:
        texts[-1] += stream.flush()
    return texts


def _lens(model: Decoder, tokenizer: Tokenizer, recording: Recording) -> list[dict[str, Any]]:
    logits = lens_logits(model, stack_layers(recording, is_stream))[:, : tokenizer.vocab_size]
    return [
        {"layer": layer.layer, "top": _likely(tokenizer, layer.ids, layer.probabilities)}
        for layer in likeliest_by_layer(logits, LENS_TOKENS)
    ]


def _attention(recording: Recording, position: int) -> list[list[list[float]]]:
    patterns = stack_layers(recording, is_pattern)[..., : position + 1].float().cpu()
    # Five decimals are more than a page shows, and a third of the bytes.
    return [[[round(weight, 5) for weight in head] for head in layer] for layer in patterns.tolist()]
