"""The only path by which anything generates: a prompt's tokens in, tokens with their text and their odds out.

The prompt is read once into the cache, then one token at a time is chosen, shown and read. Knows models and
tokenizers; nothing of files, terminals or servers.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.inference.cache import ContiguousCache
from glasshouse.inference.sampling import GenerationConfig, LogitRule, apply_rules, choose, logit_rules
from glasshouse.models.decoder import Decoder
from glasshouse.text.tokenizer import Tokenizer


class Alternative(NamedTuple):
    """A token that might have come: its id, its text, and its probability under the model itself."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Token:
    """One generated token.

    Args:
        id: its number.
        text: the text that became certain with it: never half a character, nothing of a stop string; may be empty, and
            may hold text of earlier tokens. All texts joined are the answer.
        probability: of this token under the model itself: temperature 1, no rule applied.
        rank: its place among all tokens by that probability, from 1.
        entropy: of that distribution, in nats.
        alternatives: the likeliest tokens, as many as were asked for.
        finish: why this is the last token: "end" (the model closed the document), "stop" (a stop string) or "length"
            (max_new_tokens or the model's context is used up); empty while there are more.
    """

    id: int
    text: str
    probability: float
    rank: int
    entropy: float
    alternatives: tuple[Alternative, ...] = ()
    finish: str = ""


class StopFilter:
    """Text that arrives in pieces, held back while it might turn out to be part of a stop string.

    Args:
        stops: the strings to end before; none of them empty.
    """

    def __init__(self, stops: Collection[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that is now certain to belong to the answer; sets `stopped` when a stop string is complete."""
        held = self._held + piece
        places = [place for place in (held.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return held[: min(places)]
        certain = len(held) - max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[certain:]
        return held[:certain]

    def flush(self) -> str:
        """What is still held, when nothing more will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    config: GenerationConfig,
    *,
    alternatives: int = 0,
    end_tokens: Collection[int] = (),
) -> Iterator[Token]:
    """Continue a prompt, one token at a time.

    Args:
        model: a decoder in evaluation mode.
        tokenizer: the one it was trained with.
        prompt: token ids; empty for the start of a document.
        config: how tokens are drawn, and when to stop.
        alternatives: how many of the likeliest tokens to show beside each token.
        end_tokens: tokens that end the answer, besides the tokenizer's end_of_document.

    Returns:
        An iterator of tokens; the last one says why it is the last. Leaving it early costs nothing.

    Raises:
        InputError: the prompt leaves no room in the model's context, or holds an id that is no token; while
            iterating, the model's logits are not finite.
    """
    start = list(prompt) or [tokenizer.end_of_document]
    room = model.config.context_length - len(start)
    if room < 1:
        raise InputError(
            f"the prompt has {len(start):,} tokens and the model reads at most {model.config.context_length:,}, "
            "the new ones included", "prompt", "shorten the prompt",
        )  # fmt: skip
    if min(start) < 0 or max(start) >= model.config.vocab_size:
        raise InputError(
            f"token {max(start)} in a vocabulary of {model.config.vocab_size:,}",
            "prompt",
            "use the model's tokenizer",
        )
    decoding = _Decoding(model, tokenizer, start, config, alternatives)
    return _tokens(decoding, {tokenizer.end_of_document, *end_tokens})


def _tokens(decoding: "_Decoding", ends: set[int]) -> Iterator[Token]:
    """Tokens with their text, up to the end."""
    stream, stop_filter = decoding.tokenizer.decode_stream(), StopFilter(decoding.config.stop)
    while True:
        token, probability, rank, entropy, likeliest = decoding.step()
        text = stop_filter.push(stream.step(token))
        finish = (
            "stop"
            if stop_filter.stopped
            else "end"
            if token in ends
            else "length"
            if decoding.is_full
            else ""
        )
        if finish in ("end", "length"):
            text += stop_filter.push(stream.flush())
            text += stop_filter.flush()
        yield Token(token, text, probability, rank, entropy, likeliest, finish)
        if finish:
            return


class _Decoding:
    """A prompt being continued: what was read, and the choice of the next token."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        start: list[int],
        config: GenerationConfig,
        alternatives: int,
    ):
        self.model, self.tokenizer, self.config, self.alternatives = model, tokenizer, config, alternatives
        self.rules: list[LogitRule] = logit_rules(config, len(start))
        self.generator = torch.Generator().manual_seed(config.seed)
        # Room for the whole text at once: nothing is joined or copied from step to step.
        room = min(len(start) + config.max_new_tokens, model.config.context_length)
        self.cache = ContiguousCache(model.config.num_layers, room)
        self.text = torch.empty(room, dtype=torch.int64, device=model.output_weight.device)
        self.text[: len(start)] = torch.tensor(start)
        self.length = len(start)

    @property
    def is_full(self) -> bool:
        """Whether no further token is allowed."""
        return self.length == len(self.text)

    @torch.inference_mode()
    def step(self) -> tuple[int, float, int, float, tuple[Alternative, ...]]:
        """Read what was not read yet and choose one token: its id, probability, rank, entropy and alternatives.

        The device is waited for once, when the numbers are fetched.
        """
        unread = self.text[self.cache.length : self.length]
        hidden = self.model(unread[None], cache=self.cache)[0, -1]
        # An embedding may have more rows than there are tokens, to make its size round.
        logits = self.model.logits(hidden)[: self.tokenizer.vocab_size].float()
        chosen = choose(
            apply_rules(self.rules, self.text[: self.length], logits), self.config, self.generator
        )
        self.text[self.length] = chosen
        self.length += 1
        numbers = _odds(logits, chosen).tolist()
        if not math.isfinite(numbers[1]):
            raise InputError(
                "the model's logits are not finite numbers",
                "model",
                "its weights are damaged or training diverged",
            )
        return int(numbers[0]), math.exp(numbers[1]), int(numbers[2]), numbers[3], self._likeliest(logits)

    def _likeliest(self, logits: Tensor) -> tuple[Alternative, ...]:
        if not self.alternatives:
            return ()
        top = logits.softmax(-1).topk(min(self.alternatives, len(logits)))
        texts = [self.tokenizer.decode([token], keep_special=True) for token in top.indices.tolist()]
        return tuple(map(Alternative, top.indices.tolist(), texts, top.values.tolist()))


def _odds(logits: Tensor, chosen: Tensor) -> Tensor:
    """Id, log-probability, rank and entropy (nats) of the chosen token under softmax(logits): float64 [4]."""
    logs = logits.log_softmax(-1)
    rank = (logits > logits[chosen]).sum() + 1
    entropy = -(logs.exp() * logs).nan_to_num(0.0).sum()  # 0 · log 0 is 0
    return torch.stack([chosen.double(), logs[chosen].double(), rank.double(), entropy.double()])
