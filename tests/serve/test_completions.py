"""Continued texts and conversations: what is streamed is what is whole, and every figure is the model's own."""

import math
from typing import Any

import pytest
import torch
from tests.serve.conftest import COUNT, GREETING, STORY, Live

from glasshouse.artifact import Artifact

HELLO = [{"role": "user", "content": "hello"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def artifact(live: Live) -> Artifact:
    return live.house.models["chat"].artifact


def log_odds(artifact: Artifact, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [T, vocab_size] of what follows each token, computed in one pass without the engine."""
    with torch.inference_mode():
        model = artifact.model
        return model.logits(model(torch.tensor([ids])))[0, :, : artifact.tokenizer.vocab_size].log_softmax(-1)


def joined(events: list[dict[str, Any]], index: int = 0) -> str:
    """The text of one answer of a stream."""
    parts = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(part["text"] if "text" in part else part["delta"].get("content", "") for part in parts)


def test_a_conversation(live: Live):
    answer = live.ask(CHAT, messages=HELLO, temperature=0)
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": GREETING, "refusal": None}
    assert choice["finish_reason"] == "stop"
    tokenizer = live.house.models["chat"].artifact.tokenizer
    assert answer["usage"]["completion_tokens"] == len(tokenizer.encode(GREETING)) + 1
    assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode_chat(HELLO))
    assert answer["usage"]["total_tokens"] == sum(list(answer["usage"].values())[:2])


def test_parts_of_a_message_and_developer_are_read(live: Live):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answer = live.ask(CHAT, messages=[{"role": "user", "content": parts}], temperature=0)
    assert answer["choices"][0]["message"]["content"] == GREETING
    told = [{"role": "developer", "content": "x"}, *HELLO]
    as_system = [{"role": "system", "content": "x"}, *HELLO]
    counts = [live.ask("/tokenize", messages=messages)["tokens"] for messages in (told, as_system)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 0, "stop": ["end STOP"]},
        {"temperature": 0, "stop": "界"},
        {"temperature": 0, "stop": ["👩", "nowhere"]},
        {"temperature": 0, "stop": ["👨‍👩‍👧"]},
        *({"temperature": 0, "max_tokens": count} for count in (3, 4, 5, 6, 20, 30)),
        *({"temperature": 1.5, "seed": seed, "max_tokens": 40} for seed in range(4)),
        {"temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 30},
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_streamed_bytes_are_whole_bytes(live: Live, path: str, fields: dict[str, Any]):
    """Emoji and joined characters lie over many tokens; a cut inside one gives the same replacement both ways."""
    asked = {"messages": HELLO} if path == CHAT else {"prompt": live_prompt(live), "max_tokens": 100}
    whole = live.ask(path, **{**asked, **fields})
    events = live.events(path, **{**asked, **fields})
    for choice in whole["choices"]:
        text = choice["text"] if path == TEXT else choice["message"]["content"]
        assert joined(events, choice["index"]).encode() == text.encode()
        finishes = [c["finish_reason"] for e in events for c in e["choices"] if c["index"] == choice["index"]]
        assert [finish for finish in finishes if finish] == [choice["finish_reason"]]
    if "stop" in fields:
        stops = [fields["stop"]] if isinstance(fields["stop"], str) else fields["stop"]
        places = [place for place in map(GREETING.find, stops) if place >= 0]
        shown = whole["choices"][0]
        assert (shown.get("text") or shown["message"]["content"]) == GREETING[: min(places, default=None)]


def live_prompt(live: Live) -> list[int]:
    """The conversation as token ids."""
    return live.ask("/tokenize", messages=HELLO)["tokens"]


def test_a_stream_tells_its_cost_where_asked(live: Live):
    whole = live.ask(CHAT, messages=HELLO, temperature=0, n=2)
    events = live.events(CHAT, messages=HELLO, temperature=0, n=2, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert len({event["id"] for event in events}) == 1
    first = [e["choices"][0] for e in events[:-1] if e["choices"][0]["delta"].get("role") == "assistant"][:2]
    assert [choice["index"] for choice in first] == [0, 1]
    assert "usage" not in live.events(CHAT, messages=HELLO, temperature=0)[-1]


def test_log_probabilities_are_the_models_own(live: Live, artifact: Artifact):
    answer = live.ask(
        CHAT, messages=HELLO, seed=3, max_tokens=20, logprobs=True, top_logprobs=3, return_token_ids=True
    )
    prompt, ids = answer["prompt_token_ids"], answer["choices"][0]["token_ids"]
    odds = log_odds(artifact, prompt + ids)[len(prompt) - 1 :]
    entries = answer["choices"][0]["logprobs"]["content"]
    assert [entry["token_id"] for entry in entries] == ids
    for entry, row in zip(entries, odds, strict=False):
        assert entry["logprob"] == pytest.approx(float(row[entry["token_id"]]), abs=1e-4)
        assert [other["token_id"] for other in entry["top_logprobs"]] == row.topk(3).indices.tolist()
        assert [other["logprob"] for other in entry["top_logprobs"]] == pytest.approx(
            row.topk(3).values.tolist(), abs=1e-4
        )
        assert bytes(entry["bytes"]) == artifact.tokenizer.token_bytes(entry["token_id"])
    streamed = live.events(CHAT, messages=HELLO, seed=3, max_tokens=20, logprobs=True, top_logprobs=3)
    content = [e for chunk in streamed for e in (chunk["choices"][0]["logprobs"] or {}).get("content", [])]
    assert content == entries


@pytest.mark.parametrize("form", ["text", "ids"])
def test_echo_gives_the_prompt_with_its_odds(live: Live, artifact: Artifact, form: str):
    """What lm-eval reads: the log-probability of each token of a prompt."""
    ids = artifact.tokenizer.prompt(STORY)
    prompt = STORY if form == "text" else ids
    answer = live.ask(TEXT, prompt=prompt, max_tokens=1, temperature=0, logprobs=1, echo=True)
    [choice] = answer["choices"]
    shown = choice["logprobs"]
    odds = log_odds(artifact, ids)
    assert shown["token_logprobs"][0] is None
    assert shown["top_logprobs"][0] is None
    expected = [float(odds[place, token]) for place, token in enumerate(ids[1:])]
    assert shown["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
    assert len(shown["tokens"]) == len(ids) + 1
    for place, top in enumerate(shown["top_logprobs"][1:-1]):
        own = shown["token_logprobs"][place + 1]
        assert (max(top.values()) == own) == (int(odds[place].argmax()) == ids[place + 1])
    spelled = STORY if form == "text" else artifact.tokenizer.decode(ids, keep_special=True)
    assert choice["text"].startswith(spelled)
    for place, piece in zip(shown["text_offset"], shown["tokens"], strict=True):
        if not piece.startswith("bytes:") and not piece.startswith("<|"):
            assert choice["text"][place:].startswith(piece)
    scored = live.ask(TEXT, prompt=prompt, max_tokens=0, logprobs=1, echo=True)["choices"][0]
    assert scored["text"] == spelled
    assert scored["logprobs"]["token_logprobs"] == shown["token_logprobs"][:-1]
    assert live.events(TEXT, prompt=prompt, max_tokens=0, logprobs=1, echo=True)[0]["choices"][0] == {
        "index": 0, "text": spelled, "finish_reason": "length", "logprobs": scored["logprobs"],
    }  # fmt: skip


def test_a_likely_token_has_the_same_number_twice(live: Live):
    """Clients find out whether a token was the likeliest by comparing floats."""
    answer = live.ask(TEXT, prompt="Once", max_tokens=12, temperature=0, logprobs=2)
    shown = answer["choices"][0]["logprobs"]
    for token, own, top in zip(shown["tokens"], shown["token_logprobs"], shown["top_logprobs"], strict=True):
        assert top[token] == own == max(top.values())


def test_several_prompts_and_answers_come_in_order(live: Live):
    prompts = ["Once", "Hi"]
    answer = live.ask(TEXT, prompt=prompts, n=2, seed=5, max_tokens=6, return_token_ids=True)
    alone = [
        live.ask(TEXT, prompt=prompt, n=2, seed=5, max_tokens=6, return_token_ids=True) for prompt in prompts
    ]
    expected = [choice["token_ids"] for one in alone for choice in one["choices"]]
    assert [choice["token_ids"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone)
    single = live.ask(TEXT, prompt="Once", seed=5, max_tokens=6, return_token_ids=True)
    assert single["choices"][0]["token_ids"] == expected[0]


def test_the_best_are_the_likeliest(live: Live):
    asked = {"prompt": "a", "max_tokens": 5, "seed": 2, "logprobs": 0, "temperature": 2.0}
    every = live.ask(TEXT, n=6, **asked)["choices"]
    best = live.ask(TEXT, n=2, best_of=6, **asked)

    def mean(choice: dict[str, Any]) -> float:
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    ranked = sorted(every, key=mean, reverse=True)[:2]
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in ranked]
    assert best["usage"]["completion_tokens"] == sum(len(c["logprobs"]["tokens"]) for c in every)


def test_a_text_goes_on_from_another_token(live: Live):
    """Branching: prompt and answer up to a place as ids, then an alternative, then what follows it."""
    answer = live.ask(
        CHAT, messages=HELLO, temperature=0, logprobs=True, top_logprobs=2, return_token_ids=True
    )
    prompt, ids = answer["prompt_token_ids"], answer["choices"][0]["token_ids"]
    other = answer["choices"][0]["logprobs"]["content"][4]["top_logprobs"][1]["token_id"]
    assert other != ids[4]
    same = live.ask(TEXT, prompt=prompt + ids[:4], temperature=0, max_tokens=100, return_token_ids=True)
    assert same["choices"][0]["token_ids"] == ids[4:]
    branch = live.ask(
        TEXT, prompt=[*prompt, *ids[:4], other], temperature=0, max_tokens=8, return_token_ids=True
    )
    assert branch["prompt_token_ids"] == [*prompt, *ids[:4], other]
    assert branch["usage"]["prompt_tokens"] == len(prompt) + 5


def test_ids_in_a_stream(live: Live):
    whole = live.ask(CHAT, messages=HELLO, temperature=0, return_token_ids=True)
    events = live.events(CHAT, messages=HELLO, temperature=0, return_token_ids=True)
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert all("prompt_token_ids" not in event for event in events[1:])
    ids = [token for event in events for token in event["choices"][0].get("token_ids", [])]
    assert ids == whole["choices"][0]["token_ids"]


def test_settings_reach_the_engine(live: Live):
    def text(**fields: Any) -> str:
        return live.ask(TEXT, **{"prompt": "Once", "max_tokens": 12, "temperature": 0, **fields})["choices"][
            0
        ]["text"]

    plain = text()
    first = live.ask("/tokenize", prompt="Once upon", add_special_tokens=False)["tokens"][-1]
    assert text(logit_bias={str(first): -100}) != plain
    assert text(temperature=1.5, seed=1) == text(temperature=1.5, seed=1)
    assert text(temperature=1.5, seed=1) != text(temperature=1.5, seed=2)
    assert text(temperature=2, top_k=1, seed=4) == plain == text(temperature=2, top_p=1e-6, seed=4)
    assert text(temperature=2, min_p=1.0, seed=4) == plain
    assert text(repetition_penalty=100) != plain
    assert text(presence_penalty=2, frequency_penalty=2) != "" != text(seed=-3)
    assert live.ask(TEXT, prompt="Once", max_tokens=2)["choices"][0]["finish_reason"] == "length"
    random = {live.ask(TEXT, max_tokens=8, temperature=2)["choices"][0]["text"] for _ in range(4)}
    assert len(random) > 1  # without a seed, each has its own


def test_without_a_prompt_a_document_is_begun(live: Live):
    assert live.ask(TEXT, temperature=0, max_tokens=100)["choices"][0]["text"] == STORY


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_the_same_request_has_the_same_answer_whatever_the_load(live: Live, path: str):
    """Alone and among sixteen others: text and odds to the last bit."""
    import concurrent.futures

    shown = {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    asked = (
        {"messages": HELLO, **shown} if path == CHAT else {"prompt": "Once upon", "max_tokens": 30, **shown}
    )
    asked |= {"seed": 11, "temperature": 1.0}
    alone = live.ask(path, **asked)
    others = [
        {"prompt": COUNT[: 7 * number] or "x", "max_tokens": 10 + 4 * number, "seed": number}
        for number in range(16)
    ]
    with concurrent.futures.ThreadPoolExecutor(17) as pool:
        waiting = [pool.submit(live.ask, TEXT, **other) for other in others]
        among = pool.submit(live.ask, path, **asked).result()
        for one in waiting:
            one.result()
    assert among["choices"] == alone["choices"]


def test_a_context_that_is_full_ends_the_answer(live: Live):
    prompt = live.ask("/tokenize", prompt=COUNT * 20)["tokens"][:1020]
    answer = live.ask(TEXT, prompt=prompt, max_tokens=16, temperature=1, seed=3)
    assert answer["usage"]["completion_tokens"] <= 4
    assert not any(math.isnan(value) for value in answer["usage"].values())
