"""What is asked of the engine and what it answers: requests, tokens with their odds, events, settings, figures.

Values only; also how the pieces of an answer become text that never shows half a character or half a stop string.
Knows nothing of models or of how tokens come about.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.inference.sampling import GenerationConfig

Propose = Callable[[Sequence[int]], Sequence[int]]
"""Called with prompt and answer so far; returns a guess of the tokens that follow, of any length."""


class Constraint(Protocol):
    """What may come next in one answer; it is asked before each token and told each token that was chosen."""

    def allowed(self) -> Tensor:
        """Bool [vocab_size]: the tokens that may come next; at least one of them."""
        ...

    def advance(self, token: int) -> None:
        """The next token was chosen: an allowed one."""
        ...


class Alternative(NamedTuple):
    """A token that might have come: its id, its text, and its probability under the model itself."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class Token:
    """One token with its odds.

    Args:
        id: its number.
        text: the text that became certain with it: never half a character, nothing of a stop string; may be empty, and
            may hold text of earlier tokens. All texts joined are the answer.
        probability: of this token under the model itself: temperature 1, no rule applied. Of a prompt's first token,
            which nothing precedes: not a number.
        rank: its place among all tokens by that probability, from 1; 0 for a prompt's first token.
        entropy: of that distribution, in nats.
        alternatives: the likeliest tokens, as many as were asked for.
        finish: why this is the last token: "end" (the model closed the document), "stop" (a stop string) or "length"
            (max_new_tokens, the model's context or the whole cache is used up); empty while there are more.
    """

    id: int
    text: str
    probability: float
    rank: int
    entropy: float
    alternatives: tuple[Alternative, ...] = ()
    finish: str = ""


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Args:
        prompt: token ids; empty for the start of a document.
        config: how tokens are drawn, and when to stop. One answer is written: callers who want n submit n.
        alternatives: how many of the likeliest tokens to show beside each token.
        end_tokens: tokens that end the answer, besides the tokenizer's end_of_document.
        constraint: what may come next; it has a state, so it serves one request.
        prompt_odds: also report the odds of the prompt's own tokens, with this many alternatives beside each.
        propose: guesses the next tokens; those that the model would have chosen itself are read in one pass. Changes
            no text, only the time it takes.
    """

    prompt: tuple[int, ...]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    alternatives: int = 0
    end_tokens: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    prompt_odds: int | None = None
    propose: Propose | None = None


class Event(NamedTuple):
    """What happened to a request in a step: a token came, or it failed (and nothing more will come).

    `prompt` comes once, with the first token, to those who asked for the prompt's odds: one token per id of it.
    """

    ticket: int
    token: Token | None
    error: Exception | None = None
    prompt: tuple[Token, ...] = ()

    @property
    def is_last(self) -> bool:
        """Whether nothing more will come for this request."""
        return self.token is None or bool(self.token.finish)


class QueueFull(InputError):  # noqa: N818  (its name says what it is)
    """More requests wait than the engine's settings allow."""


@dataclass(frozen=True)
class EngineSettings:
    """What an engine may use.

    Args:
        cache_tokens: tokens whose keys and values are kept, of all requests together; 0 for what a quarter of the
            free memory holds, at most `max_batch` full contexts.
        block_size: tokens in a block of the cache.
        max_batch: most requests that are decoded at once.
        chunk: most tokens of prompts read in one step, beside the requests that are decoded.
        max_queue: most requests that wait to be started.
        reuse: whether the beginning of a prompt that is still in the cache is taken from there.
    """

    cache_tokens: int = 0
    block_size: int = 16
    max_batch: int = 64
    chunk: int = 64
    max_queue: int = 1024
    reuse: bool = True

    def __post_init__(self) -> None:
        bounds = (("cache_tokens", 0), ("block_size", 1), ("max_batch", 1), ("chunk", 1), ("max_queue", 0))
        for name, least in bounds:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} is {value!r}", f"--{name}", f"give a whole number from {least}")


@dataclass(frozen=True)
class EngineStatistics:
    """How an engine is doing; the last six count from its beginning.

    Args:
        queued: requests that wait.
        running: requests that are being read or written.
        cache_blocks_used: blocks of the cache that running requests hold.
        cache_blocks_total: blocks there are.
        steps: forward passes.
        prompt_tokens: tokens of prompts read, those taken from the cache not counted.
        tokens: tokens written.
        reused_tokens: tokens of prompts taken from the cache.
        preemptions: times a running request was put back because the cache was full.
        accepted_tokens: tokens written that a request's own guess had right.
    """

    queued: int
    running: int
    cache_blocks_used: int
    cache_blocks_total: int
    steps: int
    prompt_tokens: int
    tokens: int
    reused_tokens: int
    preemptions: int
    accepted_tokens: int


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
        if not self._stops:
            return piece
        held = self._held + piece
        places = [place for place in (held.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.stopped, self._held = True, ""
            return held[: min(places)]
        certain = len(held) - max(_overlap(held, stop) for stop in self._stops)
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
