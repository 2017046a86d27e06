"""Output that must have a form: JSON, a JSON schema, a regular expression, one of some choices, or a Lark grammar.

What may come next is computed by llguidance from the bytes that each token stands for, so characters split over tokens
need no care. What would take long to compile is refused before it is compiled: everything here may come from a
stranger. Knows tokenizers; nothing of models, logits or servers.
"""

import json
import re
from collections.abc import Collection, Iterator
from copy import deepcopy
from fractions import Fraction
from functools import lru_cache
from importlib import import_module
from math import lcm, prod
from string import printable
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from glasshouse.errors import InputError
from glasshouse.text.tokenizer import Tokenizer

KINDS = ("json_object", "json_schema", "regex", "choice", "grammar")
DEEPEST_SCHEMA = 64
"""Levels of nesting in a schema."""
MOST_VALUES = 10_000
"""Values in a schema, each entry of a list and each key of an object counted, and choices."""
MOST_CHARACTERS = 200_000
"""Characters of all strings and keys of a schema, of all choices, or of a grammar."""
MOST_PROPERTIES = {"properties": 400, "patternProperties": 32}
"""Of one object: every subset of them may come, so the cost is their square."""
LONGEST_PATTERN = 20_000
"""Characters of all regular expressions together, after {1,1000} is written out a thousand times."""
LARGEST_MULTIPLE = 10_000
"""The least common multiple of all multipleOf, in their smallest unit: an automaton has one state per remainder."""
MOST_COMBINATIONS = 128
"""Ways to take one branch of every anyOf or oneOf inside an allOf."""
WHITESPACE = r"[ \n]{0,20}"
"""Between the parts of JSON; bounded, or a model could fill its answer with blanks."""
JSON_OPTIONS = {
    "whitespace_pattern": WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
}
LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
"""llguidance's own limits, on top of ours: about 5 ms to compile and 10 ms a token at worst."""
_PATTERN_PART = re.compile(
    r"\\[pPxuU]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?P<low>\d+)(?P<open>,(?P<high>\d*))?\}|.",
    re.DOTALL,
)


class Constraint:
    """What one answer may still become; make it with `compile_constraint`, one `fork` per answer.

    Args:
        matcher: llguidance's state.
        field: what the constraint was called where it came from, for error messages.
    """

    def __init__(self, matcher: Any, field: str):
        self._matcher, self._field = matcher, field

    def allowed(self) -> Tensor:
        """Which tokens may come next: bool [tokenizer.vocab_size], on the CPU.

        End tokens are among them exactly when the answer is complete.

        Raises:
            InputError: what may come has become too complex to compute within the limits.
        """
        mask = self._matcher.compute_logit_bias()
        if self._matcher.is_error():
            raise self._too_complex()
        return torch.from_numpy(np.frombuffer(mask, dtype=np.uint8) != 0)

    def advance(self, token: int) -> None:
        """Take the token that came; an end token ends the answer.

        Raises:
            ValueError: it was not allowed.
            InputError: what may come has become too complex to compute within the limits.
        """
        if self._matcher.consume_token(token):
            return
        if "satisfy the grammar" in self._matcher.get_error():
            raise ValueError(f"token {token} is not allowed here: {_short(self._matcher.get_error())}")
        raise self._too_complex()

    def _too_complex(self) -> InputError:
        message = _short(self._matcher.get_error())
        return InputError(f"cannot be followed any further: {message}", self._field, "simplify it")

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete and nothing but an end token may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def is_accepting(self) -> bool:
        """Whether the answer is complete as it is, even if more may follow."""
        return self._matcher.is_accepting()

    def fork(self) -> "Constraint":
        """The same state once more, to go on from separately."""
        return Constraint(self._matcher.deep_copy(), self._field)


def compile_constraint(
    kind: str,
    value: Any,
    tokenizer: Tokenizer,
    end_tokens: Collection[int] = (),
    field: str = "response_format",
) -> Constraint:
    """A constraint at its beginning.

    Args:
        kind: "json_object" (any JSON object), "json_schema", "regex" (Rust's dialect, of the whole answer), "choice"
            or "grammar" (Lark, as llguidance reads it).
        value: nothing, the schema as a dict or as JSON, the expression, the list of choices, or the grammar.
        tokenizer: the model's.
        end_tokens: tokens that end the answer, besides the tokenizer's end_of_document.
        field: what to call the constraint in messages.

    Raises:
        InputError: the value is malformed, contradictory, uses what cannot be guaranteed, or is too large; or
            llguidance is not installed.
    """
    library = _library()
    grammar = _grammar(library, kind, value, field)
    limits = library.LLParserLimits(**LIMITS)
    vocabulary = _vocabulary(tokenizer, frozenset({tokenizer.end_of_document, *end_tokens}))
    matcher = library.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_logit_bias()  # a grammar that can never begin is found by its first step
    if matcher.is_error():
        message = _short(matcher.get_error())
        reason = "nothing can satisfy it" if message.startswith("NoExtension") else message
        raise InputError(f"cannot be compiled: {reason}", field, "correct or simplify it")
    return Constraint(matcher, field)


