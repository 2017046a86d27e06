"""What constrained output costs: milliseconds to compile or refuse, microseconds a token, for forms of many kinds.

    python benchmarks/constraining.py [MODEL] [--rounds 20]

With a model its tokenizer is used (the cost grows with the vocabulary), else a small one. Every form is compiled in turn,
round after round; then tokens are drawn at random from what is allowed. Printed are medians and the worst.
"""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from glasshouse.errors import InputError
from glasshouse.inference.constrain import compile_constraint
from glasshouse.text.tokenizer import Tokenizer, open_tokenizer, train_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "城市": {"enum": ["北京", "上海", "Paris"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 5},
    },
    "required": ["name", "age", "城市", "tags"],
    "additionalProperties": False,
}


def nested(depth: int) -> dict[str, Any]:
    """A schema of so many objects, each in the one before."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


FORMS: dict[str, tuple[str, Any]] = {
    "any JSON object": ("json_object", None),
    "a person": ("json_schema", PERSON),
    "one of 1,000 strings": ("json_schema", {"enum": [f"value {number}" for number in range(1000)]}),
    "300 optional properties": ("json_schema", {"properties": {f"k{number}": {} for number in range(300)}}),
    "a date": ("regex", r"[12]\d{3}-(0[1-9]|1[0-2])-([0-2][0-9]|3[01])"),
    "a choice": ("choice", ["yes", "no", "也许"]),
    "bomb: 200 levels": ("json_schema", nested(200)),
    "bomb: 100,000 values": ("json_schema", {"enum": [f"v{number}" for number in range(10**5)]}),
    "bomb: repetitions": ("regex", "(a{1,1000}){1,1000}"),
    "bomb: bad pattern": ("regex", "(a"),
    "bomb: $ref to itself": ("json_schema", {"$ref": "#"}),
    "bomb: large multipleOf": ("json_schema", {"type": "integer", "multipleOf": 999_983}),
    "bomb: allOf of anyOf": (
        "json_schema",
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(8)]} for i in range(8)]},
    ),
}


def walk(kind: str, value: Any, tokenizer: Tokenizer, seed: int) -> list[float]:
    """Seconds of each step of a text drawn at random from what is allowed."""
    constraint, chance = compile_constraint(kind, value, tokenizer), random.Random(seed)
    seconds = []
    for _ in range(60):
        started = time.perf_counter()
        allowed = torch.nonzero(constraint.allowed()).flatten().tolist()
        token = chance.choice(allowed)
        constraint.advance(token)
        seconds.append(time.perf_counter() - started)
        if token == tokenizer.end_of_document:
            break
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a model folder, for its tokenizer")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    small = ["The cat sat on the mat. 猫坐在垫子上。\n"] * 99
    tokenizer = (
        open_tokenizer(Path(arguments.model)) if arguments.model else train_tokenizer(iter(small), 400, False)
    )
    compile_constraint("json_object", None, tokenizer)  # the vocabulary is read once
    taken: dict[str, list[float]] = {name: [] for name in FORMS}
    refused: dict[str, str] = {}
    for _ in range(arguments.rounds):
        for name, (kind, value) in FORMS.items():
            started = time.perf_counter()
            try:
                compile_constraint(kind, value, tokenizer)
            except InputError as error:
                refused[name] = str(error)
            taken[name].append(1e3 * (time.perf_counter() - started))
    print(f"{tokenizer.vocab_size:,} tokens, {arguments.rounds} rounds")
    for name, (kind, value) in FORMS.items():
        line = f"  {name:<26} {statistics.median(taken[name]):6.2f} ms, worst {max(taken[name]):6.2f}"
        if name in refused:
            print(f"{line}   refused: {refused[name][:70]}")
            continue
        steps = [1e6 * one for seed in range(arguments.rounds) for one in walk(kind, value, tokenizer, seed)]
        print(f"{line}   a token {statistics.median(steps):6.0f} µs, worst {max(steps):6.0f}")


if __name__ == "__main__":
    main()
