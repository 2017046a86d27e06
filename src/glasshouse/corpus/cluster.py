"""The same cleaning on many processes or machines, by datatrove's executors: local, Slurm or Ray.

Three steps: screen each path into a part (many tasks), find what repeats what (one task), release each part (many
tasks). The steps are plain callables of (data, rank, world_size), which datatrove takes as pipeline steps; a task that
is done is skipped when the run is repeated. Documents and report are the same as `clean_documents` gives for the paths
in their order, whatever the number of tasks. The work folder must be seen by every machine.

Only the executors of datatrove are used; `deduplicate` and `quality` say why not its blocks. This
module is the one that needs datatrove, and knows nothing of how its jobs are scheduled.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from glasshouse.corpus.clean import mark_repeats, release_documents
from glasshouse.corpus.deduplicate import Shelf
from glasshouse.corpus.documents import EXAMPLES, Document, ReadCounts, ReadPolicy, read_documents
from glasshouse.corpus.quality import CleanRules, check_rules, list_rules
from glasshouse.corpus.screening import screen_documents
from glasshouse.corpus.waterfall import Tally, Waterfall
from glasshouse.errors import InputError
from glasshouse.files import read_json, write_json


@dataclass(frozen=True)
class ClusterConfig:
    """Where the tasks run.

    Args:
        executor: "local" (processes of this machine), "slurm" or "ray" (a cluster that is already there).
        tasks: tasks that the paths are dealt out to; more tasks than paths are of no use.
        workers: tasks at a time; -1 for all.
        hours: Slurm's and Ray's limit of one task.
        partition: Slurm's partition.
        cpus_per_task: processors of a task.
        memory_per_cpu: gigabytes.
        environment: command that prepares a Slurm task, for instance "source .venv/bin/activate".
    """

    executor: Literal["local", "slurm", "ray"] = "local"
    tasks: int = 1
    workers: int = -1
    hours: int = 24
    partition: str = ""
    cpus_per_task: int = 1
    memory_per_cpu: int = 4
    environment: str = ""


@dataclass(frozen=True)
class Cleaning:
    """One cleaning as every task has to know it.

    Args:
        paths: files, folders or globs; each is a part of its own, so give many. Their files must not share names.
        rules: which rules act.
        policy: how to read.
        work: a folder that all machines see.
        seed: of the choice of examples.
        language: of documents that do not state theirs; empty to identify it.
    """

    paths: tuple[str, ...]
    rules: CleanRules
    policy: ReadPolicy
    work: str
    seed: int = 0
    language: str = ""

    def part(self, number: int) -> Path:
        """The folder of one path."""
        return Path(self.work) / f"part-{number:05d}"

    def shelf(self) -> Shelf:
        """All parts."""
        return Shelf([self.part(number) for number in range(len(self.paths))])


def write_tallies(path: Path, tallies: Sequence[Tally]) -> None:
    """Write tallies, one per line; the file is complete as soon as it is there."""
    lines = "".join(json.dumps(tally.to_dict(), ensure_ascii=False) + "\n" for tally in tallies)
    temporary = path.with_suffix(".new")
    temporary.write_text(lines, encoding="utf-8")
    temporary.replace(path)


def read_tallies(path: Path) -> Iterator[Tally]:
    """The tallies that `write_tallies` wrote."""
    with path.open(encoding="utf-8") as file:
        yield from map(Tally.from_dict, map(json.loads, file))


@dataclass(frozen=True)
class ScreenStep:
    """Pipeline step: the first pass over every path whose number leaves `rank` when divided by `world_size`."""

    cleaning: Cleaning

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Write this task's parts."""
        for number in range(rank, len(self.cleaning.paths), world_size):
            part = self.cleaning.part(number)
            counts, language = ReadCounts(), self.cleaning.language
            documents = read_documents([self.cleaning.paths[number]], self.cleaning.policy, counts)
            stated = (replace(one, language=one.language or language) for one in documents)
            tallies = list(screen_documents(stated, self.cleaning.rules, part, self.cleaning.seed))
            write_json(part / "read.json", counts.as_report())
            write_tallies(part / "screened.jsonl", tallies)


