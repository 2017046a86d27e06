"""Strict settings: what is accepted, and what each mistake is answered with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from glasshouse.config import (
    build_config,
    config_to_dict,
    parse_config,
    read_recipe,
    recipe_name,
)
from glasshouse.errors import InputError


@dataclass(frozen=True)
class Settings:
    """Settings of a stage that exists for these tests.

    Args:
        documents: what to read.
        size: the dial.
        rate: a rate, or nothing.
        seed: the seed.
        shuffle: a switch.
        name: a name.
        corpus: a folder.
        weights: a table.
    """

    documents: tuple[str, ...]
    size: Literal["nano", "tiny"] = "tiny"
    rate: float | None = None
    seed: int = 0
    shuffle: bool = False
    name: str = ""
    corpus: Path | None = None
    weights: dict[str, float] = field(default_factory=dict)


def parse(*words: str) -> Settings:
    return parse_config(Settings, list(words), "prepare")


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> str:
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "recipe.yaml")

    return write


def refused(*words: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_options_of_every_type():
    words = "--documents a b --size nano --rate 1e-3 --seed 3 --shuffle --corpus x/y"
    found = parse(*words.split(), "--name", "12", "--weights", "{a: 1, b: 0.5}")
    assert found == Settings(("a", "b"), "nano", 0.001, 3, True, "12", Path("x/y"), {"a": 1.0, "b": 0.5})


def test_equals_sign_hyphens_negatives_and_switches():
    assert parse("--documents=a", "--rate=-1").rate == -1
    assert parse("--documents", "a", "--rate", "-1.5").rate == -1.5
    assert parse("--documents", "a", "--shuffle", "false").shuffle is False
    assert parse("--documents", "a", "--name", "null").name == "null"
    assert parse("--documents", "a", "--rate", "null").rate is None


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--documents a --sede 1", ["unknown option --sede", "did you mean --seed?"]),
        ("--documents a --zzzzzz 1", ["unknown option --zzzzzz", "known: --documents, --size"]),
        ("--documents a --seed x", ["'x' is not a whole number", "(--seed)"]),
        ("--documents a --seed 1.5", ["'1.5' is not a whole number"]),
        ("--documents a --rate fast", ["'fast' is not a number or null", "(--rate)"]),
        ("--documents a --size tinny", ["not one of nano, tiny", "did you mean tiny?"]),
        ("--documents a --shuffle maybe", ["unexpected 'maybe'"]),
        ("--documents a --seed", ["--seed needs a value"]),
        ("--documents a --seed 1 --seed 2", ["--seed is given twice"]),
        ("--documents a --seed 1 2", ["unexpected '2'"]),
        ("--documents a --weights 3", ["not a table"]),
        ("--seed 1", ["--documents is missing"]),
        ("stray", ["unexpected 'stray'"]),
        ("--config none.yaml", ["no such file", "none.yaml"]),
    ],
)
def test_mistakes_on_the_command_line(words: str, parts: list[str]):
    message = refused(*words.split())
    for part in parts:
        assert part in message


def test_recipe_file_and_overrides(recipe):
    path = recipe("name: x\nprepare:\n  documents: [a, b]\n  rate: 1e-4\n  seed: 5\npretrain: {}\n")
    assert parse("--config", path) == Settings(("a", "b"), rate=0.0001, seed=5)
    assert parse("--seed", "6", "--config", path).seed == 6
    assert read_recipe(Path(path)) == {
        "prepare": {"documents": ["a", "b"], "rate": "1e-4", "seed": 5},
        "pretrain": {},
    }
    assert recipe_name(Path(path)) == "x"
    assert recipe_name(Path(recipe("pretrain: {}"))) == "recipe"


def test_flat_file_and_one_text_for_a_list(recipe):
    assert parse("--config", recipe("documents: a\nseed: 2\n")) == Settings(("a",), seed=2)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: x\nprepar: {}\n", ["unknown stage 'prepar'", "did you mean prepare?"]),
        (
            "name: x\nprepare: {documents: [a], sede: 1}\n",
            ["unknown key 'sede'", "recipe.yaml: prepare.sede", "seed?"],
        ),
        ("name: x\nprepare: {documents: [a], seed: soon}\n", ["recipe.yaml: prepare.seed", "a whole number"]),
        ("prepare: {documents: [a], seed: }\n", ["None is not a whole number"]),
        ("prepare: {documents: [a], name: 12}\n", ["12 is not text", "put it in quotes"]),
        ("prepare: {documents: [a], shuffle: 1}\n", ["1 is not true or false"]),
        ("prepare:\n  documents: [a\n  seed: 1\n", ["not valid YAML", "recipe.yaml, line 3"]),
        ("prepare: {seed: 1}\nprepare: {seed: 2}\n", ["the key 'prepare' is written twice", "line 2"]),
        ("prepare: a\n", ["unknown key 'prepare'"]),
        ("name: x\nprepare: a\n", ["'a' is not a table of settings"]),
        ("name: [x]\nprepare: {}\n", ["name must be text"]),
        ("name: x\n", ["no stages"]),
        ("pretrain: {}\n", ["no 'prepare' part"]),
        ("- a\n", ["no settings"]),
        ("", ["no settings"]),
        ("!!python/object:os.system {}\n", ["not valid YAML"]),
        ("[" * 5000, ["recipe.yaml"]),
    ],
)
def test_mistakes_in_a_file(recipe, text: str, parts: list[str]):
    message = refused("--config", recipe(text))
    for part in parts:
        assert part in message


def test_a_binary_and_an_oversized_file(tmp_path: Path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused("--config", str(tmp_path / "x.yaml"))
    (tmp_path / "y.yaml").write_bytes(b" " * (2**20 + 1))
    assert "too large" in refused("--config", str(tmp_path / "y.yaml"))
    assert "cannot read" in refused("--config", str(tmp_path))


def test_help_comes_from_the_docstring(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(Settings, ["--help"], "prepare", options={"out RUN": "the run folder"})
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for part in (
        "usage: glasshouse prepare",
        "--out RUN",
        "what to read",
        "{nano,tiny}",
        "default: tiny",
        "--config FILE",
    ):
        assert part in text


def test_printed_config_is_a_recipe_that_gives_the_same_config(recipe, capsys):
    words = ["--documents", "a", "--rate", "0.1", "--corpus", "x"]
    with pytest.raises(SystemExit):
        parse(*words, "--print_config")
    assert parse("--config", recipe(capsys.readouterr().out)) == parse(*words)


def test_values_given_by_the_caller_lie_below_the_options():
    given = {"documents": ["a"], "seed": 4}
    assert parse_config(Settings, ["--seed", "5"], "prepare", given=given) == Settings(("a",), seed=5)


def test_config_survives_yaml(recipe):
    config = Settings(("a",), rate=0.25, corpus=Path("x"), weights={"a": 1.0})
    text = yaml.safe_dump(config_to_dict(config))
    assert build_config(Settings, yaml.safe_load(text)) == config
