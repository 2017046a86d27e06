"""The only path by which anything generates: prompts' tokens in, tokens with their text and their odds out.

Many requests at once: each step reads one token of every answer that is being written, and a chunk of the prompts that
are being read. What a request gets does not depend on what runs beside it: see `paged.py`. Knows models and
tokenizers; nothing of files, terminals or servers.
"""

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.inference.cache import PagedCache, free_blocks
from glasshouse.inference.paged import Piece, Reader
from glasshouse.inference.request import EngineSettings, EngineStatistics, Event, QueueFull, Request, Token
from glasshouse.inference.sampling import GenerationConfig, likeliest, odds
from glasshouse.inference.schedule import Answer, Row, Schedule, require_request
from glasshouse.models.decoder import Decoder
from glasshouse.text.tokenizer import Tokenizer

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Choice:
    """An answer whose next token is chosen.

    Args:
        answer: whose.
        first: its first row of the logits; one more row for each draft.
        drafts: its own guess of the tokens, read along.
    """

    answer: Answer
    first: int
    drafts: Sequence[int] = ()


class Engine:
    """Answers many requests at once.

    `submit`, `cancel` and `statistics` may be used from any thread; `step`, `stream` and `complete` by one at a time.

    Args:
        model: a decoder in evaluation mode.
        tokenizer: the one it was trained with.
        settings: what it may use.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, settings: EngineSettings | None = None):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings or EngineSettings()
        size, tokens = self.settings.block_size, self.settings.cache_tokens
        most = self.settings.max_batch * model.config.context_length
        blocks = -(-tokens // size) if tokens else free_blocks(model, size, most)
        self.cache = PagedCache(model, blocks, size)
        self.reader = Reader(model, self.cache, self.settings.max_batch, self.settings.chunk)
        self._schedule = Schedule(self.cache, self.settings)
        self._lock, self._tickets = threading.Lock(), itertools.count()
        self._inbox: list[Answer] = []
        self._cancelled: set[int] = set()
        self._held: dict[int, deque[Event]] = {}
        self._steps = self._tokens = self._prompt_tokens = self._accepted = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._inside() == 0

    @property
    def statistics(self) -> EngineStatistics:
        """How it is doing."""
        schedule, pool = self._schedule, self.cache.pool
        return EngineStatistics(
            queued=len(self._inbox) + len(schedule.waiting),
            running=len(schedule.running),
            cache_blocks_used=pool.total - pool.free,
            cache_blocks_total=pool.total,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            tokens=self._tokens,
            reused_tokens=schedule.reused_tokens,
            preemptions=schedule.preemptions,
            accepted_tokens=self._accepted,
        )

    def submit(self, request: Request) -> int:
        """Put a request into the queue.

        Returns:
            Its ticket, by which events name it.

        Raises:
            QueueFull: too many wait.
            InputError: it can never run.
        """
        room = self._require(request)
        with self._lock:
            inside = self._inside()
            if inside >= self.settings.max_batch + self.settings.max_queue:
                raise QueueFull(f"{inside} requests are waiting or running", "", "try again later")
            ticket = next(self._tickets)
            self._inbox.append(Answer(ticket, request, self.tokenizer, room, self.settings.block_size))
            return ticket

    def _inside(self) -> int:
        return len(self._inbox) + len(self._schedule.waiting) + len(self._schedule.running)

    def _require(self, request: Request) -> int:
        """Refuse what can never run; else, how many tokens it may have."""
        room = min(self.model.config.context_length, self.cache.pool.total * self.settings.block_size)
        require_request(request, self.tokenizer, self.model.config.vocab_size, room)
        return room

    def cancel(self, ticket: int) -> None:
        """Stop a request: later steps tell nothing of it, and the next one frees its place. Unknown tickets do nothing."""
        with self._lock:
            self._cancelled.add(ticket)

    def clear(self) -> None:
        """Drop every request; not while a step runs."""
        with self._lock:
            self._inbox.clear()
            self._schedule.remove(
                [answer.ticket for answer in (*self._schedule.waiting, *self._schedule.running)]
            )

    def step(self) -> list[Event]:
        """Read a chunk of the prompts and a token of each answer, and choose the tokens that come next.

        Returns:
            What happened; nothing when there was nothing to do, or only prompts were read.
        """
        with self._lock:
            self._schedule.waiting.extend(self._inbox)
            self._inbox.clear()
            self._schedule.remove(self._cancelled)
            self._cancelled.clear()
        plan = self._schedule.plan()
        events = [Event(answer.ticket, None, error) for answer, error in plan.failed]
        choices, hidden, count = [], [], 0
        for (answer, piece), found in _each_alone(self._read_pieces, plan.pieces):
            if isinstance(found, Exception):
                events.append(Event(answer.ticket, None, found))
                continue
            self._prompt_tokens += len(piece.tokens)
            self._schedule.advance(answer, piece.end)
            if answer.request.prompt_odds is not None:
                self._write_prompt(answer, piece, found)
            if answer.computed == len(answer.tokens):
                choices.append(_Choice(answer, count))
                hidden.append(found[-1:])
                count += 1
        for row, found in _each_alone(self._read_rows, plan.rows):
            if isinstance(found, Exception):
                events.append(Event(row.answer.ticket, None, found))
            elif not row.is_current:
                self._schedule.advance(row.answer, row.answer.computed + len(row.tokens))
            else:
                drafts = row.tokens[len(row.tokens) - row.drafts :]
                choices.append(_Choice(row.answer, count, drafts))
                hidden.append(found[-1 - row.drafts :])
                count += 1 + row.drafts
        if choices:
            events += self._choose(choices, self._logits(torch.cat(hidden)))
        self._steps += bool(plan.pieces or plan.rows)
        self._schedule.remove(event.ticket for event in events if event.is_last)
        return events

    def _read_pieces(self, items: Sequence[tuple[Answer, Piece]]) -> list[Tensor]:
        hidden = self.reader.read_pieces([piece for _, piece in items])
        return list(hidden.split([len(piece.tokens) for _, piece in items]))

    def _read_rows(self, rows: Sequence[Row]) -> list[Tensor]:
        tokens = [token for row in rows for token in row.tokens]
        tables = [row.answer.table for row in rows for _ in row.tokens]
        starts = [(row.answer.computed, row.answer.computed + len(row.tokens)) for row in rows]
        positions = [place for start, end in starts for place in range(start, end)]
        return list(self.reader.read_rows(tokens, tables, positions).split([len(row.tokens) for row in rows]))

    def _logits(self, hidden: Tensor) -> Tensor:
        # An embedding may have more rows than there are tokens, to make its size round.
        return self.reader.logits(hidden)[:, : self.tokenizer.vocab_size]

    @torch.inference_mode()
    def _choose(self, choices: Sequence[_Choice], logits: Tensor) -> list[Event]:
        """The next tokens of some answers; the device is waited for when the numbers are fetched."""
        failed: dict[int, Exception] = {}
        chosen = logits.argmax(-1)
        for choice in choices:
            if choice.answer.request.constraint is None and choice.answer.sampler.is_plain:
                continue
            try:
                self._draw(choice, logits, chosen)
            except Exception as error:  # whatever a rule or a constraint of this request raised
                failed[choice.answer.ticket] = error
        numbers = odds(logits, chosen).tolist()
        others = likeliest(logits, _wanted(choices))
        events = []
        for choice in choices:
            error = failed.get(choice.answer.ticket)
            if error is not None:
                events.append(Event(choice.answer.ticket, None, error))
            else:
                events += self._write(choice, numbers, others)
        return events

    def _draw(self, choice: _Choice, logits: Tensor, chosen: Tensor) -> None:
        """Choose by the answer's own rules, draw and constraint: one token, and one more for each draft that was right."""
        answer, length = choice.answer, len(choice.answer.tokens)
        for place, draft in enumerate([*choice.drafts, -1]):
            row, constraint = choice.first + place, answer.request.constraint
            allowed = None if constraint is None else constraint.allowed().to(logits.device)
            text = answer.text[: length + place].to(logits.device)
            chosen[row] = answer.sampler.choose(text, logits[row], allowed)
            if constraint is None and draft < 0:
                return  # nothing here needs to know which it was
            token = int(chosen[row])
            if constraint is not None:
                constraint.advance(token)
            if token != draft or token in answer.ends:
                return
            answer.note(length + place, token)

    def _write(
        self,
        choice: _Choice,
        numbers: Sequence[Sequence[float]],
        others: dict[int, list[tuple[int, float]]],
    ) -> list[Event]:
        """Tell of the tokens that were chosen, and keep in the cache what was read of them."""
        answer, events = choice.answer, []
        start = len(answer.tokens)
        for place, draft in enumerate([*choice.drafts, -1]):
            row = choice.first + place
            number, logarithm, rank, entropy = numbers[row]
            if not math.isfinite(logarithm):
                return [*events, Event(answer.ticket, None, _not_finite())]
            prompt = answer.prompt_tokens() if len(answer.tokens) == answer.prompt_length else ()
            token = answer.write(int(number), (logarithm, int(rank), entropy), others.get(row, ()))
            events.append(Event(answer.ticket, token, None, prompt))
            if token.finish or token.id != draft:
                break
        self._tokens += len(events)
        self._accepted += len(events) - 1
        self._schedule.advance(answer, start + len(events) - 1)
        return events

    def _write_prompt(self, answer: Answer, piece: Piece, hidden: Tensor) -> None:
        """Keep the odds of the prompt's own tokens: each is told by the vector before it."""
        if piece.start == 0:
            answer.write_prompt(0, None, ())
        places = range(piece.start + 1, min(piece.end + 1, answer.prompt_length))
        if not places:
            return
        logits = self._logits(hidden[: len(places)])
        told = torch.tensor([answer.tokens[place] for place in places], device=logits.device)
        others = likeliest(logits, dict.fromkeys(range(len(places)), answer.request.prompt_odds or 0))
        for row, (place, numbers) in enumerate(zip(places, odds(logits, told).tolist(), strict=True)):
            answer.write_prompt(place, (numbers[1], int(numbers[2]), numbers[3]), others.get(row, ()))

    def stream(self, request: Request) -> Iterator[Token]:
        """Submit a request, when the first token is asked for, and go on until it is done; leaving early cancels it.

        Several streams of one engine may be read in turns.

        Raises:
            InputError: it can never run; while iterating, it failed, or too many wait.
        """
        self._require(request)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[Token]:
        ticket = self._open(request)
        try:
            while True:
                token = self._next(ticket)
                yield token
                if token.finish:
                    return
        finally:
            self._close(ticket)

    def complete(self, requests: Sequence[Request]) -> list[list[Token]]:
        """Answer any number of requests together.

        Returns:
            The tokens of each, in order.

        Raises:
            InputError: one can never run, or failed; the others are cancelled.
        """
        for request in requests:
            self._require(request)
        answers: dict[int, list[Token]] = {}
        most, left = self.settings.max_batch + self.settings.max_queue, deque(requests)
        try:
            while left or not all(tokens and tokens[-1].finish for tokens in answers.values()):
                while left and self._inside() < most:
                    answers[self._open(left.popleft())] = []
                self._hand_out()
                for ticket, tokens in answers.items():
                    tokens += [self._next(ticket) for _ in range(len(self._held[ticket]))]
            return list(answers.values())
        finally:
            for ticket in answers:
                self._close(ticket)

    def _open(self, request: Request) -> int:
        ticket = self.submit(request)
        self._held[ticket] = deque()
        return ticket

    def _next(self, ticket: int) -> Token:
        while not self._held[ticket]:
            self._hand_out()
        event = self._held[ticket].popleft()
        if event.token is None:
            raise event.error or RuntimeError("failed without an error")
        return event.token

    def _close(self, ticket: int) -> None:
        del self._held[ticket]
        self.cancel(ticket)

    def _hand_out(self) -> None:
        for event in self.step():
            if event.ticket in self._held:
                self._held[event.ticket].append(event)


