"""The only path by which anything generates: prompts' tokens in, tokens with their text and their odds out.

Knows models and tokenizers; nothing of files, terminals or servers.
"""

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.inference.cache import ContiguousCache
from glasshouse.inference.request import EngineSettings, EngineStatistics, Event, QueueFull, Request, Token
from glasshouse.inference.sampling import GenerationConfig, require_tokens
from glasshouse.inference.schedule import Answer
from glasshouse.models.decoder import Decoder
from glasshouse.text.tokenizer import Tokenizer


def require_request(request: Request, model: Decoder, tokenizer: Tokenizer) -> None:
    """Refuse what can never run.

    Raises:
        InputError: the prompt leaves no room in the model's context, or something names an id that is no token.
    """
    length, context = max(len(request.prompt), 1), model.config.context_length
    if length >= context:
        raise InputError(
            f"the prompt has {length:,} tokens and the model reads at most {context:,}, the new ones included",
            "prompt", "shorten the prompt",
        )  # fmt: skip
    if request.prompt and (min(request.prompt) < 0 or max(request.prompt) >= model.config.vocab_size):
        raise InputError(
            f"token {max(request.prompt)} in a vocabulary of {model.config.vocab_size:,}",
            "prompt",
            "use the model's tokenizer",
        )
    require_tokens(request.config, tokenizer.vocab_size)


class Engine:
    """Answers many requests at once.

    `submit` and `cancel` may be called from any thread; `step`, `stream` and `complete` by one at a time.

    Args:
        model: a decoder in evaluation mode.
        tokenizer: the one it was trained with.
        settings: what it may use.
    """

    def __init__(self, model: Decoder, tokenizer: Tokenizer, settings: EngineSettings | None = None):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings or EngineSettings()
        self._lock, self._tickets = threading.Lock(), itertools.count()
        self._waiting: deque[Answer] = deque()
        self._running: list[tuple[Answer, ContiguousCache]] = []
        self._cancelled: set[int] = set()
        self._steps = self._tokens = self._prompt_tokens = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not self._running

    @property
    def statistics(self) -> EngineStatistics:
        """How it is doing."""
        return EngineStatistics(
            len(self._waiting),
            len(self._running),
            0,
            0,
            self._steps,
            self._prompt_tokens,
            self._tokens,
            0,
            0,
            0,
        )

    def submit(self, request: Request) -> int:
        """Put a request into the queue.

        Returns:
            Its ticket, by which events name it.

        Raises:
            QueueFull: too many wait.
            InputError: it can never run.
        """
        require_request(request, self.model, self.tokenizer)
        with self._lock:
            if (
                len(self._waiting) >= self.settings.max_queue
                and len(self._running) >= self.settings.max_batch
            ):
                raise QueueFull(f"{len(self._waiting)} requests wait", "", "try again later")
            answer = Answer(next(self._tickets), request, self.tokenizer, self.model.config.context_length)
            self._waiting.append(answer)
            return answer.ticket

    def cancel(self, ticket: int) -> None:
        """Stop a request: no event of it comes from a later step, and its place is free. Unknown tickets do nothing."""
        with self._lock:
            self._cancelled.add(ticket)

    def step(self) -> list[Event]:
        """One token for each running request.

        Returns:
            What happened, in the order of the requests; empty when there is nothing to do.
        """
        with self._lock:
            gone, self._cancelled = self._cancelled, set()
            self._waiting = deque(answer for answer in self._waiting if answer.ticket not in gone)
            self._running = [pair for pair in self._running if pair[0].ticket not in gone]
            while self._waiting and len(self._running) < self.settings.max_batch:
                cache = ContiguousCache(self.model.config.num_layers)
                self._running.append((self._waiting.popleft(), cache))
        events = [self._advance(answer, cache) for answer, cache in self._running]
        over = {event.ticket for event in events if event.is_last}
        self._running = [pair for pair in self._running if pair[0].ticket not in over]
        self._steps += 1
        return events

    @torch.inference_mode()
    def _advance(self, answer: Answer, cache: ContiguousCache) -> Event:
        try:
            unread = torch.tensor([answer.tokens[cache.length :]])
            hidden = self.model(unread, cache=cache)[0, -1]
            # An embedding may have more rows than there are tokens, to make its size round.
            logits = self.model.logits(hidden)[: self.tokenizer.vocab_size].float()
            constraint = answer.request.constraint
            allowed = None if constraint is None else constraint.allowed()
            chosen = answer.sampler.choose(torch.tensor(answer.tokens), logits, allowed)
            number, logarithm, rank, entropy = _odds(logits, chosen).tolist()
            if not math.isfinite(logarithm):
                raise InputError(
                    "the model's logits are not finite numbers",
                    "model",
                    "its weights are damaged or training diverged",
                )
            if constraint is not None:
                constraint.advance(int(number))
            self._tokens += 1
            likeliest = _likeliest(logits, answer.request.alternatives)
            return Event(answer.ticket, answer.write(int(number), (logarithm, int(rank), entropy), likeliest))
        except Exception as error:
            return Event(answer.ticket, None, error)

    def stream(self, request: Request) -> Iterator[Token]:
        """Submit a request and go on until it is done; leaving the iterator early cancels it.

        Raises:
            InputError: it can never run; while iterating, it failed.
        """
        return self._drive(self.submit(request))

    def _drive(self, ticket: int) -> Iterator[Token]:
        done = False
        try:
            while not done:
                for event in self.step():
                    if event.ticket != ticket:
                        continue
                    done = event.is_last
                    if event.token is None:
                        raise event.error or RuntimeError("failed without an error")
                    yield event.token
        finally:
            if not done:
                self.cancel(ticket)

    def complete(self, requests: Sequence[Request]) -> list[list[Token]]:
        """Answer many requests together.

        Returns:
            The tokens of each, in order.

        Raises:
            InputError: one can never run, or failed.
        """
        answers: dict[int, list[Token]] = {self.submit(request): [] for request in requests}
        while not self.is_idle:
            for event in self.step():
                if event.token is None:
                    raise event.error or RuntimeError("failed without an error")
                if event.ticket in answers:
                    answers[event.ticket].append(event.token)
        return list(answers.values())


def _likeliest(logits: Tensor, count: int) -> list[tuple[int, float]]:
    if not count:
        return []
    top = logits.softmax(-1).topk(min(count, len(logits)))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _odds(logits: Tensor, chosen: Tensor) -> Tensor:
    """Id, log-probability, rank and entropy (nats) of the chosen token under softmax(logits): float64 [4]."""
    logs = logits.log_softmax(-1)
    rank = (logits > logits[chosen]).sum() + 1
    entropy = -(logs.exp() * logs).nan_to_num(0.0).sum()  # 0 · log 0 is 0
    return torch.stack([chosen.double(), logs[chosen].double(), rank.double(), entropy.double()])


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
        self._stopping, self._thread = False, threading.Thread(target=self._run, name="engine", daemon=True)

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
            left = list(self._listeners)
            self._stopped = True
            self._condition.notify_all()
        self._thread.join()
        for ticket in left:
            self._tell(Event(ticket, None, InputError("the engine was stopped", "", "start it again")))
        return drained

    _stopped = False

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
            for event in self.engine.step():
                self._tell(event)

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
