"""What a model is to learn to answer: conversations and pairs, read from the formats people have.

Read are jsonl, json, csv, tsv and parquet, each also .gz, .xz or .zst, with records in one of these forms, found out
from the first record:
- messages: OpenAI's {"messages": [{"role", "content"}, ...], "tools": [...]}
- sharegpt: {"conversations": [{"from": "human", "value": ...}, ...], "system", "tools"}
- alpaca: {"instruction", "input", "output"}, also with "system" and "history"
- completion: {"prompt", "completion"}; the prompt may be a list of messages
- preference: {"prompt", "chosen", "rejected"}; each a text, a message or a list of messages; also HH's "Human: ..."
- judged: {"prompt", "completion", "label": true or false}
- pair: a file of two columns

The policy, each case counted in `ExampleCounts` with the rows' names: a row that is no JSON, lacks a field, has a role
that is not known, ends without an answer, has an empty answer, a chosen answer equal to the rejected one, or occurred
before is left out. Knows nothing of tokens or templates.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glasshouse.corpus import formats
from glasshouse.corpus.formats import FORMATS, Row
from glasshouse.corpus.source import COMPRESSIONS, ByteCounts, SourceError, TextStream, read_chunks
from glasshouse.errors import InputError

Message = Mapping[str, Any]

ROW_BYTES = 16 * 2**20
"""Longest record that is read."""

FILE_BYTES = 2**36
COMPRESSION_RATIO = 200
NAMED = 5
"""Rows that are named for each reason."""

ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "function_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
    "ipython": "tool",
}  # fmt: skip
"""Names of roles in use, and ours."""

ANSWERS = ("completion", "response", "answer", "output", "target")
QUESTIONS = ("prompt", "question", "query", "input", "source")
FORMS = "messages, conversations, instruction + output, prompt + completion, prompt + chosen + rejected, or two columns"
HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")


@dataclass(frozen=True)
class Example:
    """A conversation that ends in an answer to learn, or in two to choose between.

    Args:
        row: where it was read: file and number of the row.
        messages: {"role", "content", ...}, oldest first; roles are system, user, assistant and tool.
        answer: the messages that the model is to write, the last ones of the conversation.
        rejected: what it is not to write instead; empty where there is no such thing.
        tools: JSON schemas of functions that may be called.
        good: whether the answer is a good one (False only in the form "judged").
    """

    row: str
    messages: tuple[Message, ...]
    answer: tuple[Message, ...]
    rejected: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    good: bool = True

    @property
    def conversation(self) -> list[Message]:
        """The messages and the answer."""
        return [*self.messages, *self.answer]


@dataclass
class ExampleCounts:
    """What was read and what was left out.

    Args:
        form: the form of the records.
        kept: examples.
        dropped: how many rows were left out, by reason.
        rows: names of the first few rows of each reason.
        shortened: how many were cut at their end because of their length.
        shortened_rows: names of the first few of those.
    """

    form: str = ""
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    rows: dict[str, list[str]] = field(default_factory=dict)
    shortened: int = 0
    shortened_rows: list[str] = field(default_factory=list)

    def shorten(self, row: str) -> None:
        """Count a row whose end was cut off."""
        self.shortened += 1
        if len(self.shortened_rows) < NAMED:
            self.shortened_rows.append(row)

    def drop(self, reason: str, row: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] += 1
        named = self.rows.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(row)

    def lines(self) -> list[str]:
        """One line for each reason, with the rows' names."""
        found = [
            f"left out {_count(count)}: {reason} ({_names(self.rows[reason], count)})"
            for reason, count in self.dropped.most_common()
        ]
        if self.shortened:
            names = _names(self.shortened_rows, self.shortened)
            found.append(f"cut {_count(self.shortened)} at the end: too long for a row ({names})")
        return found


def _count(rows: int) -> str:
    return f"{rows:,} {'row' if rows == 1 else 'rows'}"


def _names(rows: list[str], count: int) -> str:
    return ", ".join(rows) + (", ..." if count > len(rows) else "")


class _RowError(Exception):
    """A row that is left out, and why."""


