"""Guesses of the tokens that come next, which the engine reads in one pass and keeps as far as they are right.

Two ways to guess: look the last tokens up in the text so far (quoting, summarising, code), or let a smaller model with
the same tokenizer write ahead. A guess changes no text, greedy or drawn, only the time it takes: what the engine keeps
is what it would have chosen itself (Leviathan et al. 2022, arXiv:2211.17192; the look-up: Saxena 2023, "Prompt Lookup
Decoding"). Because a wrong guess costs time, `Worth` measures, and stops the guessing where it does not pay.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

import torch

from glasshouse.errors import InputError
from glasshouse.inference.cache import ContiguousCache
from glasshouse.inference.request import Propose
from glasshouse.models.decoder import Decoder

DRAFTS = 8
"""Tokens guessed at a time."""


class PromptLookup:
    """Guesses that what followed the last tokens when they stood in the text before will follow them again.

    For one text that grows; what was seen is kept in tables, so a guess costs the new tokens only.

    Args:
        longest: tokens that are looked up at first; then fewer.
        shortest: fewest tokens that must be found again.
        count: most tokens to guess.
    """

    def __init__(self, longest: int = 4, shortest: int = 2, count: int = DRAFTS):
        self._lengths = range(longest, shortest - 1, -1)
        self._count = count
        self._places: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def __call__(self, tokens: Sequence[int]) -> list[int]:
        """What followed the last time: at most `count` tokens, none where the end of the text is new."""
        # A piece of text is entered once something follows it, so that the end of the text does not find itself.
        for end in range(max(self._seen, 1), len(tokens)):
            for length in self._lengths:
                if length <= end:
                    self._places[tuple(tokens[end - length : end])] = end
        self._seen = len(tokens)
        for length in self._lengths:
            place = self._places.get(tuple(tokens[len(tokens) - length :]))
            if length <= len(tokens) and place is not None:
                return _repeated(tokens, place, self._count)
        return []


def _repeated(tokens: Sequence[int], place: int, count: int) -> list[int]:
    """The tokens from a place on; where they run into the end of the text they start again, as a loop would."""
    found = list(tokens[place : place + count])
    return [found[index % len(found)] for index in range(count)]


class DraftModel:
    """Guesses what a smaller model would write, always its likeliest token.

    For one text that grows: the model reads each token once.

    Args:
        model: a decoder with the target's tokenizer, in evaluation mode.
        vocab_size: the tokenizer's.
        count: tokens to guess.

    Raises:
        InputError: the model knows fewer tokens than the tokenizer has.
    """

    def __init__(self, model: Decoder, vocab_size: int, count: int = DRAFTS):
        if model.config.vocab_size < vocab_size:
            raise InputError(
                f"the draft model knows {model.config.vocab_size:,} tokens and the tokenizer has {vocab_size:,}",
                "draft", "use a draft model with the same tokenizer",
            )  # fmt: skip
        self._model, self._vocab_size, self._count = model, vocab_size, count
        self._cache = ContiguousCache(model.config.num_layers)
        self._read: list[int] = []

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int]) -> list[int]:
        """The next `count` tokens, fewer where the draft model's context ends."""
        text = list(tokens)
        # The last token is read in any case: its logits are wanted.
        known = _agreement(self._read, text[:-1])
        self._cache.truncate(known)
        room = min(self._count, self._model.config.context_length - len(text) + 1)
        unread, guessed = text[known:], []
        device = self._model.output_weight.device
        for _ in range(room):
            hidden = self._model(torch.tensor([unread], device=device), cache=self._cache)[0, -1]
            unread = [int(self._model.logits(hidden)[: self._vocab_size].argmax())]
            guessed += unread
        self._read = (text + guessed)[: self._cache.length]
        return guessed


def _agreement(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = zip(left, right, strict=False)
    return next(
        (place for place, (one, other) in enumerate(pairs) if one != other), min(len(left), len(right))
    )


class Worth:
    """Whether guessing pays: tokens per second of steps with a guess against those without, as measured.

    One for everything that runs under like conditions (a model on a machine): what one answer taught serves the next.

    A few plain steps are timed, then a trial of steps with guesses: a short one where they clearly lose, a longer one
    otherwise. Guessing stays while a token with guesses takes no more time than one without, and is stopped otherwise, for
    longer after each trial that failed. Now and then a plain step is timed again, so that the comparison is never with
    long ago. Times are medians: one step that was held up decides nothing.
    """

    PLAIN, REFRESH = 4, 32
    SHORT_TRIAL, TRIAL, WINDOW = 6, 16, 48
    CLEARLY, MARGIN = 0.8, 0.97
    PAUSES = 64, 1024

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=9)
        self._guessed: deque[tuple[float, int]] = deque(maxlen=self.WINDOW)
        self._until_plain = self.REFRESH
        self._paused, self._pause = 0, self.PAUSES[0]

    @property
    def is_paused(self) -> bool:
        """Whether guessing was found not to pay, and is not yet tried again."""
        return self._paused > 0

    def wants_guess(self) -> bool:
        """Whether the next step should be one with a guess."""
        return len(self._plain) >= self.PLAIN and not self.is_paused and self._until_plain > 0

    def record(self, seconds: float, tokens: int, guessed: bool) -> None:
        """A step is over.

        Args:
            seconds: it took, the guess included.
            tokens: it gave the answer.
            guessed: whether it had a guess.
        """
        if not guessed:
            self._plain.append(seconds)
            self._until_plain, self._paused = self.REFRESH, max(self._paused - 1, 0)
            return
        self._guessed.append((seconds, tokens))
        self._until_plain -= 1
        steps, gain = len(self._guessed), self.gain
        if (gain < self.CLEARLY and steps >= self.SHORT_TRIAL) or (
            gain < self.MARGIN and steps >= self.TRIAL
        ):
            self._paused, self._pause = self._pause, min(2 * self._pause, self.PAUSES[1])
            self._guessed.clear()
        elif steps >= self.TRIAL:
            self._pause = self.PAUSES[0]

    @property
    def gain(self) -> float:
        """How many times as fast an answer grows with guesses; 1 where there is nothing to compare yet."""
        if not self._plain or not self._guessed:
            return 1.0
        step = median(seconds for seconds, _ in self._guessed)
        tokens = sum(count for _, count in self._guessed) / len(self._guessed)
        return tokens * median(self._plain) / max(step, 1e-12)


def while_it_pays(propose: Propose, worth: Worth, clock: Callable[[], float] = time.perf_counter) -> Propose:
    """A guesser for one answer that is asked only while that makes the answer faster.

    Args:
        propose: the guesser.
        worth: what is known of guessing, shared by answers under like conditions.
        clock: seconds, from any start.
    """
    last: list[tuple[float, int, bool]] = []

    def ask(tokens: Sequence[int]) -> Sequence[int]:
        now = clock()
        if last:
            began, length, guessed = last.pop()
            if len(tokens) > length:
                worth.record(now - began, len(tokens) - length, guessed)
        guess = propose(tokens) if worth.wants_guess() else []
        last.append((now, len(tokens), len(guess) > 0))
        return guess

    return ask
