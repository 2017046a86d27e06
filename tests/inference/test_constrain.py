"""Constrained output: what a random model writes under a constraint is what the constraint says, in any script."""

import json
import re
import sys

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.errors import InputError
from glasshouse.inference.constrain import (
    LONGEST_PATTERN,
    MOST_CHARACTERS,
    MOST_VALUES,
    compile_constraint,
    expanded_length,
)
from glasshouse.inference.sampling import GenerationConfig, make_sampler
from glasshouse.text.tokenizer import train_tokenizer

TEXT = 'The cat sat on the mat. 猫坐在垫子上。🙂 {"name": "猫", "age": 3, "ok": true, "list": [1, 2.5e3, null]}\n狗跑了。\n'
TOKENIZER = train_tokenizer(iter([TEXT] * 4), 320)
END, TURN_END = TOKENIZER.end_of_document, TOKENIZER.special["<|im_end|>"]


def write(constraint, seed, temperature=1.0, closing=0.0, limit=3000):
    """What a model of random logits writes; None when it is not done within the limit.

    `closing` makes the tokens likelier that close strings and lists, so that open forms come to an end.
    """
    random = torch.Generator().manual_seed(seed)
    sampler = make_sampler(GenerationConfig(temperature, seed=seed), 0)
    bias = torch.zeros(TOKENIZER.vocab_size)
    bias[[TOKENIZER.encode(text)[0] for text in ('"', "}", "]")]] = closing
    written = []
    for _ in range(limit):
        allowed = constraint.allowed()
        assert allowed.dtype == torch.bool
        assert allowed.shape == (TOKENIZER.vocab_size,)
        assert bool(allowed[END]) == bool(allowed[TURN_END]) == constraint.is_accepting
        logits = 3 * torch.randn(TOKENIZER.vocab_size, generator=random) + bias
        token = int(sampler.choose(torch.tensor(written, dtype=torch.int64), logits, allowed))
        constraint.advance(token)
        if token in (END, TURN_END):
            assert constraint.is_finished
            return TOKENIZER.decode_bytes(written).decode("utf-8", "strict")
        assert not TOKENIZER.is_special(token)
        written.append(token)
    return None


def compiled(kind, value=None):
    return compile_constraint(kind, value, TOKENIZER, [TURN_END])


# ---- JSON


NAMES = st.sampled_from(["name", "年龄", "🙂", 'a"b', "with space", "x\\y", "ключ", ""])
SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-2000, 2000),
        st.integers(0, 500),
    ),
    st.builds(lambda size: {"type": "string", "maxLength": size}, st.integers(0, 6)),
    st.just({"type": "string", "pattern": "^(猫|狗){1,3}[0-9]?$"}),
    st.lists(
        st.one_of(st.text(max_size=4), st.integers(-5, 5), st.none()), min_size=1, max_size=4, unique_by=repr
    ).map(lambda values: {"enum": values}),
    st.one_of(st.text(max_size=5), st.just([1, {"键": None}])).map(lambda value: {"const": value}),
)


def composed(inner):
    objects = st.dictionaries(NAMES, inner, max_size=4).flatmap(
        lambda properties: st.lists(st.sampled_from(sorted(properties) or ["name"]), unique=True).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": [name for name in required if name in properties],
                "additionalProperties": False,
            }
        )
    )
    arrays = st.builds(
        lambda items, size: {"type": "array", "items": items, "maxItems": size}, inner, st.integers(0, 3)
    )
    return st.one_of(
        objects, arrays, st.lists(inner, min_size=1, max_size=3).map(lambda anys: {"anyOf": anys})
    )


@settings(max_examples=120, deadline=None)
@given(st.recursive(SCALARS, composed, max_leaves=6), st.integers(0, 2**20), st.sampled_from([0.7, 1.5]))
def test_json_of_a_random_model_is_valid(schema, seed, temperature):
    text = write(compiled("json_schema", schema), seed, temperature)
    assert text is not None
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


