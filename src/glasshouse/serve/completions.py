"""Texts and conversations that are continued: a request becomes work for the engine, its tokens become an answer.

One way for streamed and whole answers: the same pieces, sent one by one or joined. Knows schemas, engines and shapes;
nothing of sockets.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glasshouse.inference.constrain import Constraint, compile_constraint
from glasshouse.inference.generate import end_tokens
from glasshouse.inference.request import Request, Token
from glasshouse.inference.sampling import GenerationConfig, expand, rank_answers
from glasshouse.serve.models import Served, random_seed
from glasshouse.serve.openai import (
    DONE,
    ApiError,
    chat_logprob,
    completion_logprobs,
    finish_reason,
    new_id,
    now,
    server_sent,
    usage,
)
from glasshouse.serve.schema import ChatRequest, CompletionRequest, Message, Tool, Writing
from glasshouse.serve.stream import Job
from glasshouse.serve.tools import OPENING, Call, CallReader, call_schema, must_call, offered_tools
from glasshouse.text.tokenizer import END_OF_TURN, Tokenizer


@dataclass(frozen=True)
class Plan:
    """What the engine has to do for one HTTP request.

    Args:
        requests: one per answer to write, the answers to a prompt side by side.
        prompts: token ids of each prompt, as the model reads it.
        names: of the tools whose calls are read out of the text.
        inside: whether the text begins within a call.
        begin: tokens at the start of each prompt that the client did not write.
        texts: the text of each prompt.
    """

    requests: list[Request]
    prompts: list[tuple[int, ...]]
    names: tuple[str, ...] = ()
    inside: bool = False
    begin: int = 0
    texts: tuple[str, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(map(len, self.prompts))


# ---- from a request to work


def plan_chat(served: Served, body: ChatRequest) -> Plan:
    """The work of a conversation. Takes a while: renders the template, tokenizes, compiles schemas.

    Raises:
        ApiError: a field asks for what cannot be.
        InputError: the template refuses the messages, or a schema cannot be followed.
    """
    served.require_writer()
    tokenizer, tools, called = served.artifact.tokenizer, offered_tools(body), must_call(body)
    prompt = tokenizer.encode_chat(plain_messages(body.messages), plain_tools(tools), True)
    prompt += tokenizer.encode(OPENING) if called else []
    ends = {*end_tokens(served.artifact), *_turn_ends(tokenizer)}
    asked = body.max_completion_tokens or body.max_tokens
    room = max(served.context_length - len(prompt), 1)
    config = generation_config(body, served, asked or room)
    constraint = _constraint(body, tools if called else [], tokenizer, ends)
    request = Request(
        tuple(prompt),
        config,
        alternatives=(body.top_logprobs or 0) if body.logprobs else 0,
        end_tokens=frozenset(ends),
    )
    names = tuple(tool.function.name for tool in tools)
    return Plan(_copies(request, constraint), [tuple(prompt)], names, called)


def _turn_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token that closes a turn, where the tokenizer has ours."""
    return (tokenizer.special[END_OF_TURN],) if END_OF_TURN in tokenizer.special else ()


def _constraint(
    body: ChatRequest, called: Sequence[Tool], tokenizer: Tokenizer, ends: set[int]
) -> Constraint | None:
    """What the answer must look like, if anything."""
    if called:
        return compile_constraint("json_schema", call_schema(called), tokenizer, ends, "tools")
    form = body.response_format
    if form is None or form.type == "text":
        return None
    schema = form.json_schema.schema_ if form.json_schema else None
    return compile_constraint(form.type, schema, tokenizer, ends, "response_format")