def _library() -> Any:
    try:
        return import_module("llguidance")
    except ImportError:
        raise InputError(
            "llguidance is needed for constrained output", "", 'in the project folder, pip install ".[serve]"'
        ) from None


@lru_cache(maxsize=16)
def _vocabulary(tokenizer: Tokenizer, ends: frozenset[int]) -> Any:
    """The tokens as llguidance wants them: by their bytes. Made once per tokenizer; a large one takes some 0.1 s."""

    class Vocabulary(SimpleNamespace):
        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode(text)

    library = _library()
    described = Vocabulary(
        eos_token_id=tokenizer.end_of_document,
        bos_token_id=None,
        tokens=[tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)],
        special_token_ids=[token for token in range(tokenizer.vocab_size) if tokenizer.is_special(token)],
    )
    return library.LLTokenizer(library.TokenizerWrapper(described), eos_token=sorted(ends))


def _grammar(library: Any, kind: str, value: Any, field: str) -> str:
    """llguidance's own form of a constraint whose size has been checked."""
    if kind in ("json_object", "json_schema"):
        schema = {"type": "object"} if kind == "json_object" else _read_schema(value, field)
        return library.LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
    if kind == "choice":
        pattern = _choice_pattern(value, field)
        return library.LLMatcher.grammar_from_regex(pattern)
    if kind not in KINDS:
        raise InputError(f"{kind!r} is no kind of constraint", field, f"use one of {', '.join(KINDS)}")
    if not isinstance(value, str):
        raise InputError(f"a {kind} must be text", field, "give a string")
    _require_text(value, field)
    _require_pattern_size([value], field)
    if kind == "regex":
        return library.LLMatcher.grammar_from_regex(value)
    if "%json" in value:  # a schema inside a grammar would come past the checks of schemas
        raise InputError("a grammar with %json in it", field, "give the schema as a json_schema")
    return library.LLMatcher.grammar_from_lark(value)