TREE = {
    "$ref": "#/$defs/节点",
    "$defs": {
        "节点": {
            "type": "object",
            "properties": {
                "值": {"type": "number"},
                "子": {"type": "array", "items": {"$ref": "#/$defs/节点"}},
            },
            "required": ["值", "子"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.parametrize("as_text", [False, True])
def test_a_recursive_schema(as_text):
    texts = [
        write(compiled("json_schema", json.dumps(TREE) if as_text else TREE), seed, 1.5, closing=4)
        for seed in range(12)
    ]
    finished = [text for text in texts if text is not None]
    for text in finished:
        jsonschema.validate(json.loads(text), TREE)
    assert len(finished) > 6
    assert any(json.loads(text)["子"] for text in finished)


def test_json_mode_is_an_object():
    texts = [write(compiled("json_object"), seed, 1.5, closing=7) for seed in range(20)]
    finished = [json.loads(text) for text in texts if text is not None]
    assert len(finished) > 10
    assert all(isinstance(value, dict) for value in finished)
    assert any(value for value in finished)


# ---- expressions, choices, grammars


PATTERNS = st.recursive(
    st.sampled_from(["a", "猫", "🙂", "[a-f]", "[^a]", ".", r"\.", r"[猫狗]", " ", "/", '"', r"\\", "é"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: "(" + "|".join(parts) + ")"),
        st.builds(
            lambda part, low, size: f"(?:{part}){{{low},{low + size}}}",
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        inner.map(lambda part: f"({part})?"),
    ),
    max_leaves=8,
)


@settings(max_examples=120, deadline=None)
@given(PATTERNS, st.integers(0, 2**20))
def test_an_expression_matches_the_whole_answer(pattern, seed):
    text = write(compiled("regex", pattern), seed, 1.5)
    assert text is not None
    assert re.fullmatch(pattern, text), (pattern, text)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=6), st.integers(0, 2**20))
def test_a_choice_is_one_of_the_choices(choices, seed):
    """Also what may come at each step is checked, by trying every token on every choice."""
    constraint, wanted, written = compiled("choice", choices), {choice.encode() for choice in choices}, b""
    random = torch.Generator().manual_seed(seed)
    while True:
        expected = {
            token
            for token in range(TOKENIZER.vocab_size)
            if not TOKENIZER.is_special(token)
            and any(choice.startswith(written + TOKENIZER.token_bytes(token)) for choice in wanted)
        }
        expected |= {END, TURN_END} if written in wanted else set()
        allowed = torch.nonzero(constraint.allowed()).flatten()
        # Where only one text is possible, of its spellings only the tokenizer's own may be allowed.
        assert set(allowed.tolist()) <= expected
        assert {END, TURN_END} & set(allowed.tolist()) == {END, TURN_END} & expected
        if len({TOKENIZER.token_bytes(token)[:1] for token in expected}) > 1:
            assert set(allowed.tolist()) == expected
        assert constraint.is_finished == (expected == {END, TURN_END})
        token = int(allowed[torch.randint(len(allowed), (1,), generator=random)])
        constraint.advance(token)
        if token in (END, TURN_END):
            assert written in wanted
            return
        written += TOKENIZER.token_bytes(token)


def test_a_grammar():
    grammar = 'start: "答案: " number ("+" number)*\nnumber: /[0-9]{1,3}/ | "π"'
    texts = [write(compiled("grammar", grammar), seed, 1.5) for seed in range(8)]
    assert all(re.fullmatch(r"答案: ([0-9]{1,3}|π)(\+([0-9]{1,3}|π))*", text) for text in texts)
    assert len(set(texts)) > 4


# ---- state


def test_a_fork_goes_its_own_way():
    first = compiled("choice", ["猫坐", "猫跑"])
    for token in TOKENIZER.encode_bytes("猫".encode()):
        first.advance(token)
    second = first.fork()
    for token in TOKENIZER.encode_bytes("坐".encode()):
        first.advance(token)
    for token in TOKENIZER.encode_bytes("跑".encode()):
        second.advance(token)
    assert first.is_finished
    assert second.is_finished
    assert first.allowed().nonzero().flatten().tolist() == sorted([END, TURN_END])


def test_a_token_that_is_not_allowed_is_an_error():
    constraint = compiled("choice", ["a"])
    with pytest.raises(ValueError, match="not allowed"):
        constraint.advance(TOKENIZER.encode("b")[0])


def test_what_only_spells_a_special_token_is_written_as_text():
    text = write(compiled("choice", ["<|im_end|><|endoftext|>"]), 0)
    assert text == "<|im_end|><|endoftext|>"


# ---- refusals


def nested(depth):
    schema = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def alternatives(count, size):
    return [{"anyOf": [{"properties": {f"k{i}{j}": {}}} for j in range(size)]} for i in range(count)]


BOMBS = {
    "depth": ("json_schema", nested(200), "nested too deeply"),
    "depth as text": ("json_schema", json.dumps(nested(200)), "nested too deeply"),
    "depth beyond Python": ("json_schema", '{"a":' * 50_000 + "1" + "}" * 50_000, "not valid JSON|schema"),
    "enum": ("json_schema", {"enum": [f"v{i}" for i in range(10**5)]}, "too large"),
    "long text": ("json_schema", {"const": "x" * (MOST_CHARACTERS + 1)}, "too large"),
    "long key": ("json_schema", {"properties": {"x" * (MOST_CHARACTERS + 1): {}}}, "too large"),
    "text too long": ("json_schema", "x" * (MOST_CHARACTERS + 1), "JSON object"),
    "properties": ("json_schema", {"properties": {f"k{i}": {} for i in range(500)}}, "500 properties"),
    "pattern properties": ("json_schema", {"patternProperties": {f"k{i}": {} for i in range(33)}}, "33 pattern"),
    "pattern": ("json_schema", {"type": "string", "pattern": "(a{1,1000}){1,1000}"}, "too long"),
    "pattern of a key": ("json_schema", {"patternProperties": {"(a{1,1000}){1,1000}": {}}}, "too long"),
    "many patterns": ("json_schema", {"anyOf": [{"pattern": "a{5000}"}] * 5}, "too long"),
    "multiple": ("json_schema", {"type": "integer", "multipleOf": 999_983}, "multipleOf"),
    "multiples": ("json_schema", {"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf"),
    "multiple of nothing": ("json_schema", {"type": "number", "multipleOf": 0}, "multipleOf"),
    "multiple of infinity": ("json_schema", {"type": "number", "multipleOf": float("inf")}, "multipleOf"),
    "combinations": ("json_schema", {"allOf": alternatives(8, 8)}, "too many combinations"),
    "itself": ("json_schema", {"$ref": "#"}, "nothing can satisfy"),
    "loop": ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "nothing can satisfy"),
    "another machine": ("json_schema", {"$ref": "http://example.org/x.json"}, "not present"),
    "contradiction": ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
    "what cannot be kept": ("json_schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
    "unknown type": ("json_schema", {"type": "nope"}, "nope"),
    "no schema": ("json_schema", None, "JSON object"),
    "a list": ("json_schema", [1], "JSON object"),
    "no JSON": ("json_schema", "{", "not valid JSON"),
    "repetitions": ("regex", "(a{1,1000}){1,1000}", "too long"),
    "bad expression": ("regex", "(a", "unclosed group"),
    "look-around": ("regex", "(?=a)b", "look-around"),
    "half a character": ("regex", "a\ud800", "half a character"),
    "no expression": ("regex", 5, "must be text"),
    "no choices": ("choice", [], "list of choices"),
    "empty choice": ("choice", ["a", ""], "not empty"),
    "choices of numbers": ("choice", [1], "not empty"),
    "too many choices": ("choice", ["a"] * (MOST_VALUES + 1), "10,001 choices"),
    "choice of half a character": ("choice", ["\udc00"], "half a character"),
    "bad grammar": ("grammar", "start: nowhere", "nowhere"),
    "schema in a grammar": ("grammar", 'start: %json {"multipleOf": 999983}', "json_schema"),
    "unknown kind": ("yaml", "", "no kind"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_and_nonsense_are_refused_by_name(bomb):
    kind, value, message = BOMBS[bomb]
    with pytest.raises(InputError, match=message) as refusal:
        compile_constraint(kind, value, TOKENIZER, field="guided_form")
    assert refusal.value.where == "guided_form"
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    "bomb", ["enum", "depth", "repetitions", "multiple", "combinations", "too many choices"]
)
def test_a_bomb_never_reaches_the_compiler(bomb, monkeypatch):
    import llguidance

    monkeypatch.setattr(llguidance, "LLMatcher", None)
    kind, value, message = BOMBS[bomb]
    with pytest.raises(InputError, match=message):
        compile_constraint(kind, value, TOKENIZER)


def test_a_form_that_grows_too_complex_on_the_way_is_an_error_of_its_own():
    objects = [
        {"type": "object", "properties": {f"k{i}{j}": {"type": "string"} for j in range(5)}}
        for i in range(300)
    ]
    with pytest.raises(InputError, match="cannot be followed"):
        write(compiled("json_schema", {"anyOf": objects}), 0)


@pytest.mark.parametrize(
    ("pattern", "length"),
    [
        ("", 0),
        ("abc", 3),
        ("a{3}", 3),
        ("a{2,5}b", 6),
        ("a{2,}", 2),
        ("(ab){3}", 6),
        ("((a{2}b){3}c){4}", 40),
        (r"\{3\}\p{L}\x{41}", 5),
        ("[a{9}(]{2}", 2),
        ("[]]{4}", 4),
        ("(a|b)*", 2),
        ("a)b{2}", 4),
        ("(a{1,1000}){1,1000}", 10**6),
        ("a{99999999999999}", 999999999),
        ("猫{2}", 2),
    ],
)
def test_length_with_repetitions_written_out(pattern, length):
    assert expanded_length(pattern) == length


def test_the_longest_expression_itself_is_allowed():
    compile_constraint("regex", f"a{{1,{LONGEST_PATTERN}}}", TOKENIZER)


def test_the_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r'pip install "\.\[serve\]"'):
        compile_constraint("json_object", None, TOKENIZER)