def _copies(request: Request, constraint: Constraint | None) -> list[Request]:
    """One request per answer, each with its seed and with a constraint of its own."""
    return [
        replace(request, config=config, constraint=constraint.fork() if constraint else None)
        for config in expand(request.config)
    ]


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates know them: text content, "developer" as "system", empty keys left out."""
    plain = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        shape: dict[str, Any] = {"role": role, "content": message.text}
        if message.tool_calls:
            shape["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        for name in ("name", "tool_call_id"):
            shape |= {name: getattr(message, name)} if getattr(message, name) is not None else {}
        plain.append(shape)
    return plain


def plain_tools(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """Tools as templates know them; None where there are none."""
    return [tool.model_dump(exclude_none=True) for tool in tools] or None


def generation_config(
    body: Writing, served: Served, new_tokens: int, best_of: int | None = None
) -> GenerationConfig:
    """How text is drawn, from the fields of a request; OpenAI's default where there is none.

    Raises:
        ApiError: more tokens are asked for than the model's context holds.
    """
    if new_tokens > served.context_length:
        message = (
            f"{new_tokens:,} new tokens do not fit a context of {served.context_length:,}: ask for fewer"
        )
        raise ApiError(400, message, "max_tokens", "context_length_exceeded")
    return GenerationConfig(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=body.logit_bias or {},
        seed=random_seed() if body.seed is None else body.seed % 2**63,
        max_new_tokens=new_tokens,
        stop=tuple(body.stop or ()),
        n=body.n or 1,
        best_of=best_of,
    )


def plan_completion(served: Served, body: CompletionRequest) -> Plan:
    """The work of texts to continue. Takes a while: tokenizes.

    Raises:
        ApiError: a field asks for what cannot be.
    """
    served.require_writer()
    tokenizer = served.artifact.tokenizer
    given = [""] if body.prompt is None else body.prompt
    largest = max((max(item) for item in given if not isinstance(item, str)), default=0)
    if largest >= tokenizer.vocab_size:
        message = f"a token in the prompt is no token: give numbers from 0 to {tokenizer.vocab_size - 1:,}"
        raise ApiError(400, message, "prompt", "invalid_value")
    prompts = [tuple(tokenizer.prompt(item) if isinstance(item, str) else item) for item in given]
    texts = [item if isinstance(item, str) else tokenizer.decode(item, keep_special=True) for item in given]
    begin = len(tokenizer.prompt("")) if isinstance(given[0], str) else 0
    config = generation_config(
        body, served, 16 if body.max_tokens is None else max(body.max_tokens, 1), body.best_of
    )
    alternatives = body.logprobs or 0
    odds = alternatives if body.echo and body.logprobs is not None else None
    ends = frozenset(end_tokens(served.artifact))
    requests = [
        Request(prompt, one, alternatives, ends, prompt_odds=odds)
        for prompt in prompts
        for one in expand(config)
    ]
    return Plan(requests, prompts, begin=begin, texts=tuple(texts))


# ---- from tokens to an answer: chat


class ChatAnswer:
    """One answer of a conversation while it comes: what is new with each token, and the whole.

    Args:
        tokenizer: names tokens.
        plan: says which tools may be called.
        body: says what is shown.
    """

    def __init__(self, tokenizer: Tokenizer, plan: Plan, body: ChatRequest):
        self._tokenizer, self._logprobs = tokenizer, bool(body.logprobs)
        self._reader = CallReader(plan.names, plan.inside, single=body.parallel_tool_calls is False)
        self.content = ""
        self.calls: list[Call] = []
        self.logprobs: list[dict[str, Any]] = []
        self.ids: list[int] = []
        self.finish = ""

    def add(self, token: Token) -> list[str | Call]:
        """Take the next token; returns what is certain now, in order."""
        self.ids.append(token.id)
        if self._logprobs:
            self.logprobs.append(chat_logprob(self._tokenizer, token))
        found = self._reader.push(token.text)
        found += self._reader.flush() if token.finish else []
        for item in found:
            if isinstance(item, Call):
                self.calls.append(item)
            else:
                self.content += item
        if token.finish:
            self.finish = "tool_calls" if self.calls else finish_reason(token.finish)
        return found

    def choice(self, index: int, ids: bool) -> dict[str, Any]:
        """The whole answer in OpenAI's shape."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.calls:
            message |= {"content": self.content or None, "tool_calls": [call.shape() for call in self.calls]}
        shown = {"content": self.logprobs, "refusal": None} if self._logprobs else None
        choice = {"index": index, "message": message, "logprobs": shown, "finish_reason": self.finish}
        return choice | ({"token_ids": self.ids} if ids else {})

    def deltas(self, found: Sequence[str | Call]) -> list[dict[str, Any]]:
        """What is new, in the shape of a stream; one empty piece where there is none but a token must be shown."""
        start = len(self.calls) - sum(isinstance(item, Call) for item in found)
        deltas: list[dict[str, Any]] = []
        for item in found:
            if isinstance(item, Call):
                deltas.append({"tool_calls": [item.shape(start)]})
                start += 1
            else:
                deltas.append({"content": item})
        return deltas


