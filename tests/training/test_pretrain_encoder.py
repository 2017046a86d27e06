"""Pretraining of an encoder: it learns from what is shown, resumes exactly, and opens in transformers."""

import math
from pathlib import Path

import pytest
import torch
import transformers

from glasshouse.artifact import open_artifact, require_decoder
from glasshouse.errors import InputError
from glasshouse.inference.generate import continue_text
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.models.encoder import Encoder
from glasshouse.run import Run, create_run, open_run
from glasshouse.text.packing import batch, open_corpus
from glasshouse.text.reading import MASK, read_text
from glasshouse.training.checkpoint import load_state
from glasshouse.training.pretrain import PretrainConfig, hiding, pretrain

STEPS = 40


def quick(corpus: Path, **settings: object) -> PretrainConfig:
    return PretrainConfig(corpus, family="encoder", mask_unit="span", size="nano", steps=STEPS, batch_tokens=1024,
                          threads=1, validations=4, device="cpu", **settings)  # type: ignore[arg-type]  # fmt: skip


@pytest.fixture(scope="module")
def finished(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = create_run(tmp_path_factory.mktemp("runs") / "whole", "pretrain", {}, [corpus_folder])
    pretrain(quick(corpus_folder), run)
    return run


def test_it_learns_and_says_what_its_loss_is(finished: Run, capsys: pytest.CaptureFixture[str]):
    metrics, facts = finished.metrics(), finished.read()
    losses = [record["loss"] for record in metrics if "loss" in record]
    held_out = [record["validation_loss"] for record in metrics if "validation_loss" in record]
    assert len(losses) == STEPS
    assert abs(losses[0] - math.log(321)) < 0.5
    assert held_out[-1] < 0.4 * losses[0]
    assert facts["status"] == "finished"
    assert facts["best"]["validation_loss"] == min(held_out)
    assert (
        facts["best"]["validation_bits_per_byte"] is None
    )  # a guess from both sides costs no bits of a file
    assert facts["shape"]["model"]["head"]["kind"] == "masked"


def test_the_model_fills_the_gap_and_opens_in_transformers(finished: Run):
    artifact = open_artifact(finished.path)
    assert artifact.verified
    assert isinstance(artifact.model, Encoder)
    tokenizer = artifact.tokenizer
    assert tokenizer.special[MASK] == tokenizer.mask == 320
    ids = torch.tensor([read_text(tokenizer, "The cat sees the dog. The dog likes the cow.").ids])
    hidden = ids.clone()
    hidden[0, 3] = tokenizer.mask
    with torch.no_grad():
        scores = artifact.model.float().logits(artifact.model(hidden))
    verbs = {tokenizer.encode(f"The cat {verb}")[2] for verb in ("sees", "likes", "finds", "follows")}
    assert int(ids[0, 3]) in verbs
    assert int(scores[0, 3].argmax()) in verbs
    again = transformers.AutoModelForMaskedLM.from_pretrained(finished.model_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (again(hidden).logits - scores).abs().max() < 1e-4
    splitter = transformers.AutoTokenizer.from_pretrained(finished.model_path)
    assert splitter.mask_token == MASK
    assert splitter("The cat")["input_ids"] == read_text(tokenizer, "The cat").ids


def test_stopped_it_goes_on_with_the_same_weights(
    corpus_folder: Path, finished: Run, tmp_path: Path, monkeypatch
):
    """Killed in the middle of a step after saving; the shape and speed are those of the uninterrupted run."""
    config = quick(corpus_folder, save_minutes=0.0)
    run = create_run(tmp_path / "killed", "pretrain", {}, [corpus_folder])
    known = ("shape", "compiled", "predicted", "corpus_digest", "baseline_memory")
    run.update(**{name: finished.read()[name] for name in known})

    class Killed(BaseException):
        pass

    logged = Run.log

    def kill(self: Run, record: dict[str, object]) -> None:
        logged(self, record)
        if record.get("step") == 17:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", kill)
        with pytest.raises(Killed):
            pretrain(config, run)
    assert load_state(run.state_path)[1]["step"] == 16
    pretrain(config, open_run(tmp_path / "killed"))
    expected, found = load_state(finished.state_path)[0], load_state(run.state_path)[0]
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        if name.startswith("master."):
            assert torch.equal(tensor, found[name]), name


def test_what_is_hidden_depends_on_seed_and_step_alone(corpus_folder: Path, finished: Run):
    tokenizer = open_artifact(finished.path).tokenizer
    rows = batch(open_corpus(corpus_folder / "corpus").split("train"), 3, 8, 64, 0)
    config = quick(corpus_folder)
    one, other = hiding(config, tokenizer, 5)(rows, 3), hiding(config, tokenizer, 5)(rows, 3)
    assert (one.tokens == other.tokens).all()
    assert (one.labels == other.labels).all()
    hidden = one.labels != -100
    assert (one.labels[hidden] == rows.tokens[hidden]).all()
    assert not (rows.tokens[hidden] == tokenizer.end_of_document).any()
    assert (hiding(config, tokenizer, 5)(rows, 4).labels != one.labels).any()


def test_an_encoder_does_not_write(finished: Run):
    artifact = open_artifact(finished.path)
    with pytest.raises(InputError, match="is an Encoder, and this needs a Decoder"):
        require_decoder(artifact)
    with pytest.raises(InputError, match="Decoder"):
        list(continue_text(artifact, "The cat", GenerationConfig(max_new_tokens=2)))
    assert not (finished.model_path / "generation_config.json").exists()


def test_unknown_families_and_units_are_refused(corpus_folder: Path, tmp_path: Path):
    for number, (settings, word) in enumerate(
        (
            ({"family": "sphinx"}, "--family"),
            ({"mask_unit": "page"}, "--mask_unit"),
            ({"mask_share": 0.0}, "--mask_share"),
        )
    ):
        config = PretrainConfig(
            corpus_folder,
            **{"family": "encoder", "size": "nano", "steps": 2, "threads": 1, "device": "cpu", **settings},
        )
        with pytest.raises(InputError, match=word):
            pretrain(config, create_run(tmp_path / str(number), "pretrain", {}, [corpus_folder]))
