"""The stage on a small corpus: it learns, resumes exactly, stops cleanly, and refuses what it cannot do."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glasshouse.artifact import open_artifact
from glasshouse.errors import InputError
from glasshouse.files import write_json
from glasshouse.run import Run, create_run, open_run
from glasshouse.training import pretrain as stage
from glasshouse.training.checkpoint import load_state
from glasshouse.training.pretrain import PretrainConfig, pretrain

STEPS = 40


def quick(corpus: Path, **settings: object) -> PretrainConfig:
    """A run of a few seconds on one thread."""
    config = PretrainConfig(
        corpus, size="nano", steps=STEPS, batch_tokens=512, threads=1, validations=4, device="cpu"
    )
    return replace(config, **settings)  # type: ignore[arg-type]


def start(folder: Path, config: PretrainConfig) -> Run:
    return create_run(folder, "pretrain", {**asdict(config), "corpus": str(config.corpus)}, [config.corpus])


def weights(run: Run) -> dict[str, torch.Tensor]:
    tensors, facts, _ = load_state(run.state_path)
    assert facts["step"] == STEPS
    return {name: tensor for name, tensor in tensors.items() if name.startswith("master.")}


def assert_same_weights(one: Run, other: Run) -> None:
    expected = weights(other)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, expected[name]), name
    best = [load_file(run.model_path / "model.safetensors") for run in (one, other)]
    assert all(torch.equal(tensor, best[1][name]) for name, tensor in best[0].items())


@pytest.fixture(scope="module")
def finished(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run."""
    config = quick(corpus_folder)
    run = start(tmp_path_factory.mktemp("runs") / "whole", config)
    pretrain(config, run)
    return run


def test_it_learns_and_records_what_it_did(finished: Run) -> None:
    facts, metrics = finished.read(), finished.metrics()
    losses = [record["loss"] for record in metrics if "loss" in record]
    assert len(losses) == STEPS
    assert losses[-1] < 0.6 * losses[0]
    validations = [record["validation_loss"] for record in metrics if "validation_loss" in record]
    assert len(validations) == 4
    assert facts["best"]["step"] in (10, 20, 30, 40)
    assert facts["status"] == "finished"
    assert facts["digest"] == finished.digest()
    assert facts["tokens"] == STEPS * 512
    assert facts["energy"] > 0
    assert facts["flops"] > 0


def test_the_model_it_leaves_can_be_opened_alone(finished: Run, tmp_path: Path) -> None:
    artifact = open_artifact(finished.path)
    assert artifact.verified
    assert artifact.model.config.vocab_size == 320
    tokens = torch.tensor([artifact.tokenizer.encode("The cat sees the dog.")])
    assert torch.isfinite(artifact.model.logits(artifact.model(tokens))).all()


def test_the_memory_it_took_is_the_memory_predicted(corpus_folder: Path, tmp_path: Path) -> None:
    """In a process of its own: memory that earlier tests freed and the process kept would be used again, uncounted."""
    process = launch(tmp_path / "run", quick(corpus_folder), {})
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    facts = open_run(tmp_path / "run").read()
    assert facts["predicted_memory"] == pytest.approx(facts["memory"], rel=0.2)


def test_the_peak_of_memory_is_counted_anew() -> None:
    program = (
        "import mmap; from glasshouse.device import open_device; from glasshouse import device as plan;"
        "device = open_device('cpu'); before = plan.peak_memory(device);"
        "block = mmap.mmap(-1, 2**28); block.write(bytes(2**28)); block.close(); high = plan.peak_memory(device);"
        "plan.forget_peak_memory(device); print(high - before, plan.peak_memory(device) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    grown, left = map(int, done.stdout.split())
    assert grown > 2**27
    assert left < 2**26


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    corpus_folder: Path, finished: Run, tmp_path: Path
) -> None:
    for seed in (0, 1):
        config = quick(corpus_folder, seed=seed)
        run = start(tmp_path / str(seed), config)
        pretrain(config, run)
        if seed == 0:
            assert_same_weights(run, finished)
        else:
            name = "master.embedding.weight"
            assert not torch.equal(weights(run)[name], weights(finished)[name])


