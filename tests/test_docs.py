"""Every command in the documentation runs, in order, as written; only sizes are made small so that it takes seconds.

Read are the fenced blocks marked `sh` and `python` of README.md and docs/*.md. A block is left out when the line before
it is `<!-- no-test: reason -->`. All run in one folder, which holds `my_folder/` with some text, `my.jsonl` with questions and answers, `my_preferences.jsonl` with
better and worse ones, `my_pairs.tsv` and files like it
with sentences and their counterparts, and `recipes/` with a small copy of every recipe; README.zh.md must show the
same commands as README.md.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"^(<!-- no-test: (?P<reason>.+?) -->\n)?```(?P<language>sh|python)\n(?P<text>.*?)^```$", re.S | re.M
)
NOT_RUN_HERE = {
    "git": "needs the network",
    "cd": "the folder is this one",
    "pip": "installs",
    "make": "installs; `make demo` is tried with the small recipe instead",
    "torchrun": "tried by the tests of training/distributed",
}
QUICK = {"size": "nano", "steps": 20, "validations": 2, "threads": 1}
QUICK_PAIRS = {"width": 32, "heads": 2, "layers": 1, "feed_forward": 64, "vocab_size": 300, "epochs": 1, "validations": 1,
               "threads": 1}  # fmt: skip
ANIMALS = ["cat", "dog", "hen", "fox", "cow", "owl", "bee", "ant"]
PLACES = ["house", "river", "garden", "school", "market", "forest", "bridge", "kitchen"]


def blocks(path: Path, language: str = "") -> list[str]:
    found = BLOCK.finditer(path.read_text(encoding="utf-8"))
    return [m["text"] for m in found if not m["reason"] and m["language"] == (language or m["language"])]


def commands(path: Path) -> list[str]:
    """The command lines of the sh blocks, without comments; lines that end in a backslash are joined."""
    lines = "\n".join(blocks(path, "sh")).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split(" ; ")]
    return [" ".join(part.split()) for part in parts if part.strip()]


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def quick(command: str) -> str:
    """The same command on a small model and for a few steps."""
    if command == "make demo":
        return "glasshouse demo --config recipes/demo.yaml"
    if (
        re.match(r"glasshouse pretrain\b", command)
        and "--config" not in command
        and "--resume" not in command
    ):
        command = re.sub(r"\s--(size|minutes|epochs|steps)[ =]\S+", "", command)
        small = QUICK_PAIRS if " --pairs " in command else QUICK
        return command + "".join(f" --{name} {value}" for name, value in small.items())
    if re.match(r"glasshouse finetune\b", command) and "--resume" not in command:
        return re.sub(r"\s--epochs[ =]\S+", "", command) + " --steps 2 --validations 1 --threads 1"
    if re.match(r"glasshouse prepare\b", command):
        command = re.sub(r"\s--vocab_size[ =]\S+", "", command) + " --vocab_size 400"
    return command


def quick_recipe(recipe: dict) -> dict:
    if "prepare" in recipe:
        recipe["prepare"] |= {"documents": ["my_folder"], "vocab_size": 400}
    if "pairs" in recipe.get("pretrain", {}):
        files = {"pairs": ["my_pairs.tsv"], "validation": ["my_validation.tsv"]}
        recipe["pretrain"] = {"layout": recipe["pretrain"]["layout"], **files, **QUICK_PAIRS}
    elif "pretrain" in recipe:
        kept = {key: value for key, value in recipe["pretrain"].items() if key in ("optimizer", "layout")}
        recipe["pretrain"] = kept | QUICK
    return recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a reader is assumed to have: some text and pairs of their own, and the recipes."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "my_folder").mkdir()
    for number in range(400):
        animal, other = ANIMALS[number % 8], ANIMALS[number // 8 % 8]
        place = PLACES[number // 5 % 8]
        text = (
            f"The {animal} number {number} lived near the {place}. Every morning it walked to the {place} to look for "
            f"food. One day it met a {other} who was sad. What is the matter, asked the {animal}. I have lost my way, "
            f"said the {other} at {number} past noon. So they went home together, and they were happy.\n"
        )
        (folder / "my_folder" / f"story_{number:03}.txt").write_text(text)
    pairs = [
        (f"the {a} sees the {b} in the {c}", f"{c}: {b} <- {a}")
        for a in ANIMALS
        for b in ANIMALS
        for c in PLACES
    ]
    for name, part in (("my_pairs", pairs[:400]), ("my_validation", pairs[400:420])):
        (folder / f"{name}.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in part))
    (folder / "sentences.txt").write_text("".join(f"{source}\n" for source, _ in pairs[-3:]))
    (folder / "answers.txt").write_text("".join(f"{target}\n" for _, target in pairs[-3:]))
    asked = [
        {"prompt": f"Where does the {a} live?", "completion": f"In the {p}."} for a in ANIMALS for p in PLACES
    ]
    preferred = [
        {"prompt": f"Where does the {a} live?", "chosen": f"In the {p}.", "rejected": f"{p}?"}
        for a in ANIMALS
        for p in PLACES
    ]
    (folder / "my_preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preferred))
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "recipes").mkdir()
    for path in (ROOT / "recipes").glob("*.yaml"):
        recipe = quick_recipe(yaml.safe_load(path.read_text(encoding="utf-8")))
        (folder / "recipes" / path.name).write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


def run(command: str | list[str], folder: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "110",
    }
    done = subprocess.run(
        command, shell=isinstance(command, str), cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"{command}\nexit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )


def remove_earlier(command: str, folder: Path) -> None:
    """Two pages may make the same run; each begins with none."""
    words = shlex.split(command)
    if "--out" in words[:-1] and "--resume" not in words:
        shutil.rmtree(folder / words[words.index("--out") + 1], ignore_errors=True)


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_command_runs(path: Path, folder: Path):
    for command in commands(path):
        command = quick(command)
        if command.split()[0] in NOT_RUN_HERE:
            continue
        remove_earlier(command, folder)
        run(command, folder)


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_python_block_runs(path: Path, folder: Path):
    for text in blocks(path, "python"):
        run([sys.executable, "-c", text], folder)


def test_readme_shows_the_main_job():
    shown = commands(ROOT / "README.md")
    for start in (
        "make demo",
        "glasshouse prepare",
        "glasshouse pretrain",
        "glasshouse generate",
        "glasshouse report",
    ):
        assert any(command.startswith(start) for command in shown), f"README.md does not show {start}"


def test_the_chinese_readme_shows_the_same_commands():
    assert commands(ROOT / "README.zh.md") == commands(ROOT / "README.md")


@pytest.mark.parametrize(
    "path", [*documents(), ROOT / "README.zh.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name
)
def test_links_to_files_lead_somewhere(path: Path):
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name} links to {target}, which is not there"
