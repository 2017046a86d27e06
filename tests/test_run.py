"""A run folder: made once, logged to, read back, locked, and refused when it is not one."""

import multiprocessing
from pathlib import Path

import pytest
import yaml

from glasshouse.errors import InputError
from glasshouse.files import atomic_folder
from glasshouse.run import Run, create_run, open_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(tmp_path / "run", "pretrain", {"size": "tiny", "corpus": "x"}, [])


def test_a_new_run_says_what_it_is(run: Run):
    facts = run.read()
    assert (facts["stage"], facts["status"], facts["parents"]) == ("pretrain", "running", [])
    assert facts["code_version"]
    recipe = yaml.safe_load((run.path / "recipe.yaml").read_text())
    assert recipe == {"pretrain": {"size": "tiny", "corpus": "x"}}
    assert open_run(run.path) == run


def test_a_run_is_made_once(run: Run):
    with pytest.raises(InputError, match="a run is there already"):
        create_run(run.path, "pretrain", {}, [])


def test_a_run_cannot_be_made_inside_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        create_run(tmp_path / "file" / "run", "pretrain", {}, [])


def test_no_run_at_a_path(tmp_path: Path):
    with pytest.raises(InputError, match="no run here"):
        open_run(tmp_path)


def test_parents_are_named_with_the_digest_of_what_they_hold(tmp_path: Path, run: Run):
    with atomic_folder(run.corpus_path) as folder:
        (folder / "x").write_text("x")
    child = create_run(tmp_path / "child", "pretrain", {}, [run.path])
    assert child.read()["parents"] == [{"path": str(run.path), "digest": run.digest()}]
    assert len(run.digest() or "") == 64


def test_metrics_survive_a_torn_last_line(run: Run):
    run.log({"step": 1, "loss": 2.5})
    run.log({"step": 2, "loss": float("nan")})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert run.metrics() == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]


def test_metrics_after_a_step_are_dropped_for_resuming(run: Run):
    for step in range(5):
        run.log({"step": step})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')
    run.keep_metrics(2)
    run.log({"step": 3})
    assert [record["step"] for record in run.metrics()] == [0, 1, 2, 3]


def test_reports_are_attached_by_name(run: Run):
    run.attach("evaluate", {"digest": "abc", "bits": 1.5})
    run.attach("evaluate", {"digest": "abc", "bits": 1.25})
    assert run.reports() == {"evaluate": {"digest": "abc", "bits": 1.25}}


def test_finishing_is_written_with_the_digest(run: Run):
    with atomic_folder(run.model_path) as folder:
        (folder / "weights").write_bytes(b"x")
    run.update(steps=3)
    run.finish(seconds=1.5)
    facts = run.read()
    assert (facts["status"], facts["steps"], facts["seconds"], facts["digest"]) == (
        "finished",
        3,
        1.5,
        run.digest(),
    )


def test_a_torn_run_file_is_refused_by_name(run: Run):
    (run.path / "run.json").write_text('{"stage": "pre')
    with pytest.raises(InputError, match=r"not valid JSON.*run\.json"):
        run.read()


def hold(path: Path, held, release) -> None:
    with Run(path).lock():
        held.set()
        release.wait(30)


def test_two_processes_cannot_hold_one_run(run: Run):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(run.path, held, release))
    other.start()
    assert held.wait(60)
    with pytest.raises(InputError, match=f"another process \\(process {other.pid}\\)"), run.lock():
        pass
    other.kill()
    other.join()
    with run.lock():
        assert "process" in (run.path / ".lock").read_text()