def launch(folder: Path, config: PretrainConfig, shape: dict[str, object]) -> subprocess.Popen[str]:
    """Train in another process, saving after every step, with the shape of the uninterrupted run."""
    if not (folder / "run.json").exists():
        run = start(folder, config)
        run.update(**shape)
    program = (
        "import sys; from pathlib import Path; from glasshouse.run import open_run;"
        "from glasshouse.training.pretrain import PretrainConfig, pretrain; import json;"
        "settings = json.loads(sys.argv[2]); settings['corpus'] = Path(settings['corpus']);"
        "pretrain(PretrainConfig(**settings), open_run(Path(sys.argv[1])))"
    )
    settings = json.dumps({**asdict(config), "corpus": str(config.corpus)})
    return subprocess.Popen([sys.executable, "-c", program, str(folder), settings], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def settled(run: Run) -> dict[str, object]:
    return {
        name: value
        for name, value in run.read().items()
        if name in ("shape", "compiled", "predicted", "corpus_digest", "baseline_memory")
    }


def wait_for_step(folder: Path, process: subprocess.Popen[str], steps: int) -> None:
    """Return when so many steps are logged, or the process has ended."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b'"gradient_norm"') >= steps:
            return
        time.sleep(0.005)


def killed_again_and_again(folder: Path, config: PretrainConfig, shape: dict[str, object], kills: int) -> int:
    """Kill at random moments until the run is through; returns how many kills hit."""
    draw, hits = random.Random(), 0
    while True:
        process = launch(folder, config, shape)
        if hits < kills:
            done = (
                (folder / "metrics.jsonl").read_bytes().count(b'"gradient_norm"')
                if (folder / "metrics.jsonl").exists()
                else 0
            )
            wait_for_step(folder, process, done + draw.randint(0, max(1, STEPS // kills - 2)))
            time.sleep(draw.random() * 0.05)
            process.kill()
            hits += 1
        _, errors = process.communicate()
        if process.returncode == 0:
            return hits
        assert process.returncode == -signal.SIGKILL, errors


def test_killed_at_random_points_it_ends_with_the_same_weights(
    corpus_folder: Path, finished: Run, tmp_path: Path
) -> None:
    config = quick(corpus_folder, save_minutes=0.0)
    killed_again_and_again(tmp_path / "killed", config, settled(finished), 2)
    assert_same_weights(open_run(tmp_path / "killed"), finished)
    steps = [record["step"] for record in open_run(tmp_path / "killed").metrics() if "loss" in record]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_weights(
    corpus_folder: Path, finished: Run, tmp_path: Path
) -> None:
    config = quick(corpus_folder, save_minutes=0.0)
    assert killed_again_and_again(tmp_path / "killed", config, settled(finished), 10) == 10
    assert_same_weights(open_run(tmp_path / "killed"), finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_signal_saves_and_ends_with_code_0(
    corpus_folder: Path, finished: Run, tmp_path: Path, number: int
) -> None:
    config = quick(corpus_folder, validations=STEPS)  # so that signals arrive during validation too
    shape = settled(finished)
    process = launch(tmp_path / "run", config, shape)
    wait_for_step(tmp_path / "run", process, 5)
    os.kill(process.pid, number)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "go on with --resume" in output
    run = open_run(tmp_path / "run")
    assert run.read()["status"] == "stopped"
    assert 5 <= run.read()["step"] < STEPS
    pretrain(config, run)
    assert run.read()["status"] == "finished"
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, weights(finished)[name]), name


def test_a_stop_during_validation_is_heeded(
    corpus_folder: Path, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick(corpus_folder)
    run = start(tmp_path / "run", config)
    validate = stage.validate

    def signalled(*arguments: object) -> float | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "validate", signalled)
    pretrain(config, run)
    assert run.read()["status"] == "stopped"
    assert run.read()["step"] == 10
    assert load_state(run.state_path)[1]["step"] == 10
    monkeypatch.setattr(stage, "validate", validate)
    pretrain(config, run)
    assert_same_weights(run, finished)
    found, expected = (
        [r["step"] for r in some.metrics() if "validation_loss" in r] for some in (run, finished)
    )
    assert found == expected  # the validation that was cut short is made up for


def test_a_diverging_run_stops_by_name_and_keeps_its_last_good_state(
    corpus_folder: Path, tmp_path: Path
) -> None:
    config = quick(
        corpus_folder, learning_rate=1e30, optimizer="adamw", warmup=0.5, save_minutes=0.0, clip=0.0
    )
    run = start(tmp_path / "run", config)
    with pytest.raises(InputError, match=r"5 steps in a row without a finite loss"):
        pretrain(config, run)
    tensors, _, _ = load_state(run.state_path)
    assert all(torch.isfinite(tensor).all() for name, tensor in tensors.items() if name.startswith("master."))


def test_early_stopping_stops_after_validations_that_are_no_better(
    corpus_folder: Path, tmp_path: Path
) -> None:
    config = quick(
        corpus_folder, steps=200, validations=40, early_stop=2, matrix_learning_rate=0.5, learning_rate=0.3
    )
    run = start(tmp_path / "run", config)
    pretrain(config, run)
    facts = run.read()
    assert facts["status"] == "finished"
    assert facts["steps"] < 200
    assert facts["steps"] - facts["best"]["step"] == 2 * 5


def test_two_processes_cannot_work_in_one_run(corpus_folder: Path, tmp_path: Path) -> None:
    config = quick(corpus_folder)
    run = start(tmp_path / "run", config)
    with run.lock(), pytest.raises(InputError, match="another process"):
        pretrain(config, run)


def test_another_corpus_is_refused_when_resuming(corpus_folder: Path, tmp_path: Path) -> None:
    config = quick(corpus_folder)
    run = start(tmp_path / "run", config)
    run.update(shape={}, corpus_digest="of another corpus")
    with pytest.raises(InputError, match="not the one this run was started on"):
        pretrain(config, run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "huge"}, "unknown size 'huge'"),
        ({"device": "cuda"}, "no cuda device"),
        ({"steps": 0}, "steps must be above 0"),
        ({"context": 100_000, "batch_tokens": 200_000}, "too small for one row of 100000"),
        ({"minutes": 1.0}, "three ways to say one thing"),
        ({"width": 60, "heads": 7}, "does not split into 7 heads"),
        ({"optimizer": "sgd"}, "unknown optimizer 'sgd'"),
        ({"layout": "bert"}, "unknown layout 'bert'"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_in_one_line(
    corpus_folder: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = quick(corpus_folder, **settings)
    run = start(tmp_path / "run", config)
    with pytest.raises(InputError, match=message) as caught:
        pretrain(config, run)
    assert "\n" not in str(caught.value)
    assert not run.state_path.exists()
    assert not run.model_path.exists()


def test_two_processes_train_like_one(corpus_folder: Path, finished: Run, tmp_path: Path) -> None:
    runs = []
    for processes in (1, 2):
        config = quick(
            corpus_folder, dtype="float32", optimizer="adamw", steps=6, validations=2, batch_tokens=576
        )  # 9 rows: uneven shares
        folder = tmp_path / str(processes)
        run = start(folder, config)
        settings = tmp_path / f"{processes}.json"
        write_json(settings, {**asdict(config), "corpus": str(config.corpus)})
        program = tmp_path / "worker.py"
        program.write_text(
            "import sys, json; from pathlib import Path; from glasshouse.run import open_run\n"
            "from glasshouse.training.pretrain import PretrainConfig, pretrain\n"
            "settings = json.loads(Path(sys.argv[2]).read_text()); settings['corpus'] = Path(settings['corpus'])\n"
            "pretrain(PretrainConfig(**settings), open_run(Path(sys.argv[1])))\n"
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                   str(program), str(folder), str(settings)]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, result.stderr[-2000:]
        runs.append(run)
    one, two = (
        [(record["loss"], record["gradient_norm"]) for record in run.metrics() if "loss" in record]
        for run in runs
    )
    for (loss, norm), (other_loss, other_norm) in zip(one, two, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-4)
        assert norm == pytest.approx(other_norm, rel=1e-3)