def _each_alone(
    read: Callable[[Sequence[Item]], list[Tensor]], items: Sequence[Item]
) -> list[tuple[Item, Tensor | Exception]]:
    """Read all items at once; where that fails, each by itself, so that only those fail whose fault it is."""
    if not items:
        return []
    try:
        return list(zip(items, read(items), strict=True))
    except Exception as error:
        if len(items) == 1:
            return [(items[0], error)]
        return [outcome for item in items for outcome in _each_alone(read, [item])]


def _not_finite() -> InputError:
    return InputError(
        "the model's logits are not finite numbers", "model", "its weights are damaged or training diverged"
    )


def _wanted(choices: Sequence[_Choice]) -> dict[int, int]:
    """Rows of the logits whose likeliest tokens are shown, and how many."""
    return {
        choice.first + place: choice.answer.request.alternatives
        for choice in choices
        for place in range(len(choice.drafts) + 1)
    }


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    config: GenerationConfig,
    *,
    alternatives: int = 0,
    end_tokens: Collection[int] = (),
) -> Iterator[Token]:
    """Continue one prompt with an engine of its own, one token at a time.

    Args:
        model: a decoder in evaluation mode.
        tokenizer: the one it was trained with.
        prompt: token ids; empty for the start of a document.
        config: how tokens are drawn, and when to stop.
        alternatives: how many of the likeliest tokens to show beside each token.
        end_tokens: tokens that end the answer, besides the tokenizer's end_of_document.

    Returns:
        An iterator of tokens; the last one says why it is the last.

    Raises:
        InputError: the prompt leaves no room in the model's context, or holds an id that is no token; while
            iterating, the model's logits are not finite.
    """
    request = Request(tuple(prompt), config, alternatives, frozenset(end_tokens))
    return Engine(model, tokenizer, EngineSettings(max_batch=1)).stream(request)


