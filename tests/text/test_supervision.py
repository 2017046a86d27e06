"""Examples as rows: only answers are learned, no example sees another, and training reads what serving reads."""

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glasshouse.errors import InputError
from glasshouse.text.examples import Example, ExampleCounts
from glasshouse.text.supervision import (
    IGNORED,
    Lesson,
    Lessons,
    encode_conversation,
    encode_examples,
    place,
    show_row,
)
from glasshouse.text.tokenizer import Tokenizer, train_tokenizer

WORDS = [
    "the cat",
    "sees",
    "a dog",
    "\n",
    "  ",
    "猫",
    "🐈‍⬛",
    "<|im_end|>",
    "2 + 2",
    "'s",
    "é",
    "<|im_start|>user",
]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        iter(["the cat sees a dog 猫 2 + 2 assistant user system " * 20]), 300, exact=False
    )


def random_chat(draw: random.Random) -> list[dict[str, Any]]:
    """Turns of every kind, with contents that spell special tokens."""
    messages: list[dict[str, Any]] = []
    for _ in range(draw.randint(1, 6)):
        role = draw.choice(["system", "user", "assistant", "tool"])
        content = "".join(draw.choice(WORDS) for _ in range(draw.randint(0, 5)))
        message: dict[str, Any] = {"role": role, "content": content}
        if role == "assistant" and draw.random() < 0.3:
            call = {"name": "look", "arguments": {"at": draw.choice(WORDS)}}
            message["tool_calls"] = [{"type": "function", "function": call}]
        messages.append(message)
    return [*messages, {"role": "assistant", "content": draw.choice(WORDS)}]


def test_training_reads_what_serving_reads(tokenizer: Tokenizer) -> None:
    """A thousand chats with tools: the tokens of training are those of the whole chat when it is served or scored, and
    each answer follows exactly the prompt that a server would have given for it."""
    draw = random.Random()
    for number in range(1000):
        messages, tools = random_chat(draw), draw.choice([[], TOOLS])
        lesson = encode_conversation(tokenizer, messages, str(number), tools)
        served = tokenizer.encode_chat(messages, tools or None, add_generation_prompt=False)
        assert lesson.tokens.tolist() == served, json.dumps(messages)
        starts = [
            place
            for place in range(len(served))
            if lesson.learned[place] and not (place and lesson.learned[place - 1])
        ]
        prompts = [
            tokenizer.encode_chat(messages[:turn], tools or None)
            for turn, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        assert starts == [len(prompt) for prompt in prompts]
        assert all(served[: len(prompt)] == prompt for prompt in prompts)


def test_what_is_learned_is_the_answers_and_their_end(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "So long"},
    ]  # fmt: skip
    lesson = encode_conversation(tokenizer, messages, "row")
    runs, learned = [], lesson.learned
    for number, token in enumerate(lesson.tokens.tolist()):
        if learned[number]:
            if not (number and learned[number - 1]):
                runs.append([])
            runs[-1].append(token)
    assert [tokenizer.decode(run, keep_special=True) for run in runs] == [
        "Hello<|im_end|>",
        "So long<|im_end|>",
    ]


lengths = st.lists(st.integers(1, 16), min_size=1, max_size=60)


