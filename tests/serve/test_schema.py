"""Bad input: 400 with the field's name and what it may be, in the form that clients parse."""

import json
from typing import Any

import pytest
from tests.serve.conftest import Live

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "hello"}


def test_a_prompt_longer_than_the_context_is_refused_with_counts(live: Live):
    error = live.refused(TEXT, prompt="1 2 3 " * 2000)
    assert error["param"] == "prompt"
    assert error["code"] == "context_length_exceeded"
    assert "1,024" in error["message"]
    error = live.refused(CHAT, messages=[{**USER, "content": "1 2 3 " * 2000}])
    assert error["param"] == "messages"
    assert "1,024" in error["message"]
    assert live.refused(TEXT, prompt="x", max_tokens=1025)["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (TEXT, {"prompt": ""}, "prompt"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": [[]]}, "prompt"),
        (TEXT, {"prompt": ["a", 1]}, "prompt"),
        (TEXT, {"prompt": {"a": 1}}, "prompt"),
        (TEXT, {"prompt": [-1]}, "prompt"),
        (TEXT, {"prompt": [10**6]}, "prompt"),
        (TEXT, {"prompt": [True]}, "prompt"),
        (TEXT, {"prompt": [10**30]}, "prompt"),
        (TEXT, {"prompt": ["a"] * 200}, "prompt"),
        (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
        (TEXT, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        (TEXT, {"prompt": "a", "n": 3, "best_of": 2}, "best_of"),
        (TEXT, {"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "hi"}, "messages"),
        (CHAT, {"messages": [USER, {"role": "king", "content": "x"}]}, "messages[1].role"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT, {"messages": [USER] * 100_000}, "messages"),
        (CHAT, {"messages": [USER], "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"messages": [USER], "stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"messages": [USER], "max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        (CHAT, {"messages": [USER], "store": True}, "store"),
        (CHAT, {"messages": [USER], "tool_choice": "required"}, "tool_choice"),
        (
            CHAT,
            {"messages": [USER], "response_format": {"type": "json_schema"}},
            "response_format.json_schema",
        ),
        (CHAT, {"messages": [USER], "response_format": {"type": "xml"}}, "response_format.type"),
        (TEXT, {"prompt": "a", "temprature": 1}, "temprature"),
    ],
)
def test_malformed_requests(live: Live, path: str, fields: dict[str, Any], param: str):
    assert live.refused(path, **fields)["param"] == param


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("n", 10**6, "16"),
        ("n", 0, "1"),
        ("n", 1.5, "integer"),
        ("max_tokens", 10**9, "1048576"),
        ("max_tokens", -1, "0"),
        ("logprobs", 10**6, "20"),
        ("logprobs", -1, "0"),
        ("top_k", -5, "0"),
        ("top_k", 2**40, "2147483647"),
        ("top_p", 0, "0"),
        ("top_p", 1.1, "1"),
        ("min_p", -0.1, "0"),
        ("temperature", 1e308, "2"),
        ("temperature", -1, "0"),
        ("temperature", "hot", "number"),
        ("repetition_penalty", 0, "0.001"),
        ("presence_penalty", 3, "2"),
        ("frequency_penalty", -3, "-2"),
        ("stop", ["x"] * 10_000, "4"),
        ("stop", [""], "1"),
        ("stop", "x" * 300, "256"),
        ("logit_bias", {str(number): 1 for number in range(10**5)}, "1,024"),
        ("logit_bias", {"5": 101}, "100"),
        ("logit_bias", {"five": 1}, "token id"),
        ("logit_bias", {"-5": 1}, "token id"),
        ("logit_bias", {"999999": 1}, "vocabulary"),
        ("seed", 2**80, "9223372036854775807"),
        ("seed", 1.5, "integer"),
        ("stream", "maybe", "boolean"),
        ("user", "x" * 2000, "1000"),
        ("model", "", "1"),
    ],
)
def test_absurd_numbers_are_refused_with_their_bounds(live: Live, field: str, value: Any, bound: str):
    error = live.refused(TEXT, **{"prompt": "a", field: value})
    assert error["param"].partition("[")[0] == field
    assert error["type"] == "invalid_request_error"
    assert bound in error["message"], error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
def test_numbers_that_are_none(live: Live, number: str):
    body = f'{{"model": "chat", "prompt": "a", "temperature": {number}}}'
    answer = live.client.post(TEXT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    if len(number) < 100:
        assert answer.json()["error"]["param"] == "temperature"


@pytest.mark.parametrize("part", [
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "input_image", "image_url": "http://127.0.0.1:9/x.png"},
    {"type": "text"},
])  # fmt: skip
def test_no_url_is_ever_fetched(live: Live, part: dict[str, Any]):
    error = live.refused(CHAT, messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
    assert error["param"] == "messages[0].content[1]"
    if part["type"] != "text":
        assert "never fetches" in error["message"]


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"text"', b"\x00", b"\xff{}", b'{"model": "chat", "prompt": "\xff\xfe"}',
    b"[" * 200_000, b'{"a":' * 100_000, b'{"model": "chat", "prompt": "a"} {}',
])  # fmt: skip
def test_bodies_that_are_no_json(live: Live, body: bytes):
    answer = live.client.post(TEXT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_form_is_no_json(live: Live):
    """Browsers send forms and plain text to anybody without asking; neither is read."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        content = json.dumps({"model": "chat", "prompt": "a"})
        answer = live.client.post(TEXT, content=content, headers={"content-type": kind})
        assert answer.status_code == 400
        assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "text", ["a\x00b", "\u202eabc\u2066", "\x1b[2J\x1b]0;x\x07", "a\r\nb", "\ufeff", "﷽" * 9]
)
def test_strange_characters_are_only_text(live: Live, text: str):
    assert (
        live.ask(CHAT, messages=[{**USER, "content": text}], max_tokens=2)["usage"]["completion_tokens"] >= 1
    )
    tokens = live.ask("/tokenize", prompt=text, add_special_tokens=False)["tokens"]
    assert live.ask("/detokenize", tokens=tokens)["prompt"] == text


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_half_of_a_surrogate_pair_is_refused(live: Live, path: str):
    fields = {"prompt": "\ud800"} if path == TEXT else {"messages": [{**USER, "content": "\ud800"}]}
    body = json.dumps({"model": "chat", **fields}).encode()
    answer = live.client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("prompt", "messages[0].content")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("value", ["NaN", "-Infinity", "[" * 300 + "]" * 300, '"\\ud800"', '{"\\udfff": 1}'])
def test_values_of_any_form_can_be_written_again(live: Live, path: str, value: str):
    said = '"input": "a"' if path == "/v1/responses" else f'"messages": [{json.dumps(USER)}]'
    body = f'{{"model": "chat", {said}, "metadata": {{"a": {value}}}}}'
    answer = live.client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "metadata"


def test_unknown_models(live: Live):
    for name in ("gpt-9", "../../etc/passwd", "chat\n", "<script>alert(1)</script>"):
        answer = live.client.post(TEXT, json={"model": name, "prompt": "a"})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "\n" not in error["message"]
        assert "chat" in error["message"]


def test_fields_that_change_nothing_are_taken(live: Live):
    live.ask(
        CHAT, messages=[USER], max_tokens=1, user="me", metadata={"a": "b"}, service_tier="auto", store=False
    )
