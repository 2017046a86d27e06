"""The routes that write nothing: models, tokens, vectors, figures, the page; and structured answers."""

import base64
import json
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from tests.serve.conftest import GREETING, Live

from glasshouse.serve.app import PAGE, validation_error

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"


def test_models_by_name(live: Live):
    listed = live.client.get("/v1/models").json()
    assert listed["object"] == "list"
    [model] = listed["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("chat", "model", 1024)
    assert live.client.get("/v1/models/chat").json() == model
    assert live.client.get("/v1/models/none").json()["error"]["code"] == "model_not_found"


def test_health_and_readiness(live: Live):
    assert live.client.get("/health").json() == {"status": "ok"}
    assert live.client.get("/ready").json() == {"status": "ready"}


def test_tokens_there_and_back(live: Live):
    found = live.ask("/tokenize", prompt=GREETING, return_token_strs=True)
    tokenizer = live.house.models["chat"].artifact.tokenizer
    assert found["tokens"] == tokenizer.prompt(GREETING)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    plain = live.ask("/tokenize", prompt="<|im_end|>" + GREETING, add_special_tokens=False)["tokens"]
    assert not any(tokenizer.is_special(token) for token in plain)
    assert live.ask("/detokenize", tokens=plain)["prompt"] == "<|im_end|>" + GREETING
    assert live.ask("/tokenize", messages=HELLO)["tokens"] == tokenizer.encode_chat(HELLO)
    assert live.refused("/tokenize", prompt="a", messages=HELLO)["param"] == "prompt"
    assert live.refused("/detokenize", tokens=[10**6])["param"] == "tokens"
    assert live.client.post("/tokenize", json={"prompt": "a"}).json()["count"] > 0  # the only model


def test_texts_as_vectors(live: Live):
    texts = ["hello", GREETING, "hello"]
    answer = live.ask("/v1/embeddings", input=texts)
    vectors = np.array([item["embedding"] for item in answer["data"]])
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-5)
    artifact = live.house.models["chat"].artifact
    ids = artifact.tokenizer.prompt("hello")
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(artifact.model(torch.tensor([ids]))[0].mean(0), dim=0)
    assert vectors[0] == pytest.approx(expected.numpy(), abs=1e-5)
    encoded = live.ask("/v1/embeddings", input=ids, encoding_format="base64")["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(encoded), "<f4") == pytest.approx(expected.numpy(), abs=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(len(artifact.tokenizer.prompt(text)) for text in texts)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a"] * 600}, "input"),
        ({"input": "1 " * 5000}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": "a", "dimensions": 3}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_bad_input_of_vectors(live: Live, fields: dict[str, Any], param: str):
    assert live.refused("/v1/embeddings", **fields)["param"] == param


@pytest.mark.parametrize("seed", range(3))
def test_json_where_json_is_asked(live: Live, seed: int):
    answer = live.ask(
        CHAT,
        messages=HELLO,
        response_format={"type": "json_object"},
        temperature=1.2,
        seed=seed,
        max_tokens=300,
    )
    choice = answer["choices"][0]
    if choice["finish_reason"] == "stop":
        assert isinstance(json.loads(choice["message"]["content"]), dict)
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["a", "b"]}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    asked = {
        "messages": HELLO,
        "response_format": form,
        "temperature": 1.5,
        "seed": seed,
        "n": 2,
        "max_tokens": 300,
    }
    choices = live.ask(CHAT, **asked)["choices"]
    values = [json.loads(choice["message"]["content"]) for choice in choices]
    assert all(set(value) == {"name", "ok"} and value["name"] in "ab" for value in values)
    events = live.events(CHAT, **asked)
    for index, choice in enumerate(choices):
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        deep(200),
        {"enum": [f"value {number}" for number in range(100_000)]},
        {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
        {"type": "string", "pattern": "(["},
        {"type": "nonsense"},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "#/$defs/none"},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"properties": 5},
    ],
    ids=["deep", "enum", "regex", "bad-regex", "bad-type", "url", "no-def", "contradiction", "malformed"],
)
def test_schema_bombs_are_refused(live: Live, schema: dict[str, Any]):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = live.refused(CHAT, messages=HELLO, response_format=form)
    assert error["param"].startswith("response_format")
    assert live.client.get("/health").status_code == 200


def test_figures(live: Live):
    before = {
        family.name: family for family in text_string_to_metric_families(live.client.get("/metrics").text)
    }
    live.ask(CHAT, messages=HELLO, temperature=0)
    live.refused(CHAT, messages=[])
    found = {
        family.name: family for family in text_string_to_metric_families(live.client.get("/metrics").text)
    }

    def value(families: Any, sample: str, **labels: str) -> float:
        samples = [s for family in families.values() for s in family.samples if s.name == sample]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    def gain(sample: str, **labels: str) -> float:
        return value(found, sample, **labels) - value(before, sample, **labels)

    assert gain("glasshouse_requests_total", route=CHAT, status="200") == 1
    assert gain("glasshouse_errors_total", route=CHAT, type="invalid_request_error") == 1
    tokenizer = live.house.models["chat"].artifact.tokenizer
    written = len(tokenizer.encode(GREETING)) + 1
    assert gain("glasshouse_tokens_total", model="chat", kind="written") == written
    assert gain("glasshouse_tokens_total", model="chat", kind="read") == len(tokenizer.encode_chat(HELLO))
    assert gain("glasshouse_time_to_first_token_seconds_count", model="chat") == 1
    assert gain("glasshouse_time_per_token_seconds_count", model="chat") == written - 1
    assert gain("glasshouse_engine_tokens_total", model="chat") == written
    for name in ("queued", "running", "cache_blocks_used", "cache_blocks_total"):
        assert f"glasshouse_engine_{name}" in found


def test_the_page_is_served(live: Live):
    answer = live.client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == (PAGE / "index.html").read_bytes()
    for path in PAGE.glob("*.js"):
        assert live.client.get(f"/{path.name}").headers["content-type"] == "text/javascript; charset=utf-8"


def test_the_document_tells_of_every_route(live: Live):
    document = live.client.get("/openapi.json").json()
    expected = {
        "/health",
        "/ready",
        "/metrics",
        "/tokenize",
        "/detokenize",
        "/v1/models",
        "/v1/models/{name}",
    }
    expected |= {
        f"/v1/{name}" for name in ("chat/completions", "completions", "responses", "embeddings", "explain")
    }
    assert set(document["paths"]) == expected
    assert "http" not in json.dumps(document["paths"])


def test_of_a_union_the_branch_that_came_furthest_is_named():
    errors = [
        {"type": "string_type", "loc": ("body", "messages", 0, "content", "str"), "msg": "a string"},
        {
            "type": "value_error",
            "loc": ("body", "messages", 0, "content", "list[Part]", 2),
            "msg": "Value error, no text",
        },
    ]
    error = validation_error(errors)
    assert (error.status, error.param, error.message) == (
        400,
        "messages[0].content[2]",
        "messages[0].content[2]: no text",
    )
