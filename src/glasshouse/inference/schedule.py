"""The state of the requests an engine works on: what each has read, written and shown.

Knows tokens and text; nothing of models or of tensors of keys and values.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from glasshouse.inference.request import Alternative, Request, StopFilter, Token
from glasshouse.inference.sampling import make_sampler
from glasshouse.text.tokenizer import Tokenizer

Odds = tuple[float, int, float]
"""Log-probability, rank and entropy of a token."""


class Answer:
    """One request and what has been written for it so far.

    Args:
        ticket: the engine's number of the request; smaller is older.
        request: what was asked for.
        tokenizer: the model's.
        room: most tokens, prompt and answer together.
    """

    def __init__(self, ticket: int, request: Request, tokenizer: Tokenizer, room: int):
        self.ticket, self.request, self.tokenizer = ticket, request, tokenizer
        self.tokens = list(request.prompt) or [tokenizer.end_of_document]
        self.prompt_length = len(self.tokens)
        self.room = min(room, self.prompt_length + request.config.max_new_tokens)
        self.sampler = make_sampler(request.config, self.prompt_length)
        self._ends = {tokenizer.end_of_document, *request.end_tokens}
        self._stream, self._stop_filter = tokenizer.decode_stream(), StopFilter(request.config.stop)

    def write(self, token: int, odds: Odds, alternatives: Sequence[tuple[int, float]]) -> Token:
        """Add a token that was chosen; the answer is over when it has a finish."""
        self.tokens.append(token)
        text = self._stop_filter.push(self._stream.step(token))
        if self._stop_filter.stopped:
            finish = "stop"
        elif token in self._ends:
            finish = "end"
        else:
            finish = "length" if len(self.tokens) >= self.room else ""
        if finish in ("end", "length"):
            text += self._stop_filter.push(self._stream.flush())
            text += self._stop_filter.flush()
        shown = show_token(self.tokenizer, token, odds, alternatives)
        return replace(shown, text=text, finish=finish)


def show_token(
    tokenizer: Tokenizer, token: int, odds: Odds, alternatives: Sequence[tuple[int, float]]
) -> Token:
    """A token with its own text and odds; `alternatives` are ids and probabilities."""
    logarithm, rank, entropy = odds
    others = tuple(
        Alternative(other, tokenizer.decode([other], keep_special=True), chance)
        for other, chance in alternatives
    )
    text = tokenizer.decode([token], keep_special=True)
    return Token(token, text, math.exp(logarithm), rank, entropy, others)
