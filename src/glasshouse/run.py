"""A run folder: the only hand-over between stages. It knows which files a run has, not what is in them.

recipe.yaml  run.json  metrics.jsonl  model/ or corpus/  state/  reports/*.json  README.md  report.html
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from glasshouse.errors import InputError
from glasshouse.files import MANIFEST, finite, read_json, sha256_file, write_atomic, write_error, write_json

RUN_FILE, METRICS_FILE, RECIPE_FILE, LOCK_FILE = "run.json", "metrics.jsonl", "recipe.yaml", ".lock"


@dataclass(frozen=True)
class Run:
    """One run folder.

    Args:
        path: the folder.
    """

    path: Path

    @property
    def model_path(self) -> Path:
        """The artifact, in Hugging Face layout."""
        return self.path / "model"

    @property
    def corpus_path(self) -> Path:
        """The prepared corpus, in a run of `prepare`."""
        return self.path / "corpus"

    @property
    def state_path(self) -> Path:
        """What resuming needs; safe to delete."""
        return self.path / "state"

    def read(self) -> dict[str, Any]:
        """The facts in run.json."""
        return read_json(self.path / RUN_FILE)

    def update(self, **facts: Any) -> None:
        """Add facts to run.json, in one step."""
        write_json(self.path / RUN_FILE, {**self.read(), **facts})

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; a line is written whole or, at a kill, cut at the next start."""
        line = json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with open(self.path / METRICS_FILE, "ab") as file:
                file.write(line.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise write_error(error, self.path / METRICS_FILE) from error

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without a torn last one."""
        path = self.path / METRICS_FILE
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def keep_metrics(self, last_step: int) -> None:
        """Drop the lines logged after `last_step`, which a resumed run is about to log again."""
        kept = [record for record in self.metrics() if record.get("step", 0) <= last_step]
        write_atomic(
            self.path / METRICS_FILE,
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept),
        )

    def attach(self, name: str, report: dict[str, Any]) -> None:
        """Write reports/NAME.json; the report should name the digest of what it measured."""
        folder = self.path / "reports"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{name}.json", report)

    def reports(self) -> dict[str, dict[str, Any]]:
        """Every attached report, by name."""
        return {path.stem: read_json(path) for path in sorted((self.path / "reports").glob("*.json"))}

    def finish(self, **facts: Any) -> None:
        """Mark the run finished: the last thing a stage writes."""
        write_json(
            self.path / RUN_FILE, {**self.read(), **facts, "digest": self.digest(), "status": "finished"}
        )

    def digest(self) -> str | None:
        """The digest of the model or corpus that the run holds, or None when it holds none yet."""
        for folder in (self.model_path, self.corpus_path):
            if (folder / MANIFEST).is_file():
                return sha256_file(folder / MANIFEST)
        return None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the kernel frees it however the process ends.

        Raises:
            InputError: another process holds it.
        """
        with open(self.path / LOCK_FILE, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise InputError(
                    f"another process ({file.read().strip() or 'unknown'}) is working in this run",
                    str(self.path),
                    "wait for it, stop it, or choose another --out",
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            yield


def create_run(path: Path, stage: str, recipe: dict[str, Any], parents: list[Path]) -> Run:
    """Make a run folder with its recipe and status "running".

    Args:
        path: the folder; it must not hold a run already.
        stage: the verb that makes it.
        recipe: the resolved config of the stage.
        parents: runs it is made from.

    Raises:
        InputError: there is a run already, or the folder cannot be made.
    """
    path = Path(path)
    if (path / RUN_FILE).exists():
        raise InputError("a run is there already", str(path), "add --resume, or choose another --out")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, path) from error
    write_atomic(path / RECIPE_FILE, yaml.safe_dump({stage: recipe}, sort_keys=False, allow_unicode=True))
    run = Run(path)
    write_json(
        path / RUN_FILE,
        {
            "stage": stage,
            "status": "running",
            "parents": [{"path": str(parent), "digest": Run(Path(parent)).digest()} for parent in parents],
            "code_version": version("glasshouse"),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )
    return run


def open_run(path: Path) -> Run:
    """Open an existing run folder.

    Raises:
        InputError: there is no run at that path.
    """
    path = Path(path)
    if not (path / RUN_FILE).is_file():
        raise InputError("no run here", str(path), "give a folder that prepare or pretrain made")
    return Run(path)
