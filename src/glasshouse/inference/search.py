"""Beam search: the likeliest texts, kept several at a time; for translation above all.

`BeamState` is the bookkeeping of one text, `search` drives several at once with whatever reads the tokens: a decoder over
a paged cache (beams share the blocks of what they have in common), or an encoder-decoder over a contiguous one. What is
kept, what ends and when it stops is what transformers does (`generate(num_beams=...)`). Knows models; nothing of text.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.inference.paged import Piece, Reader, Table
from glasshouse.inference.sampling import Bounds, require_within
from glasshouse.models.encoder_decoder import EncoderDecoder

MOST_BEAMS = 64
PENALTY_BOUNDS = Bounds(-10, 10)
ReadBeams = Callable[[list[int], list[int]], Tensor]
"""Given, for each row of the next step, the row of the last one that it goes on from, and its token: logits [rows, V]."""


@dataclass(frozen=True)
class BeamConfig:
    """How wide and how long to search.

    Args:
        beams: texts kept at a time.
        answers: how many of the best finished texts are wanted; at most `beams`.
        length_penalty: a finished text's score is its log-probability / length ** length_penalty (length in tokens, the
            end included): above 0 longer texts gain, below 0 shorter ones.
        early_stopping: True ends once there are as many finished texts as beams; False ends when the best running text
            is worse than the worst finished one at its present length; "never" when it would be at any length.
        max_new_tokens: texts end here at the latest.
    """

    beams: int = 4
    answers: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    max_new_tokens: int = 200

    def __post_init__(self) -> None:
        require_within("beams", self.beams, Bounds(1, MOST_BEAMS, whole=True))
        require_within("answers", self.answers, Bounds(1, self.beams, whole=True))
        require_within("length_penalty", self.length_penalty, PENALTY_BOUNDS)
        require_within("max_new_tokens", self.max_new_tokens, Bounds(1, 2**20, whole=True))
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InputError(
                f"early_stopping is {self.early_stopping!r}",
                "--early_stopping",
                'give true, false or "never"',
            )


class Hypothesis(NamedTuple):
    """A finished text: its tokens, the end token included where it has one, and its score."""

    tokens: tuple[int, ...]
    score: float


class BeamState:
    """The running and the finished texts of one search.

    Starts with one running text that has no token yet.

    Args:
        config: how wide and how long.
        end_tokens: tokens that finish a text.
    """

    def __init__(self, config: BeamConfig, end_tokens: Collection[int]):
        self.config, self.ends = config, frozenset(end_tokens)
        self.finished: list[Hypothesis] = []
        self.is_done = False
        self._texts: list[tuple[int, ...]] = [()]
        self.scores: list[float] = [0.0]

    @property
    def running(self) -> int:
        """How many texts go on; the rows that `step` expects."""
        return len(self._texts)

    def step(self, log_probabilities: Tensor) -> tuple[list[int], list[int]]:
        """Choose how the running texts go on.

        Args:
            log_probabilities: of the next token of each running text, float32 [running, V].

        Returns:
            For each text that runs from now on, the row it goes on from and its new token; empty once `is_done`.
        """
        [(rows, tokens, scores)] = best_candidates([self], log_probabilities)
        return self.choose(rows, tokens, scores)

    def choose(self, rows: list[int], tokens: list[int], scores: list[float]) -> tuple[list[int], list[int]]:
        """Choose among the best candidates, best first: `rows` that they go on from, their new tokens, their scores."""
        length = len(self._texts[0]) + 1
        at_limit = length == self.config.max_new_tokens
        going_on: list[tuple[int, int, float]] = []
        for place, (row, token, score) in enumerate(zip(rows, tokens, scores, strict=True)):
            if not (at_limit or token in self.ends):
                going_on.append((row, token, score))
            elif place < self.config.beams:
                self.finished.append(
                    Hypothesis((*self._texts[row], token), score / length**self.config.length_penalty)
                )
        # Of equal scores the earlier stays before the later: sorting is stable.
        self.finished = sorted(self.finished, key=lambda found: -found.score)[: self.config.beams]
        return self._go_on(going_on[: self.config.beams], length)

    def _go_on(self, rows: list[tuple[int, int, float]], length: int) -> tuple[list[int], list[int]]:
        self.is_done = not rows or self._cannot_improve(rows[0][2], length)
        if self.is_done:
            self._texts = []
            return [], []
        self._texts = [(*self._texts[row], token) for row, token, _ in rows]
        self.scores = [score for _, _, score in rows]
        return [row for row, _, _ in rows], [token for _, token, _ in rows]

    def _cannot_improve(self, best_running: float, length: int) -> bool:
        """Whether the search ends, by the rule that `early_stopping` names."""
        config = self.config
        if len(self.finished) < config.beams:
            return False
        longest = config.early_stopping == "never" and config.length_penalty > 0
        reached = config.max_new_tokens if longest else length
        bound = best_running / reached**config.length_penalty
        return config.early_stopping is True or bound <= self.finished[-1].score

    @property
    def answers(self) -> list[Hypothesis]:
        """The best finished texts, best first."""
        return self.finished[: self.config.answers]


def best_candidates(
    states: Sequence[BeamState], log_probabilities: Tensor
) -> list[tuple[list[int], list[int], list[float]]]:
    """The best continuations of each state's running texts: the rows they go on from, tokens and scores, best first.

    All are found at once where the states have equally many running texts.

    Args:
        states: that are not done.
        log_probabilities: of the next token of each running text, float32 [rows of all states, V].

    Raises:
        InputError: a score is not a number.
    """
    rows = states[0].running
    if any(state.running != rows for state in states):
        parts = log_probabilities.split([state.running for state in states])
        return [best_candidates([state], part)[0] for state, part in zip(states, parts, strict=True)]
    vocabulary = log_probabilities.shape[1]
    before = torch.tensor([state.scores for state in states], device=log_probabilities.device)
    total = (log_probabilities.view(len(states), rows, vocabulary) + before[..., None]).flatten(1)
    # So many that enough of them go on, even if every end token of every text is among the best.
    wanted = max(max(2, 1 + len(state.ends)) * state.config.beams for state in states)
    best = torch.topk(total, min(wanted, total.shape[1]))
    if not bool(best.values.isfinite().any(1).all()) or bool(best.values.isnan().any()):
        raise InputError(
            "the model's logits are not finite numbers",
            "model",
            "its weights are damaged or training diverged",
        )
    places = torch.div(best.indices, vocabulary, rounding_mode="floor")
    tokens = best.indices - places * vocabulary
    return list(zip(places.tolist(), tokens.tolist(), best.values.tolist(), strict=True))


@torch.inference_mode()
def search(states: Sequence[BeamState], logits: Tensor, read: ReadBeams) -> None:
    """Search until every state is done.

    Args:
        states: one per text that is searched for, at their beginnings.
        logits: of the first token of each, [B, V].
        read: reads one token per running text, all states' texts in one batch, states in order and those done left out.

    Raises:
        InputError: the model's logits are not numbers.
    """
    first, running = {index: index for index in range(len(states))}, list(range(len(states)))
    while running:
        scores = logits.float().log_softmax(-1)
        found = best_candidates([states[index] for index in running], scores)
        parents, tokens, next_first = [], [], {}
        for index, candidates in zip(running, found, strict=True):
            start = first[index]
            rows, chosen = states[index].choose(*candidates)
            next_first[index] = len(parents)
            parents += [start + row for row in rows]
            tokens += chosen
        running, first = [index for index in running if not states[index].is_done], next_first
        if running:
            logits = read(parents, tokens)


def search_continuation(
    reader: Reader, prompt: Sequence[int], config: BeamConfig, end_tokens: Collection[int], vocab_size: int
) -> list[Hypothesis]:
    """The likeliest continuations of a prompt.

    Args:
        reader: a decoder over a paged cache; beams share its blocks until they differ.
        prompt: token ids, at least one.
        config: how wide and how long; texts end where the model's context does.
        end_tokens: tokens that finish a text.
        vocab_size: the tokenizer's; further rows of the output head are no tokens.

    Returns:
        The best, best first; end tokens included.

    Raises:
        InputError: the prompt leaves no room, or the cache is too small for so many beams.
    """
    room = reader.model.config.context_length - len(prompt)
    if room < 1:
        raise InputError(
            f"the prompt has {len(prompt):,} tokens and the model reads at most {reader.model.config.context_length:,}, "
            "the new ones included", "prompt", "shorten the prompt",
        )  # fmt: skip
    beams = _PagedBeams(reader, vocab_size)
    limited = BeamConfig(
        config.beams,
        config.answers,
        config.length_penalty,
        config.early_stopping,
        min(config.max_new_tokens, room),
    )
    state = BeamState(limited, end_tokens)
    try:
        search([state], beams.begin(prompt), beams.read)
    finally:
        beams.release()
    return state.answers


class _PagedBeams:
    """The running texts of a search in a paged cache: a table of blocks each, shared where they agree."""

    def __init__(self, reader: Reader, vocab_size: int):
        self._reader, self._cache, self._vocab_size = reader, reader.cache, vocab_size
        self._tables: list[Table] = []
        self._length = 0

    def begin(self, prompt: Sequence[int]) -> Tensor:
        table: Table = []
        self._tables, self._length = [table], len(prompt)
        self._reserve(table, 0)
        hidden = self._reader.read_pieces([Piece(prompt, table, 0)])
        return self._reader.logits(hidden[-1:])[:, : self._vocab_size]

    def read(self, parents: list[int], tokens: list[int]) -> Tensor:
        before, self._tables = self._tables, [self._cache.fork(self._tables[row]) for row in parents]
        for table in before:
            self._cache.truncate(table, 0)
        position, self._length = self._length, self._length + 1
        for table in self._tables:
            self._reserve(table, position)
        hidden = self._reader.read_rows(tokens, self._tables, [position] * len(tokens))
        return self._reader.logits(hidden)[:, : self._vocab_size]

    def _reserve(self, table: Table, start: int) -> None:
        if not self._cache.reserve(table, start, self._length):
            raise InputError(
                f"the cache has no room for {len(self._tables)} texts of {self._length:,} tokens", "cache_tokens",
                "make it larger, or search with fewer beams",
            )  # fmt: skip

    def release(self) -> None:
        for table in self._tables:
            self._cache.truncate(table, 0)


@torch.inference_mode()
def search_translations(
    model: EncoderDecoder,
    sources: Tensor,
    mask: Tensor | None,
    config: BeamConfig,
    *,
    start_token: int,
    end_tokens: Collection[int],
    vocab_size: int | None = None,
) -> list[list[Hypothesis]]:
    """The likeliest targets of sources, all sources and all their beams read together.

    Args:
        model: in evaluation mode.
        sources: token ids, int64 [B, S].
        mask: bool [B, S], True at tokens and False at padding; None where nothing is padding.
        config: how wide and how long.
        start_token: what a target begins with; not part of the answer.
        end_tokens: tokens that finish a target.
        vocab_size: the tokenizer's, where the output head has more rows.

    Returns:
        For each source the best targets, best first; end tokens included.
    """
    beams = _Translations(model, model.encode(sources, mask), mask, vocab_size, config.max_new_tokens)
    states = [BeamState(config, end_tokens) for _ in range(len(sources))]
    search(states, beams.read(list(range(len(sources))), [start_token] * len(sources)), beams.read)
    return [state.answers for state in states]


class TargetCache:
    """Keys and values of the running targets, position by position, so that what a step moves lies together.

    Args:
        layers: number of layers.
        capacity: most tokens of a target.
    """

    def __init__(self, layers: int, capacity: int):
        self.length = 0
        self._layers, self._capacity = layers, capacity
        self._held: Tensor | None = None  # [capacity, layers, 2, B, H, d]
        self._other: Tensor | None = None

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, H, 1, d] keys and values to a layer; return all of them, [B, H, length + 1, d]."""
        if self._held is None:
            rows, heads, _, width = key.shape
            self._held = key.new_empty(self._capacity, self._layers, 2, rows, heads, width)
        end = self.length + 1
        self._held[self.length, layer, 0], self._held[self.length, layer, 1] = key[:, :, 0], value[:, :, 0]
        if layer == self._layers - 1:
            self.length = end
        keys, values = self._held[:end, layer, 0], self._held[:end, layer, 1]
        return keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row rows[i] has been: int64 [B]. Two memories take turns, as long as the rows are as many."""
        if self._held is None:
            return
        shape = (*self._held.shape[:3], len(rows), *self._held.shape[4:])
        if self._other is None or self._other.shape != shape:
            self._other = self._held.new_empty(shape)
        held, other = (memory[: self.length].flatten(0, 2).flatten(2) for memory in (self._held, self._other))
        torch.index_select(held, 1, rows, out=other)
        self._held, self._other = self._other, self._held


class _Translations:
    """The running targets of sources: what was read of each, and which source each row belongs to."""

    def __init__(
        self, model: EncoderDecoder, memory: Tensor, mask: Tensor | None, vocab_size: int | None, longest: int
    ):
        self._model, self._mask, self._vocab_size = model, mask, vocab_size
        self._memory = model.remember(memory)
        self._cache = TargetCache(len(self._memory), longest)
        self._sources = list(range(len(memory)))
        self._device = memory.device
        self._shown = self._memory, mask

    def read(self, parents: list[int], tokens: list[int]) -> Tensor:
        sources = [self._sources[row] for row in parents]
        if self._cache.length:
            self._cache.reorder(torch.tensor(parents, device=self._device))
        if sources != self._sources:
            distinct = sorted(set(sources))
            even = len(sources) // len(
                distinct
            )  # the model lets a source serve all its rows, where all have as many
            wanted = distinct if sources == [one for one in distinct for _ in range(even)] else sources
            rows = torch.tensor(wanted, device=self._device)
            memory = [(key[rows], value[rows]) for key, value in self._memory]
            self._shown = memory, None if self._mask is None else self._mask[rows]
            self._sources = sources
        memory, mask = self._shown
        given = torch.tensor(tokens, device=self._device)[:, None]
        hidden = self._model(given, memory=memory, memory_mask=mask, cache=self._cache)
        return self._model.logits(hidden[:, -1])[:, : self._vocab_size]
