"""Losses of comparisons against numbers worked by hand and other formulas; a small model learns which answer is better."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glasshouse.artifact import open_artifact, require_decoder
from glasshouse.config import config_to_dict
from glasshouse.device import open_device
from glasshouse.errors import InputError
from glasshouse.models.decoder import Decoder, DecoderConfig, initialize
from glasshouse.run import Run, create_run
from glasshouse.text.examples import ExampleCounts, read_examples
from glasshouse.text.supervision import Lesson
from glasshouse.training.finetune import FinetuneConfig, finetune
from glasshouse.training.objectives import IGNORED, TokenBatch, distillation
from glasshouse.training.preferences import (
    divergence_of,
    dpo_loss,
    encode_comparisons,
    kto_loss,
    orpo_loss,
    pad_lessons,
    sequence_log_probabilities,
    simpo_loss,
)
from glasshouse.training.pretrain import PretrainConfig, pretrain

ASKED = ("cat", "dog", "bird", "cow", "child", "fish", "tree", "sun")


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, requires_grad=True)


@pytest.fixture(scope="module")
def base(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    config = PretrainConfig(
        corpus_folder, size="nano", steps=20, batch_tokens=512, threads=1, validations=1, device="cpu"
    )
    pretrain(config, create_run(folder, "pretrain", {"corpus": str(corpus_folder)}, [corpus_folder]))
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The better answer says yes, the worse one no."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"{how} {what}?", "chosen": f"yes, the {what}", "rejected": f"no, the {what}"}
        for how in ("Is it a", "May I have the", "Do you see a")
        for what in ASKED
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quick(base: Path, data: Path, **settings: object) -> FinetuneConfig:
    config = FinetuneConfig(
        base, (str(data),), task="dpo", steps=16, rows=6, micro_rows=3, validations=2, threads=1, device="cpu",
        dtype="float32", context=64, learning_rate=5e-3,
    )  # fmt: skip
    return replace(config, **settings)  # type: ignore[arg-type]


def start(folder: Path, config: FinetuneConfig) -> Run:
    return create_run(folder, "finetune", config_to_dict(config), [config.model])


# ---- the losses


def test_dpo_is_the_hand_worked_number() -> None:
    chosen, rejected, reference = vector(-4.0), vector(-6.0), torch.tensor([[-5.0, -5.0]])
    loss = dpo_loss(chosen, rejected, reference, 0.5)  # 0.5 * ((-4 + 5) - (-6 + 5)) = 1
    assert loss.item() == pytest.approx(0.31326169, abs=1e-6)  # log(1 + e^-1)
    loss.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.5 / (1 + math.e), abs=1e-6)
    assert rejected.grad.item() == pytest.approx(0.5 / (1 + math.e), abs=1e-6)


def test_dpo_at_the_reference_is_log_two() -> None:
    both = torch.tensor([[-3.0, -9.0]])
    assert dpo_loss(both[:, 0], both[:, 1], both, 0.1).item() == pytest.approx(math.log(2))


def test_simpo_is_the_hand_worked_number_and_divides_lengths_out() -> None:
    lengths = torch.tensor([[2, 4]])
    loss = simpo_loss(vector(-1.0), vector(-4.0), lengths, 2.0, 1.0)  # 2 * (-0.5 + 1) - 1 = 0
    assert loss.item() == pytest.approx(math.log(2))
    twice = simpo_loss(vector(-2.0), vector(-8.0), lengths * 2, 2.0, 1.0)
    assert twice.item() == pytest.approx(loss.item())


def test_orpo_is_the_formula_of_the_odds() -> None:
    chosen, rejected, lengths = vector(-1.2), vector(-6.0), torch.tensor([[3, 4]])
    loss = orpo_loss(chosen, rejected, lengths, 0.1)
    better, worse = math.exp(-0.4), math.exp(-1.5)
    ratio = (better / (1 - better)) / (worse / (1 - worse))
    assert loss.item() == pytest.approx(0.4 - 0.1 * math.log(ratio / (1 + ratio)), abs=1e-6)
    loss.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() < 0 < rejected.grad.item()


def test_kto_is_the_formula_and_pulls_both_ways() -> None:
    answer, reference = vector(-4.0, -4.0), torch.tensor([-5.0, -5.0])
    loss = kto_loss(answer, reference, torch.tensor([True, False]), torch.tensor(0.5), 1.0)
    gain = 1 / (1 + math.exp(-0.5))
    assert loss.tolist() == pytest.approx([1 - gain, gain], abs=1e-6)
    loss.sum().backward()
    assert answer.grad is not None
    assert answer.grad[0] < 0 < answer.grad[1]


def test_the_reference_point_is_the_mean_and_never_negative() -> None:
    mismatched = vector(-1.0, -2.0)
    assert divergence_of(mismatched, torch.tensor([-2.0, -4.0])).item() == pytest.approx(1.5)
    assert divergence_of(mismatched, torch.tensor([0.0, 0.0])).item() == 0.0
    assert not divergence_of(mismatched, torch.tensor([0.0, 0.0])).requires_grad


# ---- log-probabilities


def small(seed: int) -> Decoder:
    model = Decoder(DecoderConfig(40, 16, 1, 2, 1, 8, 32, 32))
    initialize(model, seed)
    return model.eval()


def batch_of(rows: int = 3, length: int = 9) -> TokenBatch:
    drawn = torch.randint(40, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    labels = drawn[:, 1:].clone()
    labels[:, :3] = IGNORED
    labels[0, 6:] = IGNORED
    return TokenBatch(drawn[:, :-1], labels, torch.arange(length).expand(rows, length), None)


def test_sums_are_those_of_whole_logits_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = small(0), batch_of()
    logs = model.logits(model(batch.tokens)).float().log_softmax(-1)
    picked = logs.gather(-1, batch.labels.clamp_min(0)[..., None])[..., 0] * (batch.labels != IGNORED)
    expected = torch.autograd.grad(picked.sum(1).exp().sum(), list(model.parameters()))
    monkeypatch.setattr("glasshouse.training.objectives.CHUNK_SCORES", 40 * 4)
    sums, lengths = sequence_log_probabilities(model, batch)
    assert torch.allclose(sums, picked.sum(1), atol=1e-5)
    assert lengths.tolist() == [3, 6, 6]
    found = torch.autograd.grad(sums.exp().sum(), list(model.parameters()))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))


def test_padding_changes_no_sum() -> None:
    model, device = small(0), open_device("cpu", "float32", 0, 1)
    short, long = (
        Lesson("", torch.arange(size).numpy() % 40, (torch.arange(size) > 2).numpy()) for size in (5, 12)
    )
    alone, _ = sequence_log_probabilities(model, pad_lessons([short], 39, device))
    beside, _ = sequence_log_probabilities(model, pad_lessons([short, long], 39, device))
    assert beside[0].item() == pytest.approx(alone[0].item(), abs=1e-5)


def test_distilling_is_the_divergence_and_brings_the_student_nearer() -> None:
    student, teacher, batch = small(0), small(7), batch_of()
    objective = distillation(teacher, 40, 2.0)
    loss, weight = objective(student, batch)
    own, other = ((model.logits(model(batch.tokens)).float() / 2.0).log_softmax(-1) for model in (student, teacher))  # fmt: skip
    divergence = torch.nn.functional.kl_div(own, other, log_target=True, reduction="none").sum(-1)
    learned = batch.labels != IGNORED
    assert weight == int(learned.sum())
    assert loss.item() == pytest.approx(4.0 * divergence[learned].sum().item(), rel=1e-4)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        objective(student, batch)[0].backward()
        optimizer.step()
    assert objective(student, batch)[0].item() < 0.2 * loss.item()
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ---- the stage


@pytest.mark.parametrize("task", ["dpo", "orpo", "kto", "simpo"])
def test_each_task_learns_which_answer_is_better(base: Path, pairs: Path, tmp_path: Path, task: str) -> None:
    config = quick(base, pairs, task=task, method="lora" if task == "dpo" else "full", steps=24)
    run = start(tmp_path / "run", config)
    finetune(config, run)
    records = run.metrics()
    last = [record for record in records if "validation_accuracy" in record][-1]
    first = next(record for record in records if "loss" in record)
    assert last["validation_accuracy"] >= 0.9
    assert last["validation_margin"] > first["margin"]
    assert run.read()["status"] == "finished"


def test_stopped_and_resumed_the_reference_is_the_same(base: Path, pairs: Path, tmp_path: Path) -> None:
    """A run stopped in its middle ends where one that was not stopped does: the reference is the model of the start."""
    config = quick(base, pairs, steps=8, save_minutes=0.0)
    whole = start(tmp_path / "whole", config)
    finetune(config, whole)
    stopped = start(tmp_path / "stopped", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "glasshouse.training.distributed.StopSignal.__call__",
            lambda self: sum("loss" in record for record in stopped.metrics()) >= 4,
        )
        finetune(config, stopped)
    assert stopped.read()["status"] == "stopped"
    finetune(config, stopped)
    one, other = (require_decoder(open_artifact(run.path)).state_dict() for run in (whole, stopped))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_student_learns_its_teachers_odds(base: Path, pairs: Path, tmp_path: Path) -> None:
    taught = quick(base, pairs, task="chat", method="full", steps=20)
    teacher = start(tmp_path / "teacher", taught)
    finetune(taught, teacher)
    config = quick(base, pairs, task="distill", teacher=teacher.path, method="full", steps=20)
    run = start(tmp_path / "student", config)
    finetune(config, run)
    losses = [record["validation_loss"] for record in run.metrics() if "validation_loss" in record]
    first = next(record["loss"] for record in run.metrics() if "loss" in record)
    assert losses[-1] < 0.5 * first


def test_one_sided_pairs_are_counted_by_name(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"},
        {"prompt": "a", "chosen": "", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a" * 200, "chosen": "b", "rejected": "c"},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts, tokenizer = ExampleCounts(), open_artifact(base).tokenizer
    found = encode_comparisons(tokenizer, read_examples([path], counts), 64, counts, "dpo")
    assert [one.row for one in found] == ["some.jsonl:1"]
    assert sum(counts.dropped.values()) == 4
    assert {row for rows in counts.rows.values() for row in rows} == {f"some.jsonl:{number}" for number in (2, 3, 4, 5)}  # fmt: skip
    for side in (found[0].first, found[0].second):
        text = tokenizer.decode(side.tokens[side.learned].tolist(), keep_special=True)
        assert text in ("b<|im_end|>", "c<|im_end|>")


def test_a_mismatched_answer_belongs_to_another_question(base: Path, pairs: Path) -> None:
    tokenizer = open_artifact(base).tokenizer
    counts = ExampleCounts()
    found = encode_comparisons(tokenizer, read_examples([pairs], counts), 64, counts, "kto")
    assert [one.good for one in found[:4]] == [True, False, True, False]
    own, other = ((side.tokens[: side.learned.argmax()].tolist(), side.tokens[side.learned].tolist())
                  for side in (found[0].first, found[0].second))  # fmt: skip
    assert own[0] == other[0]
    assert own[1] != other[1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "magic"}, "unknown task"),
        ({"beta": 0.0}, "beta is 0"),
        ({"task": "distill"}, "belong together"),
        ({"teacher": Path("x")}, "belong together"),
    ],
)
def test_what_cannot_be_done_is_refused(
    base: Path, pairs: Path, tmp_path: Path, settings: dict[str, object], said: str
) -> None:
    config = quick(base, pairs, **settings)
    with pytest.raises(InputError, match=said):
        finetune(config, start(tmp_path / "run", config))


def test_answers_without_a_worse_one_are_refused(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": "a"}) + "\n" for n in range(9)))
    config = quick(base, path)
    with pytest.raises(InputError, match=r"no pair of answers is left.*answers.jsonl:\d"):
        finetune(config, start(tmp_path / "run", config))
