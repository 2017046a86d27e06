"""Calls of functions: what the model is told of them, and how they are read out of what it writes.

A call is written as the chat template teaches it: `<tool_call>`, a line with JSON of a name and arguments,
`</tool_call>`. Where a call must come, the prompt already begins one and a constraint lets nothing but one of the
functions follow. Knows text and JSON; nothing of models.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glasshouse.serve.openai import new_id
from glasshouse.serve.schema import ChatRequest, NamedTool, Tool

BEGIN, END = "<tool_call>", "</tool_call>"
OPENING = "<tool_call>\n"
"""What the prompt ends with where a call must come."""


@dataclass(frozen=True)
class Call:
    """A call the model made: its id, the function's name, and the arguments as JSON text."""

    id: str
    name: str
    arguments: str

    def shape(self, index: int | None = None) -> dict[str, Any]:
        """OpenAI's shape; with an index in a stream."""
        place = {} if index is None else {"index": index}
        function = {"name": self.name, "arguments": self.arguments}
        return {**place, "id": self.id, "type": "function", "function": function}


def must_call(request: ChatRequest) -> bool:
    """Whether the answer has to be a call."""
    return bool(request.tools) and (
        request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)
    )


def offered_tools(request: ChatRequest) -> list[Tool]:
    """The tools the model is told of: none where it may not call, one where one is named."""
    if request.tool_choice == "none":
        return []
    tools = request.tools or []
    if isinstance(request.tool_choice, NamedTool):
        return [tool for tool in tools if tool.function.name == request.tool_choice.function.name]
    return tools


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The JSON schema of a call of one of some tools."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def read_call(text: str, names: Sequence[str]) -> Call | None:
    """A call from its JSON; None where it is none or names no tool there is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(new_id("call_"), value["name"], arguments)


class CallReader:
    """Reads calls out of text that arrives in pieces; what is no call stays text, nothing is lost.

    Args:
        names: of the tools; without any, everything is text.
        inside: whether the text begins within a call, because the prompt began it.
        single: whether only the first call is read, the rest being text.
    """

    def __init__(self, names: Sequence[str], inside: bool = False, single: bool = False):
        self._names, self._inside, self._single = tuple(names), inside, single
        self._held = ""
        self.count = 0

    def push(self, text: str) -> list[str | Call]:
        """What is certain now: pieces of text, and whole calls."""
        if not self._names or (self._single and self.count and not self._inside):
            return [text] if text else []
        self._held += text
        found: list[str | Call] = []
        while (step := self._next()) is not None:
            found += [step] if step else []
        return found

    def _next(self) -> str | Call | None:
        """The next certain thing, "" for a step that gives nothing, None where more must come first."""
        if self._inside:
            inner, mark, rest = self._held.partition(END)
            if not mark:
                return None
            self._held, self._inside = rest.removeprefix("\n"), False
            call = read_call(inner, self._names)
            self.count += call is not None
            return call or BEGIN + inner + END
        if self._single and self.count:
            text, self._held = self._held, ""
            return text or None
        before, mark, rest = self._held.partition(BEGIN)
        if mark:
            self._held, self._inside = rest, True
            return before.removesuffix("\n")
        certain = len(self._held) - _overlap(self._held)
        text, self._held = self._held[:certain], self._held[certain:]
        return text or None

    def flush(self) -> list[str | Call]:
        """What is left when nothing more comes: a call whose closing mark is missing counts if its JSON is whole."""
        held, self._held = self._held, ""
        if not self._inside:
            return [held] if held else []
        self._inside = False
        call = read_call(held, self._names)
        self.count += call is not None
        return [call or (BEGIN + held)]


def _overlap(text: str) -> int:
    """How much of the end of a text could still become the opening mark, a line break before it included."""
    for length in range(min(len(text), len(BEGIN)), 0, -1):
        if ("\n" + BEGIN).startswith(text[-length:]) or BEGIN.startswith(text[-length:]):
            return length
    return 0
