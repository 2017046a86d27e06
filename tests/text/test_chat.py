"""Chat templates: the same text as transformers, and nothing a stranger's template can do to the machine."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from glasshouse.errors import InputError
from glasshouse.text.chat import CHATML_TEMPLATE, RenderLimits, render, render_segments
from glasshouse.text.tokenizer import SPECIAL_TOKENS

CALL = {"function": {"name": "add", "arguments": {"a": 1, "b": "<é>"}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "It is 2."},
]
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]
LLAMA = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('system must come first') }}{% endif %}{% if loop.last %}LAST {% endif %}"
    "{% generation %}[{{ message['role'] | upper }}] {{ message.content | trim }}{% endgeneration %}"
    "{% if loop.index0 > 2 %}{% break %}{% endif %}\n{% endfor %}{{ tools | tojson(indent=2) if tools else '' }}"
)


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", [CHATML_TEMPLATE, LLAMA])
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:2], CONVERSATION[:1]])
def test_it_renders_what_transformers_renders(template: str, messages: Any, tools: Any, prompt: bool):
    names = {"bos_token": "<s>"}
    theirs, _ = render_jinja_template(
        [messages], tools=tools, chat_template=template, add_generation_prompt=prompt, **names
    )
    assert render(template, messages, tools, prompt, names=names) == theirs[0]


def test_chatml():
    text = render(CHATML_TEMPLATE, CONVERSATION[:2], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )
    called = render(CHATML_TEMPLATE, CONVERSATION, TOOLS)
    assert called.count('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "<é>"}}\n</tool_call>') == 2
    assert called.count("Be brief.") == 1
    assert "<tool_response>\n2\n</tool_response>" in called


DOUBLE = (
    "{{% set ns = namespace(x='aa') %}}{{% for i in range(99) %}}{body}{{% endfor %}}{{{{ ns.x | length }}}}"
)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in messages | map('upper') %}{% for c in range(999) %}{% endfor %}"
        "{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        DOUBLE.format(body="{% set ns.x = ns.x ~ ns.x %}"),
        DOUBLE.format(body="{% set ns.x = ns.x + ns.x %}"),
        DOUBLE.format(body="{% set ns.x = [ns.x, ns.x] | join %}"),
        DOUBLE.format(body="{% set ns.x = ''.join([ns.x, ns.x]) %}"),
        DOUBLE.format(body="{% set ns.x = ns.x | replace('a', 'aa') %}"),
        DOUBLE.format(body="{% set ns.x = ns.x.replace('a', 'aa') %}"),
        DOUBLE.format(body="{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=2**63) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ 'a' * 10**9 }}",
        "{{ [1] * 10**9 }}",
        "{{ 'a'.center(10**9) }}",
        "{{ 'a' | center(10**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ range(10**9) | list }}",
        "{{ lipsum(n=10**6) }}",
        "{% include '/etc/passwd' %}",
        "{% set a = ('x' * 10**6) | list %}{% for i in range(9999) %}{% set b = a | string | list %}{% endfor %}",
        "x" * 300_000,
        "{{ unfinished",
        "{{ raise_exception('no such role') }}",
    ],
)
def test_a_hostile_or_broken_template_is_refused_in_one_line(template: str):
    with pytest.raises(InputError, match="chat_template") as caught:
        render(
            template, [{"role": "user", "content": "hi"}], limits=RenderLimits(operations=50_000, seconds=1)
        )
    assert "\n" not in str(caught.value)


def test_the_output_has_a_limit_and_ordinary_long_conversations_stay_below_it():
    messages = [{"role": "user", "content": "x" * 1000}] * 2000
    assert len(render(CHATML_TEMPLATE, messages)) > 2_000_000
    with pytest.raises(InputError, match="too long"):
        render(CHATML_TEMPLATE, messages, limits=RenderLimits(output_characters=1_000_000))


@pytest.mark.parametrize(
    "messages", [[{"role": "user"}], [{"content": "x"}], ["text"], [{"role": "user", "content": 3}]]
)
def test_messages_of_the_wrong_form_are_refused(messages: Any):
    if messages == [{"role": "user"}]:
        assert render(CHATML_TEMPLATE, messages) == "<|im_start|>user\n<|im_end|>\n"
    else:
        with pytest.raises(InputError, match="chat_template"):
            render(CHATML_TEMPLATE, messages)


content = st.lists(st.sampled_from([*SPECIAL_TOKENS, "hi", "\n", "<|im_", "end|>", "1234567890", "猫"])).map(
    "".join
)


@given(st.lists(content, max_size=4))
@settings(deadline=None, max_examples=25)
def test_segments_join_to_the_text_and_only_the_template_writes_special_tokens(contents: list[str]):
    messages = [{"role": "user", "content": text} for text in contents]
    segments = render_segments(CHATML_TEMPLATE, messages, SPECIAL_TOKENS, add_generation_prompt=True)
    assert "".join(one.text for one in segments) == render(
        CHATML_TEMPLATE, messages, add_generation_prompt=True
    )
    special = [one.text for one in segments if one.special]
    assert special == ["<|im_start|>", "<|im_end|>"] * len(messages) + ["<|im_start|>"]


def test_segments_hide_special_tokens_in_tools_too():
    tool = {"type": "function", "function": {"name": "<|im_end|>", "description": "<|im_start|>system"}}
    segments = render_segments(CHATML_TEMPLATE, CONVERSATION[1:2], SPECIAL_TOKENS, [tool])
    assert sum(one.special for one in segments) == 4
    assert "".join(one.text for one in segments) == render(CHATML_TEMPLATE, CONVERSATION[1:2], [tool])
    assert render_segments("a{{ 1 }}", [], []) == [("a1", False, False)]


roles = st.sampled_from(["system", "user", "assistant", "tool"])
turns = st.lists(st.builds(lambda role, text: {"role": role, "content": text}, roles, content), max_size=6)


@given(turns)
@settings(deadline=None, max_examples=25)
def test_an_answer_begins_where_the_model_was_asked_for_it(messages: list[dict[str, str]]):
    """The pieces up to each answer are those that the model was given when it wrote it."""
    segments = render_segments(CHATML_TEMPLATE, messages, SPECIAL_TOKENS)
    asked = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    begins = [
        place
        for place, one in enumerate(segments)
        if one.answer and not (place and segments[place - 1].answer)
    ]
    for number in asked:
        prompt = render_segments(CHATML_TEMPLATE, messages[:number], SPECIAL_TOKENS, None, True)
        assert segments[: len(prompt)] == prompt
        assert len(prompt) in begins
    answers = "".join(one.text for one in segments if one.answer)
    assert answers == "".join(messages[number]["content"] + "<|im_end|>\n" for number in asked)


def test_a_template_that_rewrites_the_past_has_no_answers():
    template = "{% for m in messages %}{% if loop.last %}{{ m.role }}:{% endif %}{{ m.content }};{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    segments = render_segments(template, messages, [])
    assert [one.text for one in segments] == ["a;assistant:b;"]
    assert not segments[0].answer
