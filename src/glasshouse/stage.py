"""One stage in one run folder: begun, begun again, or gone on with. Knows the life of a run, not what a stage does."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glasshouse.config import config_to_dict, read_recipe
from glasshouse.errors import InputError
from glasshouse.run import RECIPE_FILE, RUN_FILE, Run, create_run, open_run

RESUMABLE = ("pretrain", "finetune")


def run_stage(
    stage: str, function: Callable[[Any, Run], object], config: Any, folder: Path, resume: bool = False
) -> Run:
    """Run one stage in a folder, new or resumed; one that fails with nothing to resume leaves nothing behind.

    Of several processes started by torchrun the first makes the folder; the others wait for it.

    Args:
        stage: the verb.
        function: the stage itself; it marks the run finished.
        config: its config; `corpus`, where it has one, is the run it is made from.
        folder: the run folder: new, empty, or holding an unfinished run of the same stage.
        resume: go on with an unfinished run.

    Raises:
        InputError: the folder holds a finished run, another stage's, or other files; or what the stage itself refuses.
    """
    if _is_follower(stage):
        function(config, _wait_for_run(folder))
        return open_run(folder)
    settings = config_to_dict(config)
    if (folder / RUN_FILE).exists():
        if _may_continue(open_run(folder), stage, settings, resume):
            function(config, open_run(folder))
            return open_run(folder)
    elif resume:
        raise InputError("nothing to resume here", str(folder), "leave out --resume")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("there are other files here", str(folder), "choose a new folder for --out")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        run = create_run(folder, stage, settings, _parents(settings))
        function(config, run)
    except BaseException:
        if not (folder / "state").exists() and Run(folder).digest() is None:
            _remove_unfinished(folder, made)
        raise
    return run


def finish_stage(stage: str, function: Callable[[Any, Run], object], config: Any, folder: Path) -> None:
    """Do what is left of one stage of a recipe: all of it, the rest of it, or nothing.

    Args:
        stage: the verb; `evaluate` reads the run in the folder, the others make it.
        function: the stage itself.
        config: its config.
        folder: the run folder.

    Raises:
        InputError: the folder holds a run with other settings; or what the stage refuses.
        KeyboardInterrupt: the stage was stopped, and saved what it had.
    """
    exists = (folder / RUN_FILE).exists()
    if _is_follower("run"):
        return
    if stage == "evaluate":
        run = open_run(folder)
        if run.reports().get("evaluation", {}).get("digest") == run.digest():
            print(f"{stage}: already done, see {folder}")
        else:
            function(config, run)
        return
    if exists and open_run(folder).read().get("status") == "finished":
        fix = "choose another --out, or delete that run"
        _refuse_other_settings(folder, stage, config_to_dict(config), fix)
        print(f"{stage}: already finished, see {folder}")
        return
    run = run_stage(stage, function, config, folder, resume=exists and stage in RESUMABLE)
    if run.read().get("status") != "finished":
        raise KeyboardInterrupt


def recorded_settings(folder: Path, stage: str) -> dict[str, Any]:
    """The settings that the run in a folder was started with.

    Raises:
        InputError: there is no run, or it is another stage's.
    """
    stages = read_recipe(open_run(folder).path / RECIPE_FILE)
    if stage not in stages:
        raise InputError(
            f"a run of {', '.join(stages)} is there, not of {stage}", str(folder), "choose another --out"
        )
    return stages[stage]


def _is_follower(stage: str) -> bool:
    """Whether this is one of the further processes that torchrun started."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and stage not in RESUMABLE:
        raise InputError(f"{stage} runs in one process", "torchrun", "use torchrun for `pretrain` alone")
    return os.environ.get("RANK", "0") != "0"


def _wait_for_run(folder: Path, seconds: float = 60.0) -> Run:
    deadline = time.monotonic() + seconds
    while not (folder / RUN_FILE).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return open_run(folder)


def _parents(settings: dict[str, Any]) -> list[Path]:
    """The runs that a stage is made from: of its corpus or its model, also when the folder inside the run is given."""
    given = [Path(settings[name]) for name in ("corpus", "model") if settings.get(name)]
    return [path.parent if (path.parent / RUN_FILE).exists() else path for path in given]


def _may_continue(run: Run, stage: str, settings: dict[str, Any], resume: bool) -> bool:
    """True to go on with an existing run, False when it was cleared to be made again."""
    facts, where = run.read(), str(run.path)
    if facts.get("stage") != stage:
        raise InputError(f"a run of {facts.get('stage')!r} is there already", where, "choose another --out")
    if facts.get("status") == "finished":
        raise InputError("a finished run is there already", where, "choose another --out, or delete it first")
    if stage not in RESUMABLE:
        with run.lock():
            _remove_unfinished(run.path, [])
        return False
    if not resume:
        raise InputError("an unfinished run is there already", where, "add --resume, or choose another --out")
    _refuse_other_settings(run.path, stage, settings, "resume it with the settings it was started with")
    return True


def _refuse_other_settings(folder: Path, stage: str, settings: dict[str, Any], fix: str) -> None:
    recorded = recorded_settings(folder, stage)
    for name, value in settings.items():
        if name in recorded and recorded[name] != value:
            what = f"this run was started with {name} {recorded[name]!r}, not {value!r}"
            raise InputError(what, str(folder), fix)


def _remove_unfinished(folder: Path, made: list[Path]) -> None:
    """Take away what a stage wrote; folders that were there before it (not in `made`) stay."""
    for item in list(folder.iterdir()) if folder.is_dir() else []:
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink()
    for path in made:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
