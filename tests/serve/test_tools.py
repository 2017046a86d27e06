"""Calls of functions: read out of text however it is cut, made where they must be, never where they may not."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.conftest import CALL, WEATHER, Live

from glasshouse.serve.tools import Call, CallReader, read_call

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "weather"}]
TIME: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}


def read(pieces: list[str], names: tuple[str, ...] = ("add",), **options: Any) -> list[str | tuple[str, str]]:
    """Texts joined, calls as (name, arguments), in order."""
    reader, found = CallReader(names, **options), []
    items = [item for piece in pieces for item in reader.push(piece)] + reader.flush()
    for item in items:
        if isinstance(item, Call):
            found.append((item.name, item.arguments))
        elif found and isinstance(found[-1], str):
            found[-1] += item
        else:
            found.append(item)
    return found


ADD = '{"name": "add", "arguments": {"a": 1, "b": "é"}}'
WHOLE = f"I add.\n<tool_call>\n{ADD}\n</tool_call>\n<tool_call>\n{ADD}\n</tool_call>"
CALLED = ("add", '{"a": 1, "b": "é"}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no call < here </tool_call>", ["no call < here </tool_call>"]),
        (WHOLE, ["I add.", CALLED, CALLED]),
        (f"<tool_call>{ADD}</tool_call> and so on", [CALLED, " and so on"]),
        (f"<tool_call>\n{ADD}", [CALLED]),
        ("<tool_call>\n{broken\n</tool_call>x", ["<tool_call>\n{broken\n</tool_call>x"]),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', ['<tool_call>{"name": "other", "arguments": {}}</tool_call>']),
        ("<tool_call>\n{unfinished", ["<tool_call>\n{unfinished"]),
        ("ends in <tool_", ["ends in <tool_"]),
        ("line\n", ["line\n"]),
        ("<tool_call>[1]</tool_call>", ["<tool_call>[1]</tool_call>"]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', [("add", '{"a": 1}')]),
        ("", []),
    ],
)  # fmt: skip
def test_calls_are_read_and_the_rest_is_text(text: str, expected: list[Any]):
    assert read([text]) == expected
    assert read(list(text)) == expected


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", ADD, "\n", "a", "<", "{", "<tool"]), max_size=8
    ).map("".join),
    st.lists(st.integers(0, 60), max_size=8),
)
def test_how_the_text_is_cut_changes_nothing(text: str, cuts: list[int]):
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    assert read(pieces) == read([text])


def test_without_tools_everything_is_text():
    assert read([WHOLE], names=()) == [WHOLE]


def test_one_call_where_only_one_is_wanted():
    assert read([WHOLE], single=True)[:2] == ["I add.", CALLED]
    assert not any(isinstance(item, tuple) for item in read([WHOLE], single=True)[2:])


def test_a_text_that_begins_inside_a_call():
    assert read([ADD], inside=True) == [CALLED]
    assert read(["{cut"], inside=True) == ["<tool_call>{cut"]


def test_arguments_nested_too_deep_are_no_call():
    assert read_call('{"name": "add", "arguments": ' + "[" * 100_000, ("add",)) is None


# ---- through the server


@pytest.mark.parametrize("choice", [None, "auto"])
def test_the_model_calls_by_itself(live: Live, choice: str | None):
    answer = live.ask(CHAT, messages=ASK, tools=[WEATHER], tool_choice=choice, temperature=0)["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    [call] = answer["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}


def test_a_call_in_a_stream(live: Live):
    events = live.events(CHAT, messages=ASK, tools=[WEATHER], temperature=0)
    deltas = [event["choices"][0]["delta"] for event in events]
    [call] = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert (call["index"], call["function"]["name"]) == (0, "get_weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert "".join(delta.get("content") or "" for delta in deltas) == ""
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_where_none_may_be_called_none_is(live: Live):
    plain = live.ask(CHAT, messages=ASK, temperature=0, max_tokens=30)
    none = live.ask(CHAT, messages=ASK, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=30)
    assert none["choices"][0]["message"] == plain["choices"][0]["message"]
    assert none["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_must_come_comes(live: Live, seed: int):
    """A wild model may write nothing but a call of one of the tools, with arguments of its schema."""
    for tools, choice, names in (
        ([WEATHER, TIME], "required", {"get_weather", "get_time"}),
        ([WEATHER, TIME], {"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
    ):
        asked = {"messages": ASK, "tools": tools, "tool_choice": choice, "temperature": 1.5, "seed": seed}
        answer = live.ask(CHAT, **asked, max_tokens=600)["choices"][0]
        assert answer["finish_reason"] == "tool_calls", answer
        [call] = answer["message"]["tool_calls"]
        assert call["function"]["name"] in names
        arguments = json.loads(call["function"]["arguments"])
        assert (
            arguments == {}
            if call["function"]["name"] == "get_time"
            else arguments["city"] in ("Paris", "Rome")
        )
        streamed = live.events(CHAT, **asked, max_tokens=600)
        [same] = [c for e in streamed for c in e["choices"][0]["delta"].get("tool_calls", [])]
        assert same["function"] == call["function"]


def test_a_call_and_its_result_are_part_of_the_conversation(live: Live):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    tokens = live.ask("/tokenize", messages=messages, tools=[WEATHER])["tokens"]
    text = live.ask("/detokenize", tokens=tokens)["prompt"]
    assert CALL in text
    assert "<tool_response>\nsunny\n</tool_response>" in text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "nope"}}},
            "tool_choice",
        ),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [TIME] * 200}, "tools"),
    ],
)
def test_malformed_tools(live: Live, fields: dict[str, Any], param: str):
    assert live.refused(CHAT, messages=ASK, **fields)["param"].startswith(param)


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("levels", [60, 70, 200, 500, 900])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_schemas_of_arguments_nested_too_deeply(live: Live, levels: int, choice: str):
    """Templates and compilers walk through them: refused before they do."""
    tool = {"type": "function", "function": {"name": "f", "parameters": nested(levels)}}
    answer = live.post(CHAT, messages=ASK, tools=[tool], tool_choice=choice, max_tokens=1)
    assert answer.status_code in ((400,) if levels > 64 else (200, 400))
    if answer.status_code == 400:
        assert answer.json()["error"]["param"].startswith(("tools", "messages"))


def test_half_of_a_surrogate_pair_in_a_schema_is_refused(live: Live):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"enum": ["\ud800"]}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["\ud800"]}}}
    for fields, param in (({"tools": [tool]}, "tools[0]"), ({"response_format": form}, "response_format")):
        body = json.dumps({"model": "chat", "messages": ASK, **fields}).encode()
        answer = live.client.post(CHAT, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith(param)