@dataclass(frozen=True)
class RepeatStep:
    """Pipeline step: find what repeats what among all parts. One task."""

    cleaning: Cleaning

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Mark the repeats in every part."""
        mark_repeats(self.cleaning.shelf(), self.cleaning.rules)


@dataclass(frozen=True)
class ReleaseStep:
    """Pipeline step: the second pass over this task's parts."""

    cleaning: Cleaning

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the documents that stay to `cleaned.jsonl` of each part."""
        shelf = self.cleaning.shelf()
        for number in range(rank, len(self.cleaning.paths), world_size):
            part, tallies = self.cleaning.part(number), []
            with (part / "cleaned.jsonl").open("w", encoding="utf-8") as file:
                for documents, tally in release_documents(
                    shelf, number, self.cleaning.rules, self.cleaning.seed
                ):
                    tallies.append(tally)
                    for d in documents:
                        record = [d.id, d.text, d.source, d.licence, d.language, d.metadata]
                        file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
            write_tallies(part / "released.jsonl", tallies)


def build_executor(cleaning: Cleaning, cluster: ClusterConfig) -> Any:
    """The datatrove executor of the last step; running it runs the two before it first.

    Raises:
        InputError: datatrove is not installed, or Slurm is asked for without a partition.
    """
    if find_spec("datatrove") is None:
        raise InputError(
            "datatrove is not installed", "cluster", 'in the project folder, pip install ".[corpus]"'
        )
    executor: Any = None
    names = ("screen", "repeats", "release")
    for name, step in zip(names, (ScreenStep, RepeatStep, ReleaseStep), strict=True):
        tasks = 1 if name == "repeats" else max(1, min(cluster.tasks, len(cleaning.paths)))
        logs = str(Path(cleaning.work) / "logs" / name)
        executor = make_executor(cluster, [step(cleaning)], tasks, logs, executor)
    return executor


def make_executor(cluster: ClusterConfig, pipeline: list[Any], tasks: int, logs: str, before: Any) -> Any:
    """One executor of the kind asked for, to be run after `before`."""
    workers, memory = cluster.workers, cluster.memory_per_cpu
    if cluster.executor == "local":
        from datatrove.executor.local import LocalPipelineExecutor

        return LocalPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=logs, depends=before)
    if cluster.executor == "slurm":
        if not cluster.partition:
            raise InputError("Slurm needs a partition", "partition", "name one of those that `sinfo` lists")
        from datatrove.executor.slurm import SlurmPipelineExecutor

        return SlurmPipelineExecutor(
            pipeline,
            tasks=tasks,
            time=f"{cluster.hours}:00:00",
            partition=cluster.partition,
            cpus_per_task=cluster.cpus_per_task,
            mem_per_cpu_gb=memory,
            workers=workers,
            job_name=f"glasshouse-{Path(logs).name}",
            env_command=cluster.environment,
            logging_dir=logs,
            depends=before,
        )
    from datatrove.executor.ray import RayPipelineExecutor

    return RayPipelineExecutor(
        pipeline,
        tasks=tasks,
        workers=workers,
        depends=before,
        logging_dir=logs,
        cpus_per_task=cluster.cpus_per_task,
        mem_per_cpu_gb=memory,
        time=cluster.hours * 3600,
    )


def collect_documents(cleaning: Cleaning, waterfall: Waterfall) -> Iterator[Document]:
    """The cleaned documents of all parts, in order, and the whole report; after every task is done."""
    waterfall.expect(list_rules(cleaning.rules))
    parts = [cleaning.part(number) for number in range(len(cleaning.paths))]
    for name in ("screened.jsonl", "released.jsonl"):
        for part in parts:
            for tally in read_tallies(part / name):
                waterfall.add(tally)
    for part in parts:
        with (part / "cleaned.jsonl").open(encoding="utf-8") as file:
            for line in file:
                yield Document(*json.loads(line))


def collect_counts(cleaning: Cleaning) -> dict[str, Any]:
    """What was read, over all parts, as `ReadCounts.as_report` would give it; after every task is done."""
    total = ReadCounts().as_report()
    for number in range(len(cleaning.paths)):
        for name, value in read_json(cleaning.part(number) / "read.json").items():
            if name == "examples":
                for reason, places in value.items():
                    total[name][reason] = (total[name].get(reason, []) + places)[:EXAMPLES]
            elif isinstance(value, dict):
                total[name] = dict(Counter(total[name]) + Counter(value))
            else:
                total[name] += value
    return {
        name: dict(sorted(value.items())) if isinstance(value, dict) else value
        for name, value in total.items()
    }


def clean_on_cluster(
    cleaning: Cleaning, cluster: ClusterConfig, waterfall: Waterfall, pause: float = 10.0
) -> Iterator[Document]:
    """Clean paths by datatrove's executors and yield what is left, as `clean_documents` does.

    On Slurm the jobs are submitted, and this waits until they have finished; stopped and called again with the same
    work folder, it goes on where it was.

    Args:
        cleaning: what to do.
        cluster: where.
        waterfall: filled before the first document comes out.
        pause: seconds between two looks at whether a Slurm job is done.

    Raises:
        InputError: see `build_executor`, `check_rules` and `read_documents`.
    """
    check_rules(cleaning.rules)
    cleaning = replace(cleaning, work=str(Path(cleaning.work).resolve()), seed=waterfall.seed)
    executor = build_executor(cleaning, cluster)
    if cluster.executor == "ray" and find_spec("ray") is None:
        raise InputError(
            "ray is not installed", "executor", "pip install ray, or use executor local or slurm"
        )
    executor.run()
    while executor.get_incomplete_ranks(skip_completed=True):
        time.sleep(pause)
    yield from collect_documents(cleaning, waterfall)