def read_examples(paths: Sequence[str | Path], counts: ExampleCounts, *, form: str = "") -> list[Example]:
    """Read every example of some files.

    Args:
        paths: files.
        counts: filled while reading.
        form: the form of the records; found out from the first one when empty.

    Raises:
        InputError: there is no such file, its format or the form of its records is not known, or no row is an example.
    """
    found: list[Example] = []
    seen: set[str] = set()
    for path in map(Path, paths):
        for row in _rows(path):
            name = f"{path.name}:{row.number or row.line}"
            if row.problem:
                if row.problem not in ("blank", "header", "markup"):
                    counts.drop(row.problem.replace("_", " "), name)
                continue
            counts.form = counts.form or form or detect_form(row.value, path)
            try:
                example = READERS[counts.form](row.value, name)
                _check(example)
            except _RowError as error:
                counts.drop(str(error), name)
                continue
            key = json.dumps([example.conversation, example.rejected, example.tools, example.good])
            if key in seen:
                counts.drop("occurred before", name)
                continue
            seen.add(key)
            found.append(example)
            counts.kept += 1
    if not found:
        raise InputError(
            "no row is an example" + "".join(f"; {line}" for line in counts.lines()),
            ", ".join(map(str, paths)),
            f"give records of {FORMS}",
        )
    return found


def detect_form(record: Any, path: Path | str = "") -> str:
    """The form of a record.

    Raises:
        InputError: it is none that is known; says which fields there are.
    """
    if isinstance(record, list):
        return "messages" if record and all(isinstance(one, Mapping) for one in record) else "pair"
    names = set(record) if isinstance(record, Mapping) else set()
    if {"chosen", "rejected"} <= names:
        return "preference"
    if isinstance(record, Mapping) and isinstance(record.get("messages"), list):
        return "messages"
    if isinstance(record, Mapping) and isinstance(record.get("conversations"), list):
        return "sharegpt"
    if "instruction" in names and ({"output", "response"} & names):
        return "alpaca"
    if names & set(QUESTIONS) and names & set(ANSWERS):
        return "judged" if isinstance(record.get("label"), bool) else "completion"
    if len(names) == 2 and all(isinstance(value, str) for value in record.values()):
        return "pair"
    there = ", ".join(sorted(map(str, names))[:20]) or type(record).__name__
    raise InputError(f"records of an unknown form; the fields there are {there}", str(path), f"give {FORMS}")


def _rows(path: Path) -> Iterator[Row]:
    """The records of a file."""
    compression = COMPRESSIONS.get(path.suffix.lower(), "")
    kind = FORMATS.get((path.with_suffix("") if compression else path).suffix.lower(), "")
    if not path.is_file():
        raise InputError("no such file", str(path), "check the path")
    if kind == "parquet" and not compression:
        yield from formats.parquet_rows(path, list, FILE_BYTES)
        return
    readers = {
        "json_lines": lambda text: formats.json_line_rows(text, ROW_BYTES),
        "json": lambda text: formats.json_rows(text, ROW_BYTES),
        "csv": lambda text: formats.table_rows(text, False, ROW_BYTES, True),
        "tsv": lambda text: formats.table_rows(text, True, ROW_BYTES, False),
    }
    if kind not in readers:
        raise InputError(
            "not a format that examples are read from", str(path), "give jsonl, json, csv, tsv or parquet"
        )
    chunks = read_chunks(path, compression, ratio=COMPRESSION_RATIO, limit=FILE_BYTES)
    try:
        yield from readers[kind](TextStream(chunks, ByteCounts(), "", False).chunks())
    except SourceError as error:
        raise InputError(f"{error.reason} {error.detail}", str(path), "give a whole file") from None


def _check(example: Example) -> None:
    """Refuse an example that nothing can be learned from."""
    if not any(text_of(message).strip() or message.get("tool_calls") for message in example.answer):
        raise _RowError("the answer is empty")
    if example.rejected and list(example.rejected) == list(example.answer):
        raise _RowError("the chosen answer is the rejected one")


def text_of(message: Message) -> str:
    """The content of a message as text."""
    return str(message.get("content") or "")


# ---- messages


