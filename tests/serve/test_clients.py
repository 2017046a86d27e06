"""The clients people have: OpenAI's own, the evaluation harness, and a fuzzer that reads the OpenAPI document."""

import json
import math
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from pydantic import BaseModel
from tests.serve.conftest import GREETING, STORY, WEATHER, Live

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


# ---- OpenAI's client


def test_chat(client: openai.OpenAI):
    answer = client.chat.completions.create(model="chat", messages=HELLO, temperature=0)
    assert answer.choices[0].message.content == GREETING
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    type(answer).model_validate(answer.model_dump())


def test_stream(client: openai.OpenAI):
    stream = client.chat.completions.create(
        model="chat", messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == GREETING
    assert chunks[-1].usage is not None
    with client.chat.completions.stream(model="chat", messages=HELLO, temperature=0) as events:
        assert events.get_final_completion().choices[0].message.content == GREETING


def test_tools(client: openai.OpenAI):
    said: list[Any] = [{"role": "user", "content": "weather"}]
    tools: list[Any] = [WEATHER]
    answer = client.chat.completions.create(model="chat", messages=said, tools=tools, temperature=0)
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    message: Any = answer.choices[0].message.model_dump(exclude_none=True)
    again = client.chat.completions.create(
        model="chat", messages=[*said, message, result], tools=tools, max_tokens=3
    )
    assert again.usage is not None
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens + 20  # pyright: ignore
    with client.chat.completions.stream(model="chat", messages=said, tools=tools, temperature=0) as events:
        final = events.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.arguments == call.function.arguments  # pyright: ignore


class Verdict(BaseModel):
    """What the model must fill in."""

    ok: bool
    kind: Literal["good", "bad"]


def test_structured_answers(client: openai.OpenAI):
    answer = client.chat.completions.parse(
        model="chat", messages=HELLO, response_format=Verdict, temperature=1.0, seed=5, max_tokens=900
    )
    assert isinstance(answer.choices[0].message.parsed, Verdict)


def test_embeddings(client: openai.OpenAI):
    """The client asks for base64 by itself."""
    answer = client.embeddings.create(model="chat", input=["hello", "count"])
    assert len(answer.data) == 2
    assert math.hypot(*answer.data[0].embedding) == pytest.approx(1, abs=1e-5)
    plain = client.embeddings.create(model="chat", input="hello", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-6)


def test_responses(client: openai.OpenAI):
    answer = client.responses.create(model="chat", input="hello", temperature=0)
    assert answer.output_text == GREETING
    with client.responses.stream(model="chat", input="hello", temperature=0) as events:
        kinds = [event.type for event in events]
        assert events.get_final_response().output_text == GREETING
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


def test_log_probabilities(client: openai.OpenAI):
    answer = client.chat.completions.create(
        model="chat", messages=HELLO, temperature=0, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content  # pyright: ignore
    data = b"".join(bytes(entry.bytes or []) for entry in content[:-1])
    assert data.decode() == GREETING
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)
    text = client.completions.create(model="chat", prompt=STORY, max_tokens=0, echo=True, logprobs=1)
    assert text.choices[0].text == STORY
    assert text.choices[0].logprobs.token_logprobs[0] is None  # pyright: ignore


def test_errors(client: openai.OpenAI, live: Live):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="chat", messages=HELLO, temperature=9)
    assert bad.value.param == "temperature"
    assert [model.id for model in client.models.list()] == ["chat"]
    assert client.models.retrieve("chat").id == "chat"
    live.house.phase = "draining"
    try:
        with pytest.raises(openai.InternalServerError) as unready:
            client.chat.completions.create(model="chat", messages=HELLO)
    finally:
        live.house.phase = "ready"
    assert unready.value.status_code == 503


# ---- lm-eval


def test_the_harness_scores_as_the_model_does(live: Live, monkeypatch: pytest.MonkeyPatch):
    """lm-eval's own requests for log-likelihoods; ours computed in one pass, without engine or server."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("NO_PROXY", "*")
    artifact = live.house.models["chat"].artifact
    harness = LocalCompletionsAPI(
        base_url=live.url + "/v1/completions", model="chat", tokenizer=str(artifact.path),
        tokenizer_backend="huggingface", max_length=1024, max_retries=1, batch_size=2,
        add_bos_token=True,
    )  # fmt: skip
    pairs = [
        ("Once upon a", " time a cat"),
        ("Once upon a", " dog"),
        ("猫坐在", "垫子上"),
        ("x", " 🙂"),
        ("Hi", " 👋🏽!"),
    ]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found = harness.loglikelihood(asked, disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        read, written = harness._encode_pair(context, continuation)
        with torch.inference_mode():
            model = artifact.model
            logits = model.logits(model(torch.tensor([read + written])))[0]
        odds = logits[:, : artifact.tokenizer.vocab_size].log_softmax(-1)[len(read) - 1 : -1]
        expected = sum(float(row[token]) for row, token in zip(odds, written, strict=True))
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == all(int(row.argmax()) == token for row, token in zip(odds, written, strict=True))
    assert {greedy for _, greedy in found} == {True, False}
    arguments: Any = ("Once upon", {"until": ["."], "max_gen_toks": 30, "temperature": 0})
    [text] = harness.generate_until([Instance("generate_until", {}, arguments, 0)], disable_tqdm=True)
    assert text == " a time a cat sat on a mat" or "cat" in text


# ---- a fuzzer


def fuzz(live: Live, examples: int) -> None:
    """Requests made from the OpenAPI document, valid and not: never a 5xx, always the documented shape."""
    import schemathesis
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_dict(live.client.get("/openapi.json").json())
    for operation in (found.ok() for found in schema.get_all_operations()):
        cases: Any = operation.as_strategy()

        @settings(
            max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=cases)
        def check(case: Any) -> None:
            # A schema cannot say which fields go together, so a request that it allows may still be refused.
            case.call_and_validate(base_url=live.url, timeout=60, excluded_checks=[positive_data_acceptance])

        check()


def test_the_fuzzer_finds_nothing(live: Live):
    fuzz(live, 12)


@pytest.mark.slow
def test_nor_in_a_long_run(live: Live):
    fuzz(live, 300)
