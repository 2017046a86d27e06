"""Examples as rows of tokens: which tokens are read, which are learned, and which cannot see which.

A conversation becomes tokens through the model's own chat template, the one that serving uses; what the assistant wrote
is learned, the rest is only read. Several examples share a row and do not see each other. Which row is where is a pure
function of (seed, epoch), so there is no loader state. Knows tokenizers; nothing of models and losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import numpy as np

from glasshouse.errors import InputError
from glasshouse.text.examples import Example, ExampleCounts
from glasshouse.text.packing import Batch, permute
from glasshouse.text.tokenizer import Message, Tokenizer

IGNORED = -100
"""The label of a position that is not learned from."""

OPEN_ROWS = 64
"""Rows kept open while examples are put into them: more waste less, and mix near neighbours."""


@dataclass(frozen=True)
class Lesson:
    """An example as tokens.

    Args:
        row: where it was read.
        tokens: ids, int64 [n].
        learned: whether each token is one that the model is to write, bool [n].
    """

    row: str
    tokens: np.ndarray
    learned: np.ndarray


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], row: str, tools: Sequence[Message] = ()
) -> Lesson:
    """A conversation in the model's chat template; what the assistant wrote, up to the token that ends its turn, is
    learned.

    Raises:
        InputError: the template refuses the messages, or does not show where the answers are.
    """
    tokens: list[int] = []
    learned: list[bool] = []
    segments = tokenizer.chat_segments(messages, tools or None, add_generation_prompt=False)
    for answer, pieces in groupby(segments, key=lambda segment: segment.answer):
        turn = [(number, piece.special) for piece in pieces for number in tokenizer.encode_segment(piece)]
        last = max((place for place, (_, special) in enumerate(turn) if special), default=len(turn) - 1)
        tokens += [number for number, _ in turn]
        learned += [answer and place <= last for place in range(len(turn))]
    if not any(learned) and any(message["role"] == "assistant" for message in messages):
        raise InputError(
            "the chat template does not show where an answer begins",
            row,
            "use a template that keeps earlier turns as they were",
        )
    return Lesson(row, np.array(tokens, dtype=np.int64), np.array(learned, dtype=bool))


def encode_examples(
    tokenizer: Tokenizer, examples: Sequence[Example], context: int, counts: ExampleCounts
) -> list[Lesson]:
    """Every example as tokens, those over `context` cut at their end.

    Args:
        tokenizer: of the model that will learn.
        examples: what to learn.
        context: most tokens of a lesson.
        counts: rows cut short, and rows left out because nothing to learn was left of them, are counted here.

    Raises:
        InputError: nothing is left to learn, or the chat template refuses an example.
    """
    lessons = []
    for example in examples:
        lesson = encode_conversation(tokenizer, example.conversation, example.row, example.tools)
        if len(lesson.tokens) > context:
            lesson = Lesson(lesson.row, lesson.tokens[:context], lesson.learned[:context])
            if not lesson.learned.any():
                counts.drop(f"its answer begins after {context:,} tokens", example.row)
                continue
            counts.shorten(example.row)
        lessons.append(lesson)
    if not lessons:
        raise InputError("nothing is left to learn", "the data", f"give a --context above {context:,}")
    return lessons


class Placed(NamedTuple):
    """Lessons that share a row: their numbers, in order."""

    lessons: tuple[int, ...]


def place(lengths: Sequence[int], context: int, seed: int, epoch: int) -> list[Placed]:
    """Put lessons into rows, in the order of an epoch: each into the fullest open row that has room.

    Args:
        lengths: tokens of each lesson, at most `context`.
        context: tokens of a row.
        seed: of the order.
        epoch: another order for each.

    Returns:
        Rows; every lesson is in exactly one.
    """
    open_rows: list[tuple[int, list[int]]] = []
    closed: list[list[int]] = []
    for number in permute(np.arange(len(lengths)), len(lengths), seed, epoch).tolist():
        length = lengths[number]
        fitting = [index for index, (used, _) in enumerate(open_rows) if used + length <= context]
        if fitting:
            best = max(fitting, key=lambda index: open_rows[index][0])
            used, row = open_rows[best]
            row.append(number)
            open_rows[best] = (used + length, row)
        else:
            open_rows.append((length, [number]))
        if len(open_rows) > OPEN_ROWS:
            fullest = max(range(len(open_rows)), key=lambda index: open_rows[index][0])
            closed.append(open_rows.pop(fullest)[1])
    rows = closed + [row for _, row in open_rows]
    order = permute(np.arange(len(rows)), len(rows), seed + 1, epoch).tolist()
    return [Placed(tuple(rows[index])) for index in order]


class Lessons:
    """Lessons dealt out in rows of one length; which are in batch number `step` depends on nothing else but the seed.

    Args:
        lessons: what there is to learn.
        context: tokens of a row.
        pad: the id that fills a row up.
        seed: of the order.
    """

    def __init__(self, lessons: Sequence[Lesson], context: int, pad: int, seed: int):
        self.lessons, self.context, self.pad, self.seed = list(lessons), context, pad, seed
        self._lengths = [len(lesson.tokens) for lesson in self.lessons]
        self._epoch = lru_cache(maxsize=2)(self._place)
        self._starts = [0]

    def _place(self, epoch: int) -> list[Placed]:
        return place(self._lengths, self.context, self.seed, epoch)

    @property
    def tokens(self) -> int:
        """Tokens of all lessons."""
        return sum(self._lengths)

    @property
    def rows(self) -> int:
        """Rows of the first pass; another pass may take a few more or fewer."""
        return len(self._epoch(0))

    @property
    def waste(self) -> float:
        """Share of the first pass that is padding."""
        return 1.0 - self.tokens / (self.rows * self.context)

    def batch(self, step: int, rows: int) -> Batch:
        """The rows of one optimizer step."""
        return self.pack([self._row(step * rows + number) for number in range(rows)])

    def row_names(self, step: int, rows: int) -> list[str]:
        """Where the lessons of a batch were read."""
        placed = [self._row(step * rows + number) for number in range(rows)]
        return [self.lessons[number].row for row in placed for number in row.lessons]

    def _row(self, number: int) -> Placed:
        while self._starts[-1] <= number:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._epoch(epoch)[number - self._starts[epoch]]

    def pack(self, rows: Sequence[Placed]) -> Batch:
        """Rows of lessons as a batch: a lesson's last token predicts nothing, and no lesson sees another."""
        shape = (len(rows), self.context)
        tokens = np.full(shape, self.pad, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        positions, documents = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int32)
        for index, row in enumerate(rows):
            start = 0
            for order, number in enumerate(row.lessons):
                lesson = self.lessons[number]
                stop = start + len(lesson.tokens)
                tokens[index, start:stop] = lesson.tokens
                labels[index, start : stop - 1] = np.where(lesson.learned[1:], lesson.tokens[1:], IGNORED)
                positions[index, start:stop] = np.arange(stop - start)
                documents[index, start:stop] = order
                start = stop
            positions[index, start:] = np.arange(self.context - start)
            documents[index, start:] = len(row.lessons)
        return Batch(tokens, labels, positions, documents)


class Shown(NamedTuple):
    """A stretch of a row as a person is shown it: its text, and "learned", "seen" or "border"."""

    text: str
    kind: str


def show_row(tokenizer: Tokenizer, batch: Batch, row: int) -> list[Shown]:
    """One row of a batch as stretches of text: what is learned from, what is only seen, and where one example ends, which
    the next cannot see.
    """
    tokens, documents = batch.tokens[row], batch.documents[row]
    learned = np.concatenate([[False], batch.labels[row][:-1] != IGNORED])
    shown: list[Shown] = []
    last = int(documents[-1]) if (batch.labels[row][documents == documents[-1]] == IGNORED).all() else -1
    for document, places in groupby(range(len(tokens)), key=lambda place: int(documents[place])):
        if document == last:  # the padding
            break
        if shown:
            shown.append(Shown("", "border"))
        for is_learned, stretch in groupby(places, key=lambda place: bool(learned[place])):
            text = tokenizer.decode([int(tokens[place]) for place in stretch], keep_special=True)
            shown.append(Shown(text, "learned" if is_learned else "seen"))
    return shown
