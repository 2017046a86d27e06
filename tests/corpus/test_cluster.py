from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove")

from glasshouse.corpus.clean import clean_documents
from glasshouse.corpus.cluster import Cleaning, ClusterConfig, build_executor, clean_on_cluster
from glasshouse.corpus.documents import ReadCounts, ReadPolicy, read_documents
from glasshouse.corpus.quality import CleanRules
from glasshouse.corpus.waterfall import Waterfall
from glasshouse.errors import InputError

POLICY = ReadPolicy(text_unit="line")


@pytest.fixture
def paths(tmp_path: Path) -> tuple[str, ...]:
    """Three files of lines; the third repeats some of the first, exactly and nearly."""
    sentence = "On day {0} the {1} men of village {2} went out and brought back {0} fish for all."
    lines = [sentence.format(n, n * 37 % 101, n * 7 % 13) * 3 for n in range(90)]
    shares = [
        lines[:40],
        lines[40:],
        lines[5:9] + [line + " The end." for line in lines[20:25]] + ["--- ---", "fresh"],
    ]
    files = [tmp_path / f"share{number}.txt" for number in range(3)]
    for file, share in zip(files, shares, strict=True):
        file.write_text("\n".join(share), encoding="utf-8")
    return tuple(map(str, files))


@pytest.mark.parametrize(("tasks", "workers"), [(1, 1), (2, 2)])
def test_local_executor_gives_the_same(tasks: int, workers: int, paths: tuple[str, ...], tmp_path: Path):
    rules, plain, spread = CleanRules(), Waterfall(3), Waterfall(3)
    documents = read_documents(paths, POLICY, ReadCounts())
    expected = list(clean_documents(documents, rules, plain, tmp_path / "plain"))
    cleaning = Cleaning(paths, rules, POLICY, str(tmp_path / "work"))
    cluster = ClusterConfig(tasks=tasks, workers=workers)
    assert list(clean_on_cluster(cleaning, cluster, spread)) == expected
    assert spread.to_dict() == plain.to_dict()
    assert plain.to_dict()["documents_out"] < plain.to_dict()["documents_in"]
    again = Waterfall(3)  # every task is done: nothing is run, the same comes out
    assert list(clean_on_cluster(cleaning, cluster, again)) == expected


def chain(executor: Any) -> list[Any]:
    """The executors of the three steps, first to last."""
    return [executor.depends.depends, executor.depends, executor]


def test_slurm_executor(paths: tuple[str, ...], tmp_path: Path):
    cleaning = Cleaning(paths, CleanRules(), POLICY, str(tmp_path))
    cluster = ClusterConfig("slurm", 3, 2, 5, "cpu", 4, 8, "source env/bin/activate")
    executors = chain(build_executor(cleaning, cluster))
    assert [executor.tasks for executor in executors] == [3, 1, 3]
    for executor, name in zip(executors, ("screen", "repeats", "release"), strict=True):
        script = executor.get_launch_file_contents(executor.get_sbatch_args(), "python run.py")
        for line in (
            "--partition=cpu",
            "--cpus-per-task=4",
            "--mem-per-cpu=8G",
            "--time=5:00:00",
            f"glasshouse-{name}",
        ):
            assert line in script, script
        assert "source env/bin/activate" in script
        assert executor.workers == 2
    with pytest.raises(InputError, match="Slurm needs a partition"):
        build_executor(cleaning, ClusterConfig("slurm"))


def test_ray_executor(paths: tuple[str, ...], tmp_path: Path):
    cleaning = Cleaning(paths, CleanRules(), POLICY, str(tmp_path))
    executors = chain(build_executor(cleaning, ClusterConfig("ray", 2, 2, 5, "", 4, 8)))
    assert [type(executor).__name__ for executor in executors] == ["RayPipelineExecutor"] * 3
    assert [executor.tasks for executor in executors] == [2, 1, 2]
    assert {(e.workers, e.cpus_per_task, e.mem_per_cpu_gb, e.time) for e in executors} == {(2, 4, 8, 18000)}


def test_ray_that_is_not_there(paths: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "glasshouse.corpus.cluster.find_spec", lambda name: None if name == "ray" else object()
    )
    cleaning = Cleaning(paths, CleanRules(), POLICY, str(tmp_path))
    with pytest.raises(InputError, match="ray is not installed"):
        list(clean_on_cluster(cleaning, ClusterConfig("ray"), Waterfall()))


def test_more_tasks_than_paths(paths: tuple[str, ...], tmp_path: Path):
    cleaning = Cleaning(paths, CleanRules(), POLICY, str(tmp_path))
    assert build_executor(cleaning, ClusterConfig(tasks=50)).tasks == 3
