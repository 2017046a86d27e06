"""The Responses interface: the same answers as the chat's, in shapes that OpenAI's own types take."""

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from tests.serve.conftest import COUNT, GREETING, WEATHER, Live

PATH = "/v1/responses"
TOOL = {"type": "function", **WEATHER["function"]}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def events(live: Live, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream; each names its type twice and has the next number."""
    answer = live.post(PATH, stream=True, **fields)
    assert answer.status_code == 200, answer.text
    blocks = [block for block in answer.text.split("\n\n") if block and not block.startswith(":")]
    found = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENT.validate_python(event)
        found.append(event)
    return found


def test_a_text_is_answered(live: Live):
    answer = live.ask(PATH, input="hello", temperature=0)
    Response.model_validate(answer)
    [item] = answer["output"]
    assert item["content"][0]["text"] == GREETING
    assert (answer["status"], item["status"], item["role"]) == ("completed", "completed", "assistant")
    chat = live.ask("/v1/chat/completions", messages=[{"role": "user", "content": "hello"}], temperature=0)
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
    assert answer["store"] is False


def test_items_instructions_and_parts(live: Live):
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "count"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "1"}]},
        {"type": "function_call", "call_id": "c", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
        {"role": "user", "content": "go on"},
    ]
    answer = live.ask(PATH, input=items, instructions="Be brief.", max_output_tokens=3, tools=[TOOL])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "count"},
        {"role": "assistant", "content": "1"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"name": "get_weather", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
        {"role": "user", "content": "go on"},
    ]  # fmt: skip
    expected = live.ask("/tokenize", messages=messages, tools=[WEATHER])["count"]
    assert answer["usage"]["input_tokens"] == expected
    Response.model_validate(answer)
    cut = live.ask(PATH, input="count", temperature=0, max_output_tokens=3)
    assert cut["status"] == cut["output"][0]["status"] == "incomplete"
    assert cut["incomplete_details"] == {"reason": "max_output_tokens"}
    Response.model_validate(cut)


@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {"seed": 4, "max_output_tokens": 25}, {"input": "count", "temperature": 0}]
)
def test_the_events_add_up_to_the_whole(live: Live, fields: dict[str, Any]):
    asked = {"input": "hello", **fields}
    whole, found = live.ask(PATH, **asked), events(live, **asked)
    assert [event["type"] for event in found[:4]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    text = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]
    [done] = [event for event in found if event["type"] == "response.output_text.done"]
    assert done["text"] == text
    last = found[-1]
    assert last["type"] == f"response.{whole['status']}"
    assert last["response"]["output"][0]["content"] == whole["output"][0]["content"]
    assert last["response"]["usage"] == whole["usage"]


def test_a_call_is_an_item(live: Live):
    asked = {"input": "weather", "tools": [TOOL], "temperature": 0}
    whole, found = live.ask(PATH, **asked), events(live, **asked)
    Response.model_validate(whole)
    [item] = whole["output"]
    assert (item["type"], item["name"], item["arguments"]) == (
        "function_call",
        "get_weather",
        '{"city": "Paris"}',
    )
    kinds = [event["type"] for event in found]
    assert kinds[2:6] == [
        "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done",
    ]  # fmt: skip
    assert found[-1]["response"]["output"][0]["arguments"] == item["arguments"]
    forced = live.ask(
        PATH, **asked | {"tool_choice": {"type": "function", "name": "get_weather"}, "temperature": 1.5}
    )
    assert json.loads(forced["output"][0]["arguments"])["city"] in ("Paris", "Rome")


def test_a_schema_is_followed(live: Live):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
    answer = live.ask(PATH, input="hello", text=form, temperature=1.5, seed=1, max_output_tokens=200)
    Response.model_validate(answer)
    assert isinstance(json.loads(answer["output"][0]["content"][0]["text"])["ok"], bool)
    assert answer["text"]["format"]["schema"] == schema


def test_log_probabilities_where_asked(live: Live):
    asked = {
        "input": "count",
        "temperature": 0,
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
    }
    answer = live.ask(PATH, **asked)
    shown = answer["output"][0]["content"][0]["logprobs"]
    assert len(shown) == answer["usage"]["output_tokens"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in shown)
    assert "".join(entry["token"] for entry in shown[:-1]) == COUNT
    streamed = [
        e
        for event in events(live, **asked)
        if event["type"] == "response.output_text.delta"
        for e in event["logprobs"]
    ]
    assert streamed == shown[: len(streamed)]
    assert len(streamed) >= len(shown) - 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "conversation": "c"}, "conversation"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": [{"type": "message", "role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]}, "input[0].content[0]"),
        ({"input": "a", "max_output_tokens": 10**9}, "max_output_tokens"),
        ({"input": "x" * 9000}, "input"),
        ({"input": "a", "max_output_tokens": 2000}, "max_output_tokens"),
        ({"input": "a", "text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "text.format"),
        ({"input": "a", "tool_choice": "required"}, "tool_choice"),
        ({"input": "a", "temperature": 3}, "temperature"),
    ],
)  # fmt: skip
def test_bad_input(live: Live, fields: dict[str, Any], param: str):
    assert live.refused(PATH, **fields)["param"].startswith(param)
