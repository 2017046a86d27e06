"""The Responses interface, stateless: its fields become a chat request, the chat's pieces its items and events.

Nothing is stored, so nothing can be fetched or continued by id. Knows the shapes of both; how a conversation is
answered is the business of completions.py.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from glasshouse.serve.completions import ChatAnswer, Plan
from glasshouse.serve.models import Served
from glasshouse.serve.openai import ApiError, api_error, new_id, now, server_sent, unsupported
from glasshouse.serve.schema import (
    MOST_LOGPROBS,
    MOST_MESSAGES,
    MOST_TOOLS,
    ChatRequest,
    Content,
    Fields,
    Name,
    NewTokens,
    Sampling,
    Switch,
    Table,
    Text,
)
from glasshouse.serve.stream import Job
from glasshouse.serve.tools import Call

LOGPROBS = "message.output_text.logprobs"


class InputItem(BaseModel):
    """A message, a call that the model made, or what a call gave."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Content = None
    call_id: str | None = Field(None, max_length=256)
    name: Name | None = None
    arguments: Text | None = None
    output: Content = None

    @model_validator(mode="after")
    def _is_whole(self) -> "InputItem":
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
        }[self.type]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"{name}: an item of type {self.type} needs it")
        return self

    def message(self) -> dict[str, Any]:
        """The same as a message of a chat."""
        if self.type == "function_call":
            call = {"id": self.call_id, "function": {"name": self.name, "arguments": self.arguments}}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        if self.type == "function_call_output":
            return {"role": "tool", "content": self.output, "tool_call_id": self.call_id}
        return {"role": self.role, "content": self.content}


class FunctionTool(Fields):
    """A function that the model may call."""

    type: Literal["function"]
    name: Name
    description: Text | None = None
    parameters: Table | None = None
    strict: Switch | None = None


class ChosenFunction(Fields):
    """The function that must be called."""

    type: Literal["function"]
    name: Name


class TextFormat(Fields):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name | None = None
    description: Text | None = None
    schema_: Table | None = Field(default=None, alias="schema")
    strict: Switch | None = None


class TextOptions(Fields):
    """How the text is given."""

    format: TextFormat | None = None
    verbosity: str | None = Field(None, max_length=100, description="Ignored.")


