"""Examples in the formats people have become the same conversations; what cannot be learned is counted and named."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from glasshouse.errors import InputError
from glasshouse.text.examples import Example, ExampleCounts, read_examples

TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
ASKED = {"role": "user", "content": "What is 2 + 2?"}
ANSWERED = {"role": "assistant", "content": "4"}
SAME = {
    "messages": {"messages": [ASKED, ANSWERED]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]
    },
    "alpaca": {"instruction": "What is 2 + 2?", "input": "", "output": "4"},
    "completion": {"prompt": "What is 2 + 2?", "completion": "4"},
    "question": {"question": "What is 2 + 2?", "answer": "4"},
    "chat prompt": {"prompt": [ASKED], "completion": [ANSWERED]},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is 2 + 2?"}]}, ANSWERED]
    },
    "preference": {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"},
    "whole sides": {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, {"role": "assistant", "content": "5"}]},
    "hh": {
        "chosen": "\n\nHuman: What is 2 + 2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: What is 2 + 2?\n\nAssistant: 5",
    },
}


def write(path: Path, rows: list[Any]) -> Path:
    text = (
        "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    )
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path, **options: Any) -> tuple[list[Example], ExampleCounts]:
    counts = ExampleCounts()
    return read_examples([path], counts, **options), counts


@pytest.mark.parametrize("name", SAME)
def test_every_form_is_the_same_conversation(tmp_path: Path, name: str) -> None:
    [example], counts = read(write(tmp_path / "a.jsonl", [SAME[name]]))
    assert example.conversation == [ASKED, ANSWERED]
    assert example.row == "a.jsonl:1"
    assert counts.kept == 1
    if "rejected" in SAME[name]:
        assert example.rejected == ({"role": "assistant", "content": "5"},)


@pytest.mark.parametrize("ending", ["json", "csv", "tsv", "jsonl.gz"])
def test_files_of_every_kind(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    rows = [{"prompt": f"猫 {n}", "completion": f"cat {n}"} for n in range(3)]
    if ending == "json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif ending == "csv":
        path.write_text(
            "prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows),
            encoding="utf-8",
        )
    elif ending == "tsv":
        path.write_text("".join(f"{r['prompt']}\t{r['completion']}\n" for r in rows), encoding="utf-8")
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    examples, _ = read(path)
    assert [one.conversation[0]["content"] for one in examples] == ["猫 0", "猫 1", "猫 2"]
    assert [one.conversation[1]["content"] for one in examples] == ["cat 0", "cat 1", "cat 2"]


def test_alpaca_s_input_system_and_history(tmp_path: Path) -> None:
    row = {
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    [example], _ = read(write(tmp_path / "a.jsonl", [row]))
    assert [(m["role"], m["content"]) for m in example.conversation] == [
        ("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n\n1 2"), ("assistant", "3"),
    ]  # fmt: skip


def test_calls_of_functions(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Weather in Oslo?"},
            {
                "from": "function_call",
                "value": json.dumps({"name": "weather", "arguments": {"city": "Oslo"}}),
            },
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "It rains."},
        ],
        "tools": json.dumps([TOOL]),
    }
    [example], _ = read(write(tmp_path / "a.jsonl", [row]))
    assert [m["role"] for m in example.conversation] == ["user", "assistant", "tool", "assistant"]
    [call] = example.conversation[1]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": {"city": "Oslo"}}
    assert example.tools == ({"type": "function", "function": TOOL},)


def test_what_cannot_be_learned_is_counted_and_named(tmp_path: Path) -> None:
    good = SAME["messages"]
    rows = [
        good,
        "no json",
        {"messages": [ASKED]},
        {"messages": [ASKED, {"role": "assistant", "content": "  "}]},
        {"messages": [{"role": "wizard", "content": "x"}, ANSWERED]},
        good,
        {"messages": []},
        {"messages": [ASKED, {"role": "assistant", "content": "four"}]},
    ]
    examples, counts = read(write(tmp_path / "a.jsonl", rows))
    assert [one.row for one in examples] == ["a.jsonl:1", "a.jsonl:8"]
    assert counts.rows == {
        "invalid json": ["a.jsonl:2"], "it does not end with an answer": ["a.jsonl:3"], "the answer is empty": ["a.jsonl:4"],
        "unknown role 'wizard'": ["a.jsonl:5"], "occurred before": ["a.jsonl:6"], "no messages": ["a.jsonl:7"],
    }  # fmt: skip
    assert "left out 1 row: occurred before (a.jsonl:6)" in counts.lines()


def test_one_sided_pairs_are_left_out(tmp_path: Path) -> None:
    rows = [
        SAME["preference"],
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "  "},
    ]
    _, counts = read(write(tmp_path / "a.jsonl", rows))
    assert counts.kept == 1
    assert set(counts.dropped) == {"the chosen answer is the rejected one", "no chosen", "rejected is empty"}


def test_a_judged_answer_keeps_its_judgement(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b", "label": False},
        {"prompt": "a", "completion": "b", "label": True},
    ]
    examples, _ = read(write(tmp_path / "a.jsonl", rows))
    assert [one.good for one in examples] == [False, True]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"foo": 1, "bar": 2, "baz": 3}\n', "the fields there are bar, baz, foo"),
        ("a.jsonl", "{}\n", "unknown form"),
        ("a.jsonl", "", "no row is an example"),
        ("a.jsonl", "not json\n", "invalid json"),
        ("a.docx", "x", "not a format"),
        ("missing", None, "no such file"),
    ],
)
def test_files_without_examples_are_refused(
    tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said):
        read(path)


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(
        "".join(json.dumps({"prompt": str(n), "completion": "x"}) + "\n" for n in range(500)).encode()
    )
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="torn"):
        read(path)
