"""Which requests are read, written and put aside, and in what order: first come, first served.

A request waits, then runs: its prompt is read in pieces, then its answer is written token by token. When the cache is
full the youngest that runs is put back to the head of the queue; what it has written stays, and is read again when
there is room. Knows blocks, tokens and text; nothing of models or of tensors of keys and values.
"""

import hashlib
import itertools
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from glasshouse.errors import InputError
from glasshouse.inference.cache import BlockPool, PagedCache, Table
from glasshouse.inference.paged import Piece
from glasshouse.inference.request import Alternative, EngineSettings, Request, StopFilter, Token
from glasshouse.inference.sampling import make_sampler, require_tokens
from glasshouse.text.tokenizer import Tokenizer

MOST_DRAFTS = 16
"""Tokens of a request's own guess that are read in one step."""

Odds = tuple[float, int, float]
"""Log-probability, rank and entropy of a token."""


class Answer:
    """One request, what has been written for it, and what of it the cache holds.

    Args:
        ticket: the engine's number of the request; smaller is older.
        request: what was asked for.
        tokenizer: the model's.
        room: most tokens, prompt and answer together.
        block_size: of the cache.
    """

    def __init__(self, ticket: int, request: Request, tokenizer: Tokenizer, room: int, block_size: int):
        self.ticket, self.request, self.tokenizer = ticket, request, tokenizer
        self.tokens = list(request.prompt) or [tokenizer.end_of_document]
        self.prompt_length = len(self.tokens)
        self.room = min(room, self.prompt_length + request.config.max_new_tokens)
        self.sampler = make_sampler(request.config, self.prompt_length)
        self.text = torch.empty(self.room + 1, dtype=torch.int64)
        self._text = self.text.numpy()  # the same memory: a number is written there in no time
        self._text[: self.prompt_length] = self.tokens
        self.keys = block_keys(self.tokens, block_size)
        self.prompt: list[Token] = []
        self.table: Table = []
        self.computed = 0
        self.ends = {tokenizer.end_of_document, *request.end_tokens}
        self._stream, self._stop_filter = tokenizer.decode_stream(), StopFilter(request.config.stop)

    @property
    def is_reading(self) -> bool:
        """Whether the cache lacks a part of the prompt."""
        return self.computed < self.prompt_length

    def note(self, place: int, token: int) -> None:
        """Show a token to the logit rules before it is written."""
        self._text[place] = token

    def write(self, token: int, odds: Odds, alternatives: Sequence[tuple[int, float]]) -> Token:
        """Add a token that was chosen; the answer is over when it has a finish."""
        self.note(len(self.tokens), token)
        self.tokens.append(token)
        text = self._stop_filter.push(self._stream.step(token))
        if self._stop_filter.stopped:
            finish = "stop"
        elif token in self.ends:
            finish = "end"
        else:
            finish = "length" if len(self.tokens) >= self.room else ""
        if finish in ("end", "length"):
            text += self._stop_filter.push(self._stream.flush())
            text += self._stop_filter.flush()
        logarithm, rank, entropy = odds
        others = self._named(alternatives)
        return Token(token, text, math.exp(logarithm), rank, entropy, others, finish)

    def write_prompt(self, place: int, odds: Odds | None, alternatives: Sequence[tuple[int, float]]) -> None:
        """Keep the odds of a token of the prompt, the text still to come; None for the first, which has none."""
        logarithm, rank, entropy = odds or (math.nan, 0, math.nan)
        others = self._named(alternatives)
        self.prompt.append(Token(self.tokens[place], "", math.exp(logarithm), rank, entropy, others))

    def prompt_tokens(self) -> tuple[Token, ...]:
        """The prompt's tokens with their odds and texts, for those who asked."""
        if self.request.prompt_odds is None:
            return ()
        stream = self.tokenizer.decode_stream(keep_special=True)
        texts = [stream.step(token.id) for token in self.prompt]
        texts[-1] += stream.flush()
        return tuple(replace(token, text=text) for token, text in zip(self.prompt, texts, strict=True))

    def _named(self, alternatives: Sequence[tuple[int, float]]) -> tuple[Alternative, ...]:
        decode = self.tokenizer.decode
        return tuple(
            Alternative(token, decode([token], keep_special=True), chance) for token, chance in alternatives
        )


