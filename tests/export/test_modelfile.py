"""The Modelfile says what the chat template says: the same words around the same turns, the tokenizer's own ends."""

import re

import pytest

from glasshouse.export.modelfile import CHATML, PLAIN, modelfile, speaks_chatml
from glasshouse.text.chat import CHATML_TEMPLATE, render
from glasshouse.text.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def stops(text: str) -> list[str]:
    return re.findall(r'^PARAMETER stop "(.*)"$', text, re.M)


def literals(template: str) -> str:
    """The words of a Go template between its actions; a dash takes the white space before it."""
    return re.sub(r"\s*\{\{-.*?\}\}|\{\{.*?\}\}", "", template)


def test_a_model_that_converses_speaks_chatml(tokenizer):
    text = modelfile("m.gguf", tokenizer, {}, 256, True)
    assert text.startswith("FROM ./m.gguf\n")
    assert f'TEMPLATE """{CHATML}"""' in text
    assert stops(text) == ["<|endoftext|>", "<|im_end|>"]
    assert all(tokenizer.is_special(tokenizer.special[stop]) for stop in stops(text))
    assert "PARAMETER num_ctx 256" in text


def test_a_base_model_continues_the_prompt_as_it_is(tokenizer):
    text = modelfile("m.gguf", tokenizer, {}, 256, False)
    assert f'TEMPLATE """{PLAIN}"""' in text
    assert "im_start" not in text
    assert stops(text) == ["<|endoftext|>"]


def test_every_word_that_the_chat_template_writes_is_in_the_go_template():
    """Rendered with values that are then taken out, what is left is the template's own words."""
    messages = [
        {"role": "system", "content": "@@"},
        {"role": "user", "content": "@@"},
        {"role": "assistant", "content": "@@", "tool_calls": [{"name": "add", "arguments": {}}]},
        {"role": "tool", "content": "@@"},
    ]
    words = render(CHATML_TEMPLATE, messages, [TOOL], True)
    ours = literals(CHATML)
    for piece in re.split(r'@@|"add"|\{\}|\{"type": "function", "function": .*\}|\n', words):
        assert piece in ours, piece
    for spelled in ("<|im_start|>", "<|im_end|>", "<tool_call>", "<tool_response>", "<tools>"):
        assert spelled in ours
    assert not set(re.findall(r"<[|/\w]+>", ours)) - set(re.findall(r"<[|/\w]+>", words))


def test_actions_of_the_go_template_are_closed():
    opened = 0
    for action in re.findall(r"\{\{-?\s*(\S+)", CHATML):
        opened += (action in ("if", "range")) - (action == "end")
        assert opened >= 0
    assert opened == 0
    assert CHATML.count("{{") == CHATML.count("}}")
    assert '"""' not in CHATML


def test_parameters_come_from_the_generation_config(tokenizer):
    generation = {"temperature": 0.7, "top_k": 40, "repetition_penalty": 1.1, "max_new_tokens": 64,
                  "top_p": None, "do_sample": True, "min_p": float("nan"), "eos_token_id": [316, 317]}  # fmt: skip
    text = modelfile("m.gguf", tokenizer, generation, 256, False)
    for line in ("temperature 0.7", "top_k 40", "repeat_penalty 1.1", "num_predict 64"):
        assert f"PARAMETER {line}\n" in text
    for absent in ("top_p", "min_p", "do_sample"):
        assert absent not in text
    assert stops(text) == ["<|endoftext|>", "<|im_start|>"]


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] }}", "{% for m in messages %}[{{ m.role }}]{% endfor %}"]
)
def test_another_template_is_left_to_ollama(template, tokenizer):
    """It is in the GGUF file, where Ollama looks for one it knows."""
    other = Tokenizer(tokenizer._parsing, {"eos_token": "<|endoftext|>"}, template)
    assert speaks_chatml(tokenizer)
    assert not speaks_chatml(other)
    assert "TEMPLATE" not in modelfile("m.gguf", other, {}, 256, True)
