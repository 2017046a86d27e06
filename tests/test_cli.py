"""The command line: what it lists, what it loads, and how it answers mistakes: one line, exit code 2, nothing left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import glasshouse.cli as cli
from glasshouse import files
from glasshouse.errors import InputError

HEAVY = ("torch", "numpy", "jsonargparse", "yaml", "rich", "tokenizers", "datatrove", "matplotlib")


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of plain stories, enough for a model of the smallest size."""
    folder = tmp_path_factory.mktemp("text")
    names, things = (
        ["Ann", "Ben", "Cho", "Dai", "Eve"],
        ["boat", "kite", "drum", "lamp", "cake", "shoe", "bell"],
    )
    for number in range(300):
        name, thing, other = names[number % 5], things[number % 7], things[number // 7 % 7]
        (folder / f"{number}.txt").write_text(
            f"{name} had a {thing} that was older than {number} years. Every evening {name} took the {thing} to the "
            f"market and asked for a {other}. Nobody wanted to give a {other} for it, so {name} left again. On day "
            f"{number} a child smiled and said that the {thing} was the finest in the town, and they became friends.\n"
        )
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A prepared corpus."""
    out = tmp_path_factory.mktemp("prepared") / "corpus"
    assert (
        cli.main(["prepare", "--documents", str(text_folder), "--vocab_size", "400", "--out", str(out)]) == 0
    )
    return out


def python(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, **options
    )


def refused(capsys, *words: object) -> str:
    """Run a command that must be refused; returns its one line."""
    assert cli.main([str(word) for word in words]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert [line.startswith("glasshouse: ") for line in shown.splitlines()].count(True) == 1, shown
    return shown.splitlines()[-1]


def test_help_lists_the_verbs_and_loads_nothing_heavy():
    done = python(
        f"import sys, glasshouse.cli as c; c.main(['--help']); print([n for n in {HEAVY} if n in sys.modules])"
    )
    assert done.stdout.splitlines()[-1] == "[]"
    for verb in cli.VERBS:
        assert f"\n  {verb}" in done.stdout


def test_settings_are_listed_without_pytorch_where_the_verb_needs_none():
    code = "import sys, glasshouse.cli as c\ntry: c.main(['report', '--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    assert python(code).stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"usage: glasshouse {verb}" in capsys.readouterr().out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("glasshouse 0.")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("pretrian", "did you mean pretrain?"),
        ("prepare --document x --out y", "did you mean --documents?"),
        ("prepare my_folder --out y", "write --documents my_folder"),
        ("prepare --documents x", "--out is missing"),
        ("prepare --documents x --out", "--out needs a value"),
        ("pretrain --corpus x --sise tiny --out y", "did you mean --size?"),
        ("pretrain --corpus x --steps many --out y", "(--steps)"),
        ("pretrain --config recipes/none.yaml --out y", "no such file"),
        ("pretrain --resume --out y", "no run here"),
        ("generate", "MODEL is missing"),
        ("generate none x", "none"),
        ("generate none x y", "unexpected 'y'"),
        ("generate none x --temprature 1", "did you mean --temperature?"),
        ("report", "RUN is missing"),
        ("report none", "no run here"),
        ("report none --verbose", "unexpected '--verbose'"),
        ("evaluate none", "no run here"),
        ("compare none", "RUN is missing"),
        ("run none.yaml", "no such file"),
        ("plan none.yaml", "no such file"),
        ("demo --outt x", "did you mean --out?"),
    ],
)
def test_mistakes_are_answered_in_one_line(words: str, part: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, *words.split())
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path):
    with pytest.raises(InputError):
        cli.main(["report", str(tmp_path), "--debug"])


def test_a_bug_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "report", ("", lambda words: 1 // 0))
    assert cli.main(["report"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "--debug"])


def test_interrupt_and_closed_pipe(monkeypatch, capsys):
    def stop(words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "report", ("", stop))
    assert cli.main(["report"]) == 130
    done = subprocess.run(
        f"'{sys.executable}' -m glasshouse --help | true",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr


def test_a_recipe_with_a_mistake_anywhere_runs_nothing(tmp_path: Path, text_folder: Path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"name: r\nprepare:\n  documents: ['{text_folder}']\npretrain:\n  sise: nano\n")
    assert "r.yaml: pretrain.sise" in refused(capsys, "run", recipe, "--out", tmp_path / "out")
    recipe.write_text("name: r\nevaluate: {}\n")
    assert "nothing to evaluate" in refused(capsys, "run", recipe, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_and_empty_folders(tmp_path: Path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("none", "empty"):
        assert folder in refused(
            capsys, "prepare", "--documents", tmp_path / folder, "--out", tmp_path / "x" / "y"
        )
        assert folder in refused(
            capsys, "pretrain", "--corpus", tmp_path / folder, "--out", tmp_path / "x" / "y"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def test_a_vocabulary_larger_than_the_text_supports(tmp_path: Path, text_folder: Path, capsys):
    line = refused(
        capsys, "prepare", "--documents", text_folder, "--vocab_size", 50000, "--out", tmp_path / "out"
    )
    assert "vocab" in line
    assert not (tmp_path / "out").exists()


def test_no_free_disk(tmp_path: Path, corpus: Path, capsys, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    words = ["pretrain", "--corpus", corpus, "--size", "nano", "--steps", 2, "--threads", 1]
    assert "not enough disk" in refused(capsys, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corpus_too_small_for_one_batch(tmp_path: Path, corpus: Path, capsys):
    words = ["pretrain", "--corpus", corpus, "--size", "nano", "--out", tmp_path / "out"]
    assert "too small" in refused(capsys, *words, "--context", 50000, "--batch_tokens", 50000)
    assert not (tmp_path / "out").exists()


def test_no_gpu_when_one_is_asked_for(tmp_path: Path, corpus: Path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["pretrain", "--corpus", corpus, "--size", "nano", "--device", "cuda", "--out", tmp_path / "out"]
    assert "no cuda device" in refused(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_a_model_folder_of_an_unknown_family(tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]})
    )
    save_file({"weight": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert "mamba" in refused(capsys, "generate", tmp_path, "Hello").lower()


def test_a_run_is_not_made_twice(tmp_path: Path, corpus: Path, text_folder: Path, capsys):
    before = (corpus / "run.json").read_bytes()
    line = refused(capsys, "prepare", "--documents", text_folder, "--vocab_size", 400, "--out", corpus)
    assert "a finished run is there already" in line
    assert (corpus / "run.json").read_bytes() == before
    refused(capsys, "pretrain", "--corpus", corpus, "--out", corpus)


def test_the_main_job(tmp_path: Path, corpus: Path, capsys):
    """pretrain, generate, evaluate, compare, report on a model of the smallest size."""
    run = tmp_path / "run"
    small = ["--size", "nano", "--steps", "12", "--validations", "2", "--threads", "1"]
    assert cli.main(["pretrain", "--corpus", str(corpus), *small, "--out", str(run)]) == 0
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    capsys.readouterr()
    words = ["generate", str(run), "Ann had", "--max_new_tokens", "8", "--seed", "1"]
    texts = []
    for _ in range(2):
        assert cli.main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("Ann had")
    assert cli.main(["evaluate", str(run)]) == 0
    assert cli.main(["compare", str(run), str(run)]) == 0
    assert "no difference shown" in capsys.readouterr().out
    assert cli.main(["report", str(run)]) == 0
    assert "\n# " in (run / "README.md").read_text()
    assert "</html>" in (run / "report.html").read_text()


def test_a_recipe_from_text_to_card_and_again(tmp_path: Path, text_folder: Path, capsys):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        f"name: small\nprepare: {{documents: ['{text_folder}'], vocab_size: 400}}\n"
        "pretrain: {size: nano, steps: 12, validations: 2, threads: 1}\nevaluate: {}\n"
    )
    assert cli.main(["plan", str(recipe)]) == 0
    out = tmp_path / "runs"
    assert cli.main(["run", str(recipe), "--out", str(out)]) == 0
    weights = (out / "pretrain" / "model" / "model.safetensors").read_bytes()
    assert (out / "pretrain" / "README.md").exists()
    assert (out / "pretrain" / "reports" / "evaluation.json").exists()
    capsys.readouterr()
    assert cli.main(["run", str(recipe), "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("already") == 3
    assert (out / "pretrain" / "model" / "model.safetensors").read_bytes() == weights
    recipe.write_text(recipe.read_text().replace("steps: 12", "steps: 13"))
    assert "started with steps 12, not 13" in refused(capsys, "run", recipe, "--out", out)


@pytest.mark.slow
def test_stopping_and_going_on_gives_the_same_weights(tmp_path: Path, corpus: Path):
    def command(out: str, *more: str) -> list[str]:
        words = ["pretrain", "--corpus", str(corpus), "--size", "nano", "--steps", "400", "--threads", "1"]
        return [
            sys.executable,
            "-m",
            "glasshouse",
            *words,
            "--compile",
            "off",
            "--out",
            str(tmp_path / out),
            *more,
        ]

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(
        command("stopped"), stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "100"}
    )
    while not (tmp_path / "stopped" / "metrics.jsonl").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert "--resume" in process.communicate(timeout=120)[0]
    assert process.returncode == 0
    subprocess.run(command("stopped", "--resume"), check=True, capture_output=True, timeout=300)
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert weights[0] == weights[1]