class ResponsesRequest(Sampling):
    """A conversation to go on with: POST /v1/responses."""

    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: NewTokens | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | None = None
    parallel_tool_calls: Switch | None = None
    text: TextOptions | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = Field(None, max_length=1)
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS, strict=True)
    store: bool | None = Field(None, description="Nothing is stored here, whatever this says.")
    previous_response_id: str | None = Field(None, max_length=256, description="Refused: nothing is stored.")
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    reasoning: Table | None = Field(None, max_length=16, description="Ignored.")


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The same request to the chat interface.

    Raises:
        ApiError: it continues a response by id.
        pydantic.ValidationError: the parts do not fit together.
    """
    if body.previous_response_id is not None:
        raise unsupported(
            "previous_response_id", "nothing is stored here: send the whole conversation as input"
        )
    start = [{"role": "system", "content": body.instructions}] if body.instructions else []
    items = body.input
    messages = (
        [{"role": "user", "content": items}] if isinstance(items, str) else [item.message() for item in items]
    )
    facts: dict[str, Any] = {name: getattr(body, name) for name in Sampling.model_fields}
    facts |= {"messages": [*start, *messages], "max_completion_tokens": body.max_output_tokens}
    if body.tools:
        facts["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools
        ]
    choice = body.tool_choice
    facts["tool_choice"] = (
        {"type": "function", "function": {"name": choice.name}}
        if isinstance(choice, ChosenFunction)
        else choice
    )
    facts["parallel_tool_calls"] = body.parallel_tool_calls
    if body.include or body.top_logprobs is not None:
        facts |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    form = body.text.format if body.text else None
    if form is not None:
        schema = {"name": form.name or "answer", "schema": form.schema_ or {}}
        described = {"json_schema": schema} if form.type == "json_schema" else {}
        facts["response_format"] = {"type": form.type, **described}
    return ChatRequest.model_validate(facts)


class Record:
    """A response while it comes: its items, and what it looks like at any moment.

    Args:
        body: the request.
        served: the model.
        plan: the work.
    """

    def __init__(self, body: ResponsesRequest, served: Served, plan: Plan, chat: ChatRequest):
        self._body, self._served, self._plan = body, served, plan
        self._answer = ChatAnswer(served.artifact.tokenizer, plan, chat)
        self._id, self._created, self._number = new_id("resp_"), now(), -1
        self._logprobs = bool(chat.logprobs)
        self._shown = 0
        self.items: list[dict[str, Any]] = []

    def shape(self, status: str, count: int, error: ApiError | None = None) -> dict[str, Any]:
        """The response as it is now."""
        body, prompt = self._body, self._plan.prompt_tokens
        done = status in ("completed", "incomplete")
        spent = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": count,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + count,
        }
        form = body.text.format if body.text else None
        choice = body.tool_choice
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._served.name,
            "output": self.items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {
                "format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}
            },
            "tool_choice": choice.model_dump() if isinstance(choice, ChosenFunction) else choice or "auto",
            "tools": [
                {"parameters": None, "strict": False, **tool.model_dump(exclude_none=True)}
                for tool in body.tools or ()
            ],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": spent if done else None,
            "user": body.user,
        }

    @property
    def status(self) -> str:
        """How it ended."""
        return "incomplete" if self._answer.finish == "length" else "completed"

    def event(self, kind: str, facts: dict[str, Any]) -> bytes:
        """One event, numbered."""
        self._number += 1
        return server_sent({"type": kind, "sequence_number": self._number, **facts}, kind)

    def add(self, token: Any) -> list[bytes]:
        """Take the next token; the events that tell of it."""
        events: list[bytes] = []
        for item in self._answer.add(token):
            if isinstance(item, Call):
                events += self._close_message() + self._call(item)
            else:
                events += self._write(item)
        if token.finish:
            if not self.items:
                events += self._open_message()
            events += self._close_message()
        return events

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    @property
    def _is_writing(self) -> bool:
        return bool(self.items) and self.items[-1]["status"] == "in_progress"

    def _open_message(self) -> list[bytes]:
        item = {"id": new_id("msg_"), "type": "message", "role": "assistant", "status": "in_progress"}
        self.items.append({**item, "content": []})
        added = self.event(
            "response.output_item.added", {"output_index": len(self.items) - 1, "item": self.items[-1]}
        )
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items[-1]["content"].append(part)
        return [
            added,
            self.event("response.content_part.added", {**self._place(), "content_index": 0, "part": part}),
        ]

    def _write(self, text: str) -> list[bytes]:
        events = [] if self._is_writing else self._open_message()
        part = self.items[-1]["content"][0]
        fresh = self._answer.logprobs[self._shown :]
        self._shown += len(fresh)
        part["text"] += text
        part["logprobs"] += fresh
        facts = {**self._place(), "content_index": 0, "delta": text, "logprobs": fresh}
        return [*events, self.event("response.output_text.delta", facts)]

    def _close_message(self) -> list[bytes]:
        if not self._is_writing:
            return []
        part = self.items[-1]["content"][0]
        part["logprobs"] += self._answer.logprobs[self._shown :]
        self._shown = len(self._answer.logprobs)
        self.items[-1]["status"] = "incomplete" if self._answer.finish == "length" else "completed"
        place = {**self._place(), "content_index": 0}
        item = {"output_index": place["output_index"], "item": self.items[-1]}
        text = {**place, "text": part["text"], "logprobs": part["logprobs"]}
        return [
            self.event("response.output_text.done", text),
            self.event("response.content_part.done", {**place, "part": part}),
            self.event("response.output_item.done", item),
        ]

    def _call(self, call: Call) -> list[bytes]:
        item = {"id": new_id("fc_"), "type": "function_call", "call_id": call.id, "name": call.name}
        self.items.append({**item, "arguments": "", "status": "in_progress"})
        place = self._place()
        number = {"output_index": place["output_index"]}
        events = [
            self.event("response.output_item.added", {**number, "item": self.items[-1]}),
            self.event("response.function_call_arguments.delta", {**place, "delta": call.arguments}),
            self.event("response.function_call_arguments.done", {**place, "arguments": call.arguments}),
        ]
        self.items[-1] |= {"arguments": call.arguments, "status": "completed"}
        return [*events, self.event("response.output_item.done", {**number, "item": self.items[-1]})]


async def whole_response(job: Job, record: Record) -> dict[str, Any]:
    """The response in one piece: what its events add up to."""
    async for piece in job.pieces():
        record.add(piece.token)
    return record.shape(record.status, job.count)


async def response_events(job: Job, record: Record) -> AsyncIterator[bytes]:
    """The response as server-sent events; one that fails says so in its last."""
    try:
        yield record.event("response.created", {"response": record.shape("in_progress", 0)})
        yield record.event("response.in_progress", {"response": record.shape("in_progress", 0)})
        async for piece in job.pieces():
            for event in record.add(piece.token):
                yield event
        done = record.shape(record.status, job.count)
        yield record.event(f"response.{record.status}", {"response": done})
    except Exception as error:
        shown = record.shape("failed", job.count, api_error(error))
        yield record.event("response.failed", {"response": shown})
        raise