def _read_schema(value: Any, field: str) -> dict[str, Any]:
    """A schema of bounded size.

    Raises:
        InputError: it is none, or too large.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if len(value) <= MOST_CHARACTERS else value
        except (ValueError, RecursionError):
            raise InputError("the schema is not valid JSON", field, "give a JSON object") from None
    if not isinstance(value, dict):
        raise InputError(
            f"a schema of {type(value).__name__}", field,
            f"give a JSON object of at most {MOST_CHARACTERS:,} characters",
        )  # fmt: skip
    _require_size(value, field)
    value = deepcopy(value)
    parts = list(_parts(value))
    for part in parts:
        _require_cheap(part, field)
    _require_common_multiple([part.get("multipleOf") for part in parts], field)
    patterns = [part["pattern"] for part in parts if isinstance(part.get("pattern"), str)]
    patterns += [key for part in parts for key in _keys(part, "patternProperties")]
    _require_pattern_size(patterns, field)
    for part in parts:
        if isinstance(
            part.get("$ref"), str
        ):  # a definition's name in Chinese, as pydantic writes it, is no URI yet
            part["$ref"] = quote(part["$ref"], safe=printable)
    return value


def _keys(part: dict[str, Any], name: str) -> list[str]:
    inside = part.get(name)
    return list(inside) if isinstance(inside, dict) else []


def _require_size(schema: dict[str, Any], field: str) -> None:
    """Refuse a schema that is too deep or too large, without following it further than the limits."""
    waiting: list[tuple[Any, int]] = [(schema, 1)]
    values = characters = 0
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST_SCHEMA:
            raise InputError("the schema is nested too deeply", field, f"use at most {DEEPEST_SCHEMA} levels")
        inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        texts = list(value) if isinstance(value, dict) else [value] if isinstance(value, str) else []
        values, characters = values + 1, characters + sum(map(len, texts))
        if values + len(waiting) + len(inside) > MOST_VALUES or characters > MOST_CHARACTERS:
            raise InputError(
                "the schema is too large", field,
                f"use at most {MOST_VALUES:,} values and {MOST_CHARACTERS:,} characters",
            )  # fmt: skip
        waiting += [(item, depth + 1) for item in inside]


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a schema, itself first."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []


def _require_cheap(part: dict[str, Any], field: str) -> None:
    """Refuse the few keywords whose cost is more than their length."""
    for name, most in MOST_PROPERTIES.items():
        if len(_keys(part, name)) > most:
            raise InputError(f"{len(_keys(part, name)):,} {name} in one object", field, f"use at most {most}")
    every = part.get("allOf")
    branches = [_branches(member) for member in every] if isinstance(every, list) else []
    if prod(branches[:MOST_COMBINATIONS]) > MOST_COMBINATIONS:
        raise InputError(
            "an allOf with too many combinations of anyOf", field, f"use at most {MOST_COMBINATIONS}"
        )


def _require_common_multiple(steps: Collection[Any], field: str) -> None:
    """Refuse multipleOf whose automaton would be large: an allOf multiplies them."""
    numbers = {step for step in steps if isinstance(step, int | float) and not isinstance(step, bool)}
    fractions = [Fraction(str(step)) for step in numbers if 1e-9 <= step <= LARGEST_MULTIPLE]
    unit = lcm(*(fraction.denominator for fraction in fractions))
    if len(fractions) < len(numbers) or lcm(*(int(one * unit) for one in fractions)) > LARGEST_MULTIPLE:
        raise InputError(
            "multipleOf is out of range", field,
            f"use positive numbers whose least common multiple is at most {LARGEST_MULTIPLE:,} of their units",
        )  # fmt: skip


def _branches(schema: Any) -> int:
    """How many branches a schema chooses among."""
    parts = schema if isinstance(schema, dict) else {}
    lists = [parts[name] for name in ("anyOf", "oneOf") if isinstance(parts.get(name), list)]
    return prod(max(len(branches), 1) for branches in lists)


def _require_text(value: str, field: str) -> None:
    if len(value) > MOST_CHARACTERS or any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(
            f"{len(value):,} characters, or one that is half a character", field,
            f"give at most {MOST_CHARACTERS:,} characters of valid Unicode",
        )  # fmt: skip


def _require_pattern_size(patterns: Collection[str], field: str) -> None:
    total = 0
    for pattern in patterns:
        total += expanded_length(pattern)
        if total > LONGEST_PATTERN:
            raise InputError(
                "regular expressions that are too long once their repetitions are written out", field,
                f"use at most {LONGEST_PATTERN:,} characters",
            )  # fmt: skip


def expanded_length(pattern: str) -> int:
    """The characters of a regular expression once every counted repetition is written out; an estimate.

    A class, an escape or a character counts as one, `x{2,5}` as five times x, `x*` as x.
    """
    open_groups, last = [0], 0
    for part in _PATTERN_PART.finditer(pattern):
        text = part.group()
        if text == "(":
            open_groups.append(0)
            last = 0
        elif text == ")" and len(open_groups) > 1:
            last = open_groups.pop()
            open_groups[-1] += last
        elif part["low"] is not None:
            count = int((part["high"] or part["low"])[:9])
            open_groups[-1] += last * max(count - 1, 0)
            last *= max(count, 1)
        elif text not in "|*+?":
            last = 1
            open_groups[-1] += 1
    return sum(open_groups)


def _choice_pattern(choices: Any, field: str) -> str:
    """A regular expression for one of some texts, every character escaped that is not a plain letter or digit."""
    if not isinstance(choices, list | tuple) or not choices:
        raise InputError("no list of choices", field, "give a list of one or more strings")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise InputError("a choice that is no text", field, "give strings that are not empty")
    if len(choices) > MOST_VALUES or sum(map(len, choices)) > MOST_CHARACTERS:
        raise InputError(
            f"{len(choices):,} choices of {sum(map(len, choices)):,} characters", field,
            f"give at most {MOST_VALUES:,} of {MOST_CHARACTERS:,} characters together",
        )  # fmt: skip
    for choice in choices:
        _require_text(choice, field)
    return "|".join("".join(map(_escape, choice)) for choice in choices)


def _escape(character: str) -> str:
    plain = character.isascii() and character.isalnum()
    return character if plain else f"\\x{{{ord(character):X}}}"


def _short(message: str) -> str:
    """llguidance's message in one line: where, and the cause that its regular expressions' errors name last."""
    lines = message.splitlines() or [""]
    causes = [line for line in lines[1:] if line.startswith("error:")]
    return " ".join([lines[0].removeprefix("at 1(8): ")[:160], *causes[:1]])