async def whole_chat(job: Job, plan: Plan, body: ChatRequest, served: Served) -> dict[str, Any]:
    """The answer in one piece."""
    answers = [ChatAnswer(served.artifact.tokenizer, plan, body) for _ in plan.requests]
    async for piece in job.pieces():
        answers[piece.number].add(piece.token)
    head = {"id": new_id("chatcmpl-"), "object": "chat.completion", "created": now(), "model": served.name}
    ids = bool(body.return_token_ids)
    choices = [answer.choice(index, ids) for index, answer in enumerate(answers)]
    extra = {"prompt_token_ids": list(plan.prompts[0])} if ids else {}
    return {**head, "choices": choices, "usage": usage(plan.prompt_tokens, job.count), **extra}


async def chat_events(job: Job, plan: Plan, body: ChatRequest, served: Served) -> AsyncIterator[bytes]:
    """The answer as server-sent events."""
    stream = _Stream("chatcmpl-", "chat.completion.chunk", body, plan, served)
    answers = [ChatAnswer(served.artifact.tokenizer, plan, body) for _ in plan.requests]
    for index in range(len(answers)):
        yield stream.chunk(index, {"delta": {"role": "assistant", "content": ""}})
    async for piece in job.pieces():
        answer = answers[piece.number]
        deltas = answer.deltas(answer.add(piece.token))
        more = {"token_ids": [piece.token.id]} if body.return_token_ids else {}
        shown = {"content": answer.logprobs[-1:], "refusal": None} if body.logprobs else None
        if not deltas and (more or shown):
            deltas = [{"content": ""}]
        for number, delta in enumerate(deltas):
            first = {"logprobs": shown, **more} if number == 0 else {}
            yield stream.chunk(piece.number, {"delta": delta, **first})
        if answer.finish:
            yield stream.chunk(piece.number, {"delta": {}, "finish_reason": answer.finish})
    for event in stream.end(job.count):
        yield event


class _Stream:
    """The chunks of one streamed answer."""

    def __init__(self, prefix: str, kind: str, body: Writing, plan: Plan, served: Served):
        self._head = {"id": new_id(prefix), "object": kind, "created": now(), "model": served.name}
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._plan, self._ids = plan, bool(body.return_token_ids)

    def chunk(self, index: int, facts: dict[str, Any]) -> bytes:
        """One chunk of one answer; the first says the ids of the prompts where they are asked for."""
        choice = {"index": index, "logprobs": None, "finish_reason": None, **facts}
        extra: dict[str, Any] = {"usage": None} if self._usage else {}
        if self._ids:
            prompts = [list(prompt) for prompt in self._plan.prompts]
            extra["prompt_token_ids"] = prompts[0] if len(prompts) == 1 else prompts
            self._ids = False
        return server_sent({**self._head, "choices": [choice], **extra})

    def end(self, count: int) -> list[bytes]:
        """What it cost, where that is asked for, and the end."""
        total = {**self._head, "choices": [], "usage": usage(self._plan.prompt_tokens, count)}
        return [*([server_sent(total)] if self._usage else []), DONE]


# ---- from tokens to an answer: completion