class EngineThread:
    """Drives an engine in a thread of its own and tells each request's listener what happens to it.

    Listeners are called in that thread and must be quick; one that raises loses its request and disturbs nobody else.

    Args:
        engine: to be driven by nobody else.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._listeners: dict[int, Callable[[Event], None]] = {}
        self._condition = threading.Condition()
        self._stopping = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, drain_seconds: float = 0.0) -> bool:
        """Take no more requests, finish those there are for at most so long, end the thread and drop the rest.

        Requests that were dropped get an event with an error.

        Returns:
            Whether every request was finished.
        """
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
            drained = self._condition.wait_for(lambda: not self._listeners, drain_seconds)
            self._stopped = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._fail_all(InputError("the engine was stopped", "", "start it again"))
        return drained

    def submit(self, request: Request, listener: Callable[[Event], None]) -> int:
        """Put a request into the queue; thread-safe.

        Args:
            request: what to continue.
            listener: called with each event of it, from the engine's thread.

        Returns:
            Its ticket.

        Raises:
            QueueFull: too many wait, or the engine is stopping.
            InputError: it can never run.
        """
        with self._condition:
            if self._stopping:
                raise QueueFull("the engine is stopping", "", "try again later")
            ticket = self.engine.submit(request)
            self._listeners[ticket] = listener
            self._condition.notify_all()
            return ticket

    def cancel(self, ticket: int) -> None:
        """Stop a request; its listener hears nothing more. Thread-safe."""
        self.engine.cancel(ticket)
        with self._condition:
            self._listeners.pop(ticket, None)
            self._condition.notify_all()

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._stopped or not self.engine.is_idle)
                if self._stopped:
                    return
            try:
                events = self.engine.step()
            except Exception as error:  # a fault of the engine itself: everyone is told, and it begins anew
                self._fail_all(error)
                continue
            for event in events:
                self._tell(event)

    def _fail_all(self, error: Exception) -> None:
        self.engine.clear()
        for ticket in list(self._listeners):
            self._tell(Event(ticket, None, error))

    def _tell(self, event: Event) -> None:
        with self._condition:
            listener = self._listeners.get(event.ticket)
            if event.is_last:
                self._listeners.pop(event.ticket, None)
                self._condition.notify_all()
        if listener is None:
            return
        try:
            listener(event)
        except Exception:  # whoever listens broke, not the engine
            self.cancel(event.ticket)