def block_keys(tokens: Sequence[int], block_size: int) -> list[bytes]:
    """A name for each full block of a text: it stands for the block's tokens and all before them."""
    keys, key = [], b""
    array = np.array(tokens, np.int64)
    for end in range(block_size, len(tokens) + 1, block_size):
        key = hashlib.blake2b(key + array[end - block_size : end].tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys


def require_request(request: Request, tokenizer: Tokenizer, rows: int, room: int) -> None:
    """Refuse what can never run.

    Args:
        request: what is asked for.
        tokenizer: the model's.
        rows: of the model's embedding.
        room: most tokens that prompt and answer may have together.

    Raises:
        InputError: the prompt leaves no room, or something names an id that is no token.
    """
    length = max(len(request.prompt), 1)
    if length >= room:
        raise InputError(
            f"the prompt has {length:,} tokens and the model reads at most {room:,}, the new ones included",
            "prompt", "shorten the prompt",
        )  # fmt: skip
    if request.prompt and (min(request.prompt) < 0 or max(request.prompt) >= rows):
        raise InputError(
            f"token {max(request.prompt)} in a vocabulary of {rows:,}",
            "prompt",
            "use the model's tokenizer",
        )
    require_tokens(request.config, tokenizer.vocab_size)


@dataclass(frozen=True)
class Row:
    """Tokens of one answer that are read in one step, the written ones and then guessed ones."""

    answer: Answer
    tokens: Sequence[int]
    drafts: int

    @property
    def is_current(self) -> bool:
        """Whether the next token can be chosen after it: everything that was written is read."""
        return self.answer.computed + len(self.tokens) - self.drafts == len(self.answer.tokens)


@dataclass
class Plan:
    """One step: pieces of prompts, tokens of answers, and requests whose own guess failed."""

    pieces: list[tuple[Answer, Piece]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    failed: list[tuple[Answer, Exception]] = field(default_factory=list)


def _guess(answer: Answer) -> list[int]:
    """What a request proposes, up to the first that is no token, and no more than there is room for."""
    most = min(MOST_DRAFTS, answer.room - len(answer.tokens) - 1)
    if answer.request.propose is None or most < 1:
        return []
    guessed = itertools.islice(answer.request.propose(answer.tokens), most)
    return list(itertools.takewhile(lambda token: 0 <= token < answer.tokenizer.vocab_size, guessed))


class Schedule:
    """The queue, those who run, and their blocks.

    Args:
        cache: whose blocks are given out.
        settings: how many may run and how much is read in a step.
    """

    def __init__(self, cache: PagedCache, settings: EngineSettings):
        self._cache, self._settings = cache, settings
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        self.preemptions = self.reused_tokens = 0
        self._long_is_next = False

    @property
    def pool(self) -> BlockPool:
        """Who holds which block."""
        return self._cache.pool

    def remove(self, tickets: Iterable[int]) -> None:
        """Requests that are over or wanted no more: their blocks are free at once."""
        gone = set(tickets)
        if not gone:
            return
        for answer in self.running:
            if answer.ticket in gone:
                self._cache.truncate(answer.table, 0)
        self.running = [answer for answer in self.running if answer.ticket not in gone]
        self.waiting = deque(answer for answer in self.waiting if answer.ticket not in gone)

    def plan(self) -> Plan:
        """What the next step reads; room for all of it is reserved."""
        self._admit()
        plan = Plan()
        for answer in list(self.running):
            if answer.is_reading or answer not in self.running:
                continue
            try:
                row = self._row(answer)
            except Exception as error:  # whatever the request's own guess raised
                plan.failed.append((answer, error))
                continue
            if row is not None:
                plan.rows.append(row)
        plan.pieces = self._pieces()
        return plan

    def advance(self, answer: Answer, end: int) -> None:
        """The cache holds a text up to `end`; blocks beyond it are given back, full ones of the prompt may serve others.

        What the answer's own tokens left is not shared: it was computed token by token, and a prompt that held the same
        tokens would be read in tiles, with other last bits.
        """
        first, answer.computed = answer.computed // self._cache.block_size, end
        self._cache.truncate(answer.table, max(end, answer.prompt_length))
        if self._settings.reuse:
            for place in range(first, min(end // self._cache.block_size, len(answer.keys))):
                self.pool.remember(answer.table[place], answer.keys[place])

    def _admit(self) -> None:
        """Start those at the head of the queue while there is room for all they hold and a block more for each."""
        while self.waiting and len(self.running) < self._settings.max_batch:
            answer = self.waiting[0]
            known = self._known_blocks(answer)
            needed = self._cache.blocks_for(len(answer.tokens) + 1) - len(known)
            idle = sum(self.pool.holders(block) == 0 for block in known)
            if needed + idle + len(self.running) > self.pool.free:
                return
            self.waiting.popleft()
            self.running.append(answer)
            answer.table = self._cache.fork(known)
            answer.computed = len(known) * self._cache.block_size
            answer.prompt.clear()
            self.reused_tokens += answer.computed
            self._cache.reserve(answer.table, answer.computed, len(answer.tokens))

    def _known_blocks(self, answer: Answer) -> Table:
        """Blocks of the cache that hold the beginning of its prompt. The last token is read in any case: its logits count."""
        if not self._settings.reuse or answer.request.prompt_odds is not None:
            return []
        known: Table = []
        for key in answer.keys[: (answer.prompt_length - 1) // self._cache.block_size]:
            block = self.pool.find(key)
            if block is None:
                break
            known.append(block)
        return known

    def _row(self, answer: Answer) -> Row | None:
        """What is read of an answer: one token as a rule, with the guess that follows it; after it was put aside, all.

        None where it had to be put aside itself.
        """
        tokens = answer.tokens[answer.computed : answer.computed + self._settings.chunk]
        drafts: list[int] = []
        if answer.computed + len(tokens) == len(answer.tokens):
            drafts = _guess(answer)
        start, end = answer.computed, answer.computed + len(tokens)
        if drafts and self._cache.reserve(answer.table, start, end + len(drafts)):
            return Row(answer, [*tokens, *drafts], len(drafts))
        while not self._cache.reserve(answer.table, start, end):
            youngest = self.running[-1]
            self._put_aside(youngest)
            if youngest is answer:
                return None
        return Row(answer, tokens, 0)

    def _put_aside(self, answer: Answer) -> None:
        """Take its blocks; everything that was written, and the state of its draws, stays with it."""
        self._cache.truncate(answer.table, 0)
        answer.computed = 0
        self.running.remove(answer)
        self.waiting.appendleft(answer)
        self.preemptions += 1

    def _pieces(self) -> list[tuple[Answer, Piece]]:
        """Pieces of prompts, at most a chunk together.

        Prompts that a chunk can finish and longer ones take turns, so that neither waits for the other for longer than
        a step; the oldest of each kind comes first.
        """
        chunk = self._settings.chunk
        reading = [answer for answer in self.running if answer.is_reading]
        short = [answer for answer in reading if answer.prompt_length - answer.computed <= chunk]
        long = [answer for answer in reading if answer.prompt_length - answer.computed > chunk]
        if short and long:
            chosen = long if self._long_is_next else short
            self._long_is_next = not self._long_is_next
        else:
            chosen, self._long_is_next = reading, False
        pieces, left = [], chunk
        for answer in chosen:
            start, end = answer.computed, min(answer.prompt_length, answer.computed + left)
            if start < end:
                pieces.append((answer, Piece(answer.tokens[start:end], answer.table, start)))
                left -= end - start
        return pieces