@given(lengths, st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_every_lesson_is_in_one_row_that_holds_it(sizes: list[int], seed: int, epoch: int) -> None:
    rows = place(sizes, 16, seed, epoch)
    assert sorted(number for row in rows for number in row.lessons) == list(range(len(sizes)))
    assert all(sum(sizes[number] for number in row.lessons) <= 16 for row in rows)
    assert rows == place(sizes, 16, seed, epoch)


def made(sizes: list[int]) -> list[Lesson]:
    draw = np.random.default_rng(0)
    return [
        Lesson(f"row {n}", draw.integers(1, 200, size), draw.random(size) < 0.5)
        for n, size in enumerate(sizes)
    ]


def test_rows_hold_the_lessons_and_nothing_else() -> None:
    lessons = made([3, 9, 16, 5, 7, 2, 11])
    rows = Lessons(lessons, 16, pad=250, seed=1)
    batch = rows.batch(0, rows.rows)
    assert rows.waste == pytest.approx((batch.tokens == 250).mean())
    seen = set()
    for row in range(len(batch.tokens)):
        for document in set(batch.documents[row].tolist()):
            where = batch.documents[row] == document
            tokens, labels = batch.tokens[row][where], batch.labels[row][where]
            assert batch.positions[row][where].tolist() == list(range(int(where.sum())))
            if (tokens == 250).all():
                assert (labels == IGNORED).all()
                continue
            [number] = [n for n, lesson in enumerate(lessons) if lesson.tokens.tolist() == tokens.tolist()]
            lesson = lessons[number]
            seen.add(number)
            wanted = [
                int(t) if ok else IGNORED for t, ok in zip(lesson.tokens[1:], lesson.learned[1:], strict=True)
            ]
            assert labels.tolist() == [*wanted, IGNORED]
    assert seen == set(range(len(lessons)))


def test_batches_are_a_function_of_the_step() -> None:
    sizes = [1 + n % 13 for n in range(50)]
    straight, jumping = Lessons(made(sizes), 16, 0, 3), Lessons(made(sizes), 16, 0, 3)
    steps = {step: straight.batch(step, 4) for step in range(12)}
    for step in (9, 2, 11, 0):
        other = jumping.batch(step, 4)
        assert np.array_equal(other.tokens, steps[step].tokens)
        assert np.array_equal(other.labels, steps[step].labels)
    first_epoch = [name for step in range(3) for name in straight.row_names(step, 4)]
    assert len(set(first_epoch)) == len(first_epoch)
    assert not np.array_equal(Lessons(made(sizes), 16, 0, 4).batch(0, 4).tokens, steps[0].tokens)


def test_little_is_wasted_on_ordinary_lengths() -> None:
    draw = random.Random(0)
    sizes = [min(512, max(20, int(draw.lognormvariate(5, 0.6)))) for _ in range(2000)]
    assert Lessons(made(sizes), 512, 0, 0).waste < 0.05


def chat(row: str, asked: str, answer: str) -> Example:
    return Example(row, ({"role": "user", "content": asked},), ({"role": "assistant", "content": answer},))


def test_answers_cut_by_the_length_are_counted_and_those_gone_left_out(tokenizer: Tokenizer) -> None:
    examples = [
        chat("a:1", "Hi", "Hello"),
        chat("a:2", "Hi", "very long " * 30),
        chat("a:3", "long " * 60, "Hello"),
    ]
    counts = ExampleCounts()
    lessons = encode_examples(tokenizer, examples, 64, counts)
    assert [lesson.row for lesson in lessons] == ["a:1", "a:2"]
    assert (counts.shortened, counts.shortened_rows) == (1, ["a:2"])
    assert counts.rows == {"its answer begins after 64 tokens": ["a:3"]}
    assert len(lessons[1].tokens) == 64
    with pytest.raises(InputError, match="nothing is left to learn"):
        encode_examples(tokenizer, examples[2:], 64, ExampleCounts())


def test_a_row_is_shown_as_the_model_sees_it(tokenizer: Tokenizer) -> None:
    examples = [chat("a:1", "Hi", "Hello"), chat("a:2", "Bye", "So long")]
    lessons = encode_examples(tokenizer, examples, 128, ExampleCounts())
    shown = show_row(tokenizer, Lessons(lessons, 128, tokenizer.pad, 0).batch(0, 1), 0)
    assert [part.kind for part in shown] == ["seen", "learned", "seen", "border", "seen", "learned", "seen"]
    learned = {part.text for part in shown if part.kind == "learned"}
    assert learned == {"Hello<|im_end|>", "So long<|im_end|>"}
