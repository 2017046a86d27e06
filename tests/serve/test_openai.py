"""OpenAI's shapes: numbers that JSON can hold, names of tokens, errors that tell strangers nothing."""

import json
import math

import pytest

from glasshouse.errors import InputError
from glasshouse.inference.request import Alternative, QueueFull, Token
from glasshouse.serve.metrics import escape
from glasshouse.serve.openai import (
    ApiError,
    api_error,
    completion_logprobs,
    finish_reason,
    log_probability,
    server_sent,
    to_json,
    token_name,
)
from glasshouse.text.tokenizer import train_tokenizer


def test_a_probability_too_small_for_its_logarithm():
    assert log_probability(0.0) == log_probability(5e-324 / 2) == -9999.0
    assert log_probability(0.5) == math.log(0.5)


def test_names_of_tokens():
    tokenizer = train_tokenizer(iter(["the cat the cat"]), 262)
    cat, [half, *_] = tokenizer.encode("a"), tokenizer.encode_bytes("é".encode())
    assert token_name(tokenizer, cat[0]) == "a"
    assert token_name(tokenizer, half) == "bytes:\\xc3"
    assert token_name(tokenizer, tokenizer.end_of_document) == "<|endoftext|>"


def test_log_probabilities_of_a_prompts_first_token_are_null():
    tokenizer = train_tokenizer(iter(["the cat the cat"]), 262)
    first = Token(5, "", math.nan, 0, 0.0)
    second = Token(6, "b", 0.25, 2, 1.0, (Alternative(7, "c", 0.5), Alternative(6, "b", 0.25000001)))
    shown = completion_logprobs(tokenizer, [first, second], ["a", "b"], 3, ids=True)
    assert shown["token_logprobs"] == [None, math.log(0.25)]
    assert shown["top_logprobs"][0] is None
    name = token_name(tokenizer, 6)
    assert shown["top_logprobs"][1][name] == math.log(0.25)  # its own number, not the alternative's
    assert shown["text_offset"] == [3, 4]
    assert [entry["token_id"] for entry in shown["content"]] == [5, 6]
    json.loads(to_json(shown))


def test_errors_tell_strangers_nothing_of_the_inside():
    fault = api_error(ValueError("/home/me/secret"))
    assert (fault.status, fault.kind) == (500, "server_error")
    assert "secret" not in fault.message
    full = api_error(QueueFull("9 requests wait", "", "later"))
    assert (full.status, full.headers) == (429, {"retry-after": "2"})
    asked = api_error(InputError("top_k is -5", "--top_k", "give a whole number"))
    assert (asked.status, asked.param) == (400, "top_k")
    assert api_error(InputError("too long", "prompt", "cut"), "messages").param == "messages"
    assert api_error(InputError("too many", "--max_new_tokens", "cut")).param == "max_tokens"
    own = ApiError(418, "a\nb")
    assert api_error(own) is own
    assert own.message == "a b"


def test_an_event_is_one_line_whatever_is_in_it():
    event = server_sent({"text": "a\r\n\u2028data: [DONE]\n\n猫 \ud800"}, "name")
    head, data, *rest = event.decode().split("\n")
    assert head == "event: name"
    assert json.loads(data.removeprefix("data: "))["text"].startswith("a\r\n")
    assert rest == ["", ""]
    with pytest.raises(ValueError, match="Out of range"):
        to_json(math.nan)


def test_why_an_answer_ended():
    assert [finish_reason(word) for word in ("end", "stop", "length")] == ["stop", "stop", "length"]


@pytest.mark.parametrize(
    "text", ["a b", 'a"b', "a\nb", "\x1b[2J", "\u202e", "", "a=b", "\x7f", "\ud800", "猫"]
)
def test_words_of_the_log_are_one_word_of_plain_ascii(text: str):
    shown = escape(text)
    assert shown.isascii()
    assert shown.isprintable()
    assert shown.startswith('"')
    assert json.loads(shown) == text


def test_plain_words_stay():
    assert [escape(word) for word in ("/v1/models", "req_1", 5, 1.5)] == ["/v1/models", "req_1", "5", "1.5"]