class TextAnswer:
    """One continued text while it comes.

    Args:
        tokenizer: names tokens.
        plan: holds the prompt.
        body: says what is shown.
        number: of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, plan: Plan, body: CompletionRequest, number: int):
        self._tokenizer, self._plan, self._body, self._number = tokenizer, plan, body, number
        self._length = 0
        self.tokens: list[Token] = []
        self.prompt: tuple[Token, ...] = ()
        self.text = ""
        self.finish = ""

    def add(self, token: Token, prompt: tuple[Token, ...]) -> dict[str, Any] | None:
        """Take the next token; returns what is new in the shape of a stream, None where nothing is."""
        shown, texts, text = [], [], ""
        if not self.tokens and not self.prompt and self._body.echo:
            self.prompt, text = prompt, self._plan.texts[self._number]
            shown, texts = list(prompt), self._prompt_texts(prompt)
        if self._body.max_tokens == 0:
            token = replace(token, text="", finish="length")
            self.finish = "length"
        else:
            self.tokens.append(token)
            shown, texts, text = [*shown, token], [*texts, token.text], text + token.text
            self.finish = finish_reason(token.finish) if token.finish else ""
        self.text += text
        offset, self._length = self._length, self._length + len(text)
        more: dict[str, Any] = {"text": text, "logprobs": self._logprobs(shown, texts, offset)}
        if self._body.return_token_ids:
            more["token_ids"] = [token.id for token in self.tokens[-1:]]
        visible = text or self.finish or len(more) > 2 or more["logprobs"]
        return {**more, "finish_reason": self.finish or None} if visible else None

    def _prompt_texts(self, prompt: Sequence[Token]) -> list[str]:
        """What each token of the prompt adds to its text: nothing, for those the client did not write."""
        stream = self._tokenizer.decode_stream(keep_special=True)
        texts = [stream.step(token.id) for token in prompt[self._plan.begin :]]
        return [""] * min(self._plan.begin, len(prompt)) + texts

    def _logprobs(self, tokens: Sequence[Token], texts: Sequence[str], offset: int) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        return completion_logprobs(self._tokenizer, tokens, texts, offset, bool(self._body.return_token_ids))

    def choice(self, index: int) -> dict[str, Any]:
        """The whole answer in OpenAI's shape."""
        tokens = [*self.prompt, *self.tokens]
        texts = [*self._prompt_texts(self.prompt), *(token.text for token in self.tokens)]
        choice = {
            "index": index,
            "text": self.text,
            "logprobs": self._logprobs(tokens, texts, 0),
            "finish_reason": self.finish,
        }
        if self._body.return_token_ids:
            choice |= {
                "token_ids": [token.id for token in self.tokens],
                "prompt_token_ids": list(self._plan.prompts[self._number]),
            }
        return choice


def _text_answers(plan: Plan, body: CompletionRequest, served: Served) -> list[TextAnswer]:
    each = len(plan.requests) // len(plan.prompts)
    return [
        TextAnswer(served.artifact.tokenizer, plan, body, number // each)
        for number in range(len(plan.requests))
    ]


async def whole_completion(job: Job, plan: Plan, body: CompletionRequest, served: Served) -> dict[str, Any]:
    """The answers in one piece; of `best_of` answers to a prompt the n likeliest."""
    answers = _text_answers(plan, body, served)
    async for piece in job.pieces():
        answers[piece.number].add(piece.token, piece.prompt)
    kept, each = [], len(plan.requests) // len(plan.prompts)
    for start in range(0, len(answers), each):
        group = answers[start : start + each]
        count = body.n or 1
        odds = [[token.probability for token in answer.tokens] for answer in group]
        best = rank_answers(odds, count) if count < each else range(each)
        kept += [group[place] for place in best]
    head = {"id": new_id("cmpl-"), "object": "text_completion", "created": now(), "model": served.name}
    choices = [answer.choice(index) for index, answer in enumerate(kept)]
    written = sum(len(answer.tokens) for answer in answers)
    extra = {"prompt_token_ids": list(plan.prompts[0])} if body.return_token_ids else {}
    return {**head, "choices": choices, "usage": usage(plan.prompt_tokens, written), **extra}


async def completion_events(
    job: Job, plan: Plan, body: CompletionRequest, served: Served
) -> AsyncIterator[bytes]:
    """The answers as server-sent events."""
    stream = _Stream("cmpl-", "text_completion", body, plan, served)
    answers = _text_answers(plan, body, served)
    async for piece in job.pieces():
        facts = answers[piece.number].add(piece.token, piece.prompt)
        if facts is not None:
            yield stream.chunk(piece.number, facts)
    for event in stream.end(sum(len(answer.tokens) for answer in answers)):
        yield event
