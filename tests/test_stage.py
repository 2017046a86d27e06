"""One stage in one run folder: what is refused, what is done again, and what is left behind by a failure."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from glasshouse.errors import InputError
from glasshouse.files import atomic_folder
from glasshouse.run import Run, create_run, open_run
from glasshouse.stage import finish_stage, recorded_settings, run_stage


@dataclass(frozen=True)
class Settings:
    """Settings of a stage that exists for these tests."""

    size: str = "tiny"
    corpus: Path | None = None


def succeed(config: Settings, run: Run) -> None:
    with atomic_folder(run.model_path) as folder:
        (folder / "weights").write_text(config.size)
    run.finish()


def refuse(config: Settings, run: Run) -> None:
    run.log({"step": 0})
    raise InputError("too small", "here", "give more")


def stop_halfway(config: Settings, run: Run) -> None:
    run.state_path.mkdir(exist_ok=True)
    (run.state_path / "state").write_text("half")
    raise InputError("the disk is full")


def test_a_stage_makes_its_run(tmp_path: Path):
    run = run_stage("pretrain", succeed, Settings("nano"), tmp_path / "a" / "b")
    assert run.read()["status"] == "finished"
    assert recorded_settings(run.path, "pretrain") == {"size": "nano", "corpus": None}


def test_a_refusal_leaves_nothing_behind(tmp_path: Path):
    with pytest.raises(InputError, match="too small"):
        run_stage("pretrain", refuse, Settings(), tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_keeps_the_folder_that_was_there(tmp_path: Path):
    with pytest.raises(InputError, match="too small"):
        run_stage("pretrain", refuse, Settings(), tmp_path)
    assert tmp_path.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_what_can_be_resumed_is_kept(tmp_path: Path):
    with pytest.raises(InputError, match="disk is full"):
        run_stage("pretrain", stop_halfway, Settings(), tmp_path / "run")
    assert (tmp_path / "run" / "state" / "state").read_text() == "half"
    with pytest.raises(InputError, match="add --resume"):
        run_stage("pretrain", succeed, Settings(), tmp_path / "run")
    with pytest.raises(InputError, match="started with size 'tiny', not 'nano'"):
        run_stage("pretrain", succeed, Settings("nano"), tmp_path / "run", resume=True)
    assert (
        run_stage("pretrain", succeed, Settings(), tmp_path / "run", resume=True).read()["status"]
        == "finished"
    )


def test_other_folders_are_refused(tmp_path: Path):
    (tmp_path / "photo.jpg").write_text("x")
    with pytest.raises(InputError, match="other files"):
        run_stage("pretrain", succeed, Settings(), tmp_path)
    with pytest.raises(InputError, match="other files"):
        run_stage("pretrain", succeed, Settings(), tmp_path / "photo.jpg")
    assert (tmp_path / "photo.jpg").read_text() == "x"
    with pytest.raises(InputError, match="nothing to resume"):
        run_stage("pretrain", succeed, Settings(), tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_finished_and_other_stages_are_refused(tmp_path: Path):
    run_stage("pretrain", succeed, Settings(), tmp_path / "run")
    for resume in (False, True):
        with pytest.raises(InputError, match="a finished run"):
            run_stage("pretrain", succeed, Settings(), tmp_path / "run", resume=resume)
    with pytest.raises(InputError, match="a run of 'pretrain'"):
        run_stage("prepare", succeed, Settings(), tmp_path / "run")
    with pytest.raises(InputError, match="not of prepare"):
        recorded_settings(tmp_path / "run", "prepare")


def test_an_unfinished_prepare_is_done_again(tmp_path: Path):
    run = create_run(tmp_path / "run", "prepare", {"size": "tiny"}, [])
    (run.path / "half").write_text("x")
    assert run_stage("prepare", succeed, Settings("nano"), run.path).read()["status"] == "finished"
    assert not (run.path / "half").exists()


def test_an_unfinished_prepare_that_another_process_works_in_is_left_alone(tmp_path: Path):
    run = create_run(tmp_path / "run", "prepare", {"size": "tiny"}, [])
    with run.lock(), pytest.raises(InputError, match="another process"):
        run_stage("prepare", succeed, Settings(), run.path)
    assert (run.path / "run.json").exists()


def test_the_parent_is_the_run_of_the_corpus(tmp_path: Path):
    parent = run_stage("prepare", succeed, Settings(), tmp_path / "corpus_run")
    for corpus in (parent.path, parent.path / "corpus"):
        child = run_stage("pretrain", succeed, Settings(corpus=corpus), tmp_path / f"child_of_{corpus.name}")
        assert child.read()["parents"] == [{"path": str(parent.path), "digest": parent.digest()}]


def test_a_recipe_skips_what_is_finished_and_resumes_what_is_not(tmp_path: Path, capsys):
    calls: list[str] = []

    def count(config: Settings, run: Run) -> None:
        calls.append(config.size)
        succeed(config, run)

    with pytest.raises(InputError, match="disk is full"):
        finish_stage("pretrain", stop_halfway, Settings(), tmp_path / "run")
    finish_stage("pretrain", count, Settings(), tmp_path / "run")
    finish_stage("pretrain", count, Settings(), tmp_path / "run")
    assert calls == ["tiny"]
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(InputError, match="started with size 'tiny', not 'nano'"):
        finish_stage("pretrain", count, Settings("nano"), tmp_path / "run")


def test_a_recipe_stops_where_a_stage_was_stopped(tmp_path: Path):
    def stop(config: Settings, run: Run) -> None:
        run.update(status="stopped")

    with pytest.raises(KeyboardInterrupt):
        finish_stage("pretrain", stop, Settings(), tmp_path / "run")


def test_an_evaluation_is_done_once_for_each_weights(tmp_path: Path):
    run = run_stage("pretrain", succeed, Settings(), tmp_path / "run")
    calls: list[str] = []

    def measure(config: Settings, run: Run) -> None:
        calls.append("measured")
        run.attach("evaluation", {"digest": run.digest()})

    finish_stage("evaluate", measure, Settings(), run.path)
    finish_stage("evaluate", measure, Settings(), run.path)
    assert len(calls) == 1
    with atomic_folder(run.model_path) as folder:
        (folder / "weights").write_text("others")
    finish_stage("evaluate", measure, Settings(), open_run(run.path).path)
    assert len(calls) == 2


def test_of_several_processes_the_first_makes_the_run_and_the_others_join(tmp_path: Path, monkeypatch):
    joined: list[Path] = []

    def join(config: Settings, run: Run) -> None:
        joined.append(run.path)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    run_stage("pretrain", join, Settings(), tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    run_stage("pretrain", join, Settings(), tmp_path / "run")
    assert joined == [tmp_path / "run"] * 2
    with pytest.raises(InputError, match="prepare runs in one process"):
        run_stage("prepare", join, Settings(), tmp_path / "other")
    with pytest.raises(InputError, match="run runs in one process"):
        finish_stage("pretrain", join, Settings(), tmp_path / "other")
    assert not (tmp_path / "other").exists()