def _message(role: Any, content: Any, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    name = ROLES.get(str(role).lower())
    if name is None:
        raise _RowError(f"unknown role {str(role)[:20]!r}")
    if isinstance(content, list):  # OpenAI's parts of text
        content = "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
    if content is not None and not isinstance(content, str):
        raise _RowError("a content that is no text")
    kept = {
        key: value
        for key, value in (more or {}).items()
        if key in ("tool_calls", "name", "tool_call_id") and value
    }
    return {"role": name, "content": content or "", **kept}


def _messages(values: Any) -> list[dict[str, Any]]:
    """A list of messages in OpenAI's or ShareGPT's spelling; a text is one of the user's."""
    if isinstance(values, str):
        turns = HH_TURN.split(values)
        if len(turns) > 2 and not turns[0].strip():
            return [
                _message({"Human": "user", "Assistant": "assistant"}[role], content.strip())
                for role, content in zip(turns[1::2], turns[2::2], strict=True)
            ]
        return [_message("user", values)]
    if isinstance(values, Mapping):
        values = [values]
    if not isinstance(values, list) or not values:
        raise _RowError("no messages")
    found = []
    for value in values:
        if not isinstance(value, Mapping):
            raise _RowError("a message that is no object")
        role = value.get("role", value.get("from"))
        content = value.get("content", value.get("value"))
        if role == "function_call" and isinstance(content, str):
            found.append({"role": "assistant", "content": "", "tool_calls": [_call(content)]})
        else:
            found.append(_message(role, content, value))
    return found


def _call(content: str) -> dict[str, Any]:
    """A call that ShareGPT writes as JSON text."""
    try:
        call = json.loads(content)
        return {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
    except (ValueError, KeyError, TypeError):
        raise _RowError("a call of a function that is no JSON") from None


def _split(messages: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """What comes before the last answer, and that answer."""
    if not messages or messages[-1]["role"] != "assistant":
        raise _RowError("it does not end with an answer")
    return tuple(messages[:-1]), (messages[-1],)


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise _RowError("tools that are no JSON") from None
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise _RowError("tools that are no list of objects")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


# ---- one reader for each form


def _read_messages(record: Any, row: str) -> Example:
    values = record if isinstance(record, list) else _field(record, "messages")
    tools = () if isinstance(record, list) else _tools(record.get("tools"))
    before, answer = _split(_messages(values))
    return Example(row, before, answer, tools=tools)


def _read_sharegpt(record: Any, row: str) -> Example:
    messages = _messages(_field(record, "conversations"))
    if record.get("system"):
        messages.insert(0, _message("system", record["system"]))
    before, answer = _split(messages)
    return Example(row, before, answer, tools=_tools(record.get("tools")))


def _read_alpaca(record: Any, row: str) -> Example:
    instruction, given = _field(record, "instruction"), record.get("input") or ""
    messages = [_message("system", record["system"])] if record.get("system") else []
    for turn in record.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise _RowError("a history that is no list of pairs")
        messages += [_message("user", turn[0]), _message("assistant", turn[1])]
    messages.append(_message("user", f"{instruction}\n\n{given}" if str(given).strip() else instruction))
    answer = record.get("output", record.get("response"))
    return Example(row, tuple(messages), (_message("assistant", answer),))


def _read_completion(record: Any, row: str) -> Example:
    question = next((record[name] for name in QUESTIONS if record.get(name)), None)
    answer = next((record[name] for name in ANSWERS if record.get(name) is not None), None)
    if question is None or answer is None:
        raise _RowError("no prompt or no completion")
    answers = _messages(answer) if isinstance(answer, list) else [_message("assistant", answer)]
    good = record.get("label") if isinstance(record.get("label"), bool) else True
    return Example(row, tuple(_messages(question)), tuple(answers), good=bool(good))


def _read_preference(record: Any, row: str) -> Example:
    asked = [
        record[name] for name in ("prompt", "conversations", "instruction", "question") if record.get(name)
    ]
    messages = _messages(asked[0]) if asked else []
    if record.get("instruction") and str(record.get("input") or "").strip():
        messages[-1]["content"] += f"\n\n{record['input']}"
    sides = []
    for name in ("chosen", "rejected"):
        value = _field(record, name)
        plain = isinstance(value, str) and not HH_TURN.match(value)
        side = [_message("assistant", value)] if plain else _messages(value)
        if len(side) > 1:  # the whole conversation is repeated on each side
            messages = side[:-1] if not messages or name == "chosen" else messages
            side = side[-1:]
        if side[-1]["role"] != "assistant":
            raise _RowError(f"{name} is no answer")
        if not text_of(side[-1]).strip() and not side[-1].get("tool_calls"):
            raise _RowError(f"{name} is empty")
        sides.append(tuple(side))
    if not messages:
        raise _RowError("nothing that is answered")
    return Example(row, tuple(messages), sides[0], sides[1])


def _read_pair(record: Any, row: str) -> Example:
    values = list(record.values()) if isinstance(record, Mapping) else record
    if (
        not isinstance(values, list)
        or len(values) < 2
        or not all(isinstance(value, str) for value in values[:2])
    ):
        raise _RowError("not two columns")
    return Example(row, (_message("user", values[0]),), (_message("assistant", values[1]),))


def _field(record: Any, name: str) -> Any:
    if not isinstance(record, Mapping) or record.get(name) in (None, "", []):
        raise _RowError(f"no {name}")
    return record[name]


READERS = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "completion": _read_completion,
    "judged": _read_completion,
    "preference": _read_preference,
    "pair": _read_pair,
}
