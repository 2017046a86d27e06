"""The same prompts through two models: how far apart are their logits, and where would another token have come?

An export is right when this says so, not when it was written without an error. Knows what the model says; how the exported
one is made to say it is the caller's business.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glasshouse.artifact import Artifact
from glasshouse.errors import InputError
from glasshouse.inference.engine import Engine
from glasshouse.inference.request import Request
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.models.decoder import Decoder
from glasshouse.models.encoder import Encoder
from glasshouse.models.encoder_decoder import EncoderDecoder
from glasshouse.models.huggingface import Model
from glasshouse.text.tokenizer import Tokenizer

PROMPTS = (
    "",
    "Once upon a time",
    "The capital of France is Paris. It's 2026, and 1234567 people",
    "Жили-были старик со старухой. नमस्ते दुनिया।",
    "从前有一座山，山上有座庙。 👩‍👩‍👧 é",
    "def add(left, right):\n    return left + right\n\n\t  # two  spaces",
)
"""What every export replays: scripts, joined characters, digits, code and white space."""
CONTINUED = 16
"""Tokens that a decoder continues each prompt with before it is replayed."""
TARGET = 16
"""Tokens of a prompt that an encoder-decoder is given as the target, too."""


def replayed_texts(artifact: Artifact, context: int) -> list[list[int]]:
    """The prompts as tokens, those of a decoder with its own likeliest continuation.

    Args:
        artifact: the model, in float32.
        context: the longest text that the exported model reads.
    """
    model, tokenizer = artifact.model, artifact.tokenizer
    texts = [(tokenizer.prompt(prompt) or [tokenizer.end_of_document])[:context] for prompt in PROMPTS]
    if not isinstance(model, Decoder) or context < 2:
        return texts
    texts = [tokens[: max(1, context - CONTINUED)] for tokens in texts]
    config = GenerationConfig(temperature=0.0, max_new_tokens=CONTINUED)
    answers = Engine(model, tokenizer).complete([Request(tuple(tokens), config) for tokens in texts])
    continued = zip(texts, answers, strict=True)
    return [[*tokens, *(token.id for token in answer)][:context] for tokens, answer in continued]


def target_of(tokens: Sequence[int]) -> list[int]:
    """The target that an encoder-decoder is replayed with; any would do."""
    return [tokens[-1], *tokens[: TARGET - 1]]


@torch.inference_mode()
def read_rows(model: Model, tokens: Sequence[int]) -> Tensor:
    """All that a model says of a text, as rows to compare, float32.

    Args:
        model: of any family.
        tokens: token ids; an encoder-decoder reads them as the source, and `target_of` them as the target.

    Returns:
        Logits, [T, vocab_size], of what predicts tokens. Of other encoders `encoder_rows` of their vectors and scores.
    """
    given = torch.tensor([list(tokens)])
    if isinstance(model, Decoder):
        return model.logits(model(given))[0].float()
    if isinstance(model, EncoderDecoder):
        target = torch.tensor([target_of(tokens)])
        return model.logits(model(target, memory=model.encode(given)))[0].float()
    hidden = model(given)
    return encoder_rows(hidden[0], None if model.head is None else model.logits(hidden)[0])


def encoder_rows(hidden: Tensor, scores: Tensor | None) -> Tensor:
    """Hidden vectors [T, D] and what the head made of them, side by side.

    Args:
        hidden: one for each token.
        scores: of each token, [T, N], or of the whole text, [N], which stand beside the first vector alone.
    """
    if scores is None:
        return hidden.float()
    if scores.dim() == 1:
        hidden, scores = hidden[:1], scores[None]
    return torch.cat([hidden, scores], dim=-1).float()


def predicts_tokens(model: Model) -> bool:
    """Whether the rows of a model are logits over its vocabulary."""
    return not isinstance(model, Encoder)


@dataclass(frozen=True)
class Comparison:
    """What a replay found.

    Args:
        prompts: how many prompts were read.
        tokens: positions compared, over all prompts.
        largest: the largest difference between two logits of the same token.
        typical: the root of the mean square of all the differences.
        spread: the standard deviation of the logits over the vocabulary, to compare them with.
        divergence: mean Kullback-Leibler divergence of the exported model's distribution from the model's, in nats; None
            where the rows are no distributions over tokens.
        disagreements: positions where the likeliest token is another one.
        first: the first of them, in words; empty when there is none.
    """

    prompts: int
    tokens: int
    largest: float
    typical: float
    spread: float
    divergence: float | None
    disagreements: int
    first: str

    def lines(self, what: str) -> list[str]:
        """What a person is told."""
        compared = f"replayed {self.prompts} prompts through {what}: {self.tokens:,} positions compared"
        distance = f"largest difference {self.largest:.3g}, typical {self.typical:.2g} (own spread {self.spread:.3g})"
        if self.divergence is None:
            return [compared, f"vectors and scores: {distance}"]
        nats = f"; {self.divergence:.2g} nats from the model"
        return [compared, f"logits: {distance}{nats}", self.first or "every likeliest token is the same"]

    def facts(self) -> dict[str, Any]:
        """The same as a table."""
        return dict(vars(self))


def compare_rows(
    texts: Sequence[Sequence[int]],
    expected: Sequence[Tensor],
    exported: Callable[[list[int]], Tensor],
    tokenizer: Tokenizer | None,
) -> Comparison:
    """Compare two models on the same tokens.

    Args:
        texts: token ids, one list for each prompt.
        expected: the model's rows for each, float32 [T, N].
        exported: gives the exported model's, of the same shape.
        tokenizer: spells tokens; None where the rows are not logits over its tokens.
    """
    largest, errors, squares, divergence, count, wrong, first = 0.0, 0.0, 0.0, 0.0, 0, 0, ""
    for number, (tokens, ours) in enumerate(zip(texts, expected, strict=True)):
        theirs = exported(list(tokens)).float()
        difference = (theirs - ours).nan_to_num(float("inf")).abs()
        largest = max(largest, float(difference.max()))
        errors += float(difference.square().mean(-1).sum())
        squares += float(ours.std(-1).square().sum())
        count += len(ours)
        if tokenizer is None:
            continue
        logs, others = ours.log_softmax(-1), theirs.log_softmax(-1)
        divergence += float((logs.exp() * (logs - others)).sum())
        places = (ours.argmax(-1) != theirs.argmax(-1)).nonzero().flatten().tolist()
        if places and not first:
            first = _difference(number, places[0], ours, theirs, tokenizer)
        wrong += len(places)
    typical, spread = (errors / count) ** 0.5, (squares / count) ** 0.5
    nats = None if tokenizer is None else divergence / count
    return Comparison(len(texts), count, largest, typical, spread, nats, wrong, first)


def _difference(number: int, place: int, ours: Tensor, theirs: Tensor, tokenizer: Tokenizer) -> str:
    left, right = int(ours[place].argmax()), int(theirs[place].argmax())
    margin = float(ours[place, left] - ours[place, right])
    said, instead = (_spell(tokenizer, token) for token in (left, right))
    return (
        f"first differing token: after token {place + 1} of prompt {number + 1} it says {instead} instead of {said}, "
        f"which the model prefers by {margin:.3g}"
    )


def _spell(tokenizer: Tokenizer, token: int) -> str:
    return repr(
        tokenizer.decode([token], keep_special=True) if token < tokenizer.vocab_size else f"[{token}]"
    )


def require_close(comparison: Comparison, limit: float, what: str) -> None:
    """Refuse an export that says something else than the model.

    Args:
        comparison: what the replay found.
        limit: the typical logit difference allowed, as a share of the logits' spread.
        what: the export, in words.

    Raises:
        InputError: it is further away.
    """
    allowed = limit * max(comparison.spread, torch.finfo(torch.float32).eps)
    if not comparison.typical <= allowed:
        first = f"; {comparison.first}" if comparison.first else ""
        raise InputError(
            f"{what} differs from the model: typically by {comparison.typical:.3g}, {allowed:.3g} allowed{first}",
            "export",
            "choose a finer --type, or allow more with --limit; nothing was written",
        )
