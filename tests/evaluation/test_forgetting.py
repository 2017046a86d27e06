"""Forgetting: nothing where nothing changed, shown where weights were spoiled, and the corpus found through the runs."""

import json
from pathlib import Path

import pytest
import torch

from glasshouse.artifact import open_artifact, save_artifact
from glasshouse.corpus.documents import Document
from glasshouse.device import open_device
from glasshouse.evaluation.forgetting import corpus_behind, measure_forgetting
from glasshouse.files import atomic_folder
from glasshouse.models.decoder import Decoder, DecoderConfig, initialize
from glasshouse.text.shards import write_corpus
from glasshouse.text.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a base model made from it, and two models made from the base: an untouched and a spoiled one."""
    top = tmp_path_factory.mktemp("family")
    texts = [
        f"The cat number {n} sees the dog. It is {'happy' if n % 3 else 'sad'} today." for n in range(120)
    ]
    documents = [Document(str(n), text, "made", "CC0-1.0", "en", {}) for n, text in enumerate(texts)]
    tokenizer = train_tokenizer(iter(texts), 290)
    with atomic_folder(top / "corpus_run" / "corpus") as folder:
        write_corpus(folder, documents, tokenizer, validation_fraction=0.3)
    (top / "corpus_run" / "run.json").write_text(json.dumps({"stage": "prepare", "parents": []}))
    model = Decoder(DecoderConfig(290, 32, 2, 4, 4, 8, 64, 64))
    initialize(model, 0)
    for name, parent in (("base", "corpus_run"), ("same", "base"), ("spoiled", "base")):
        if name == "spoiled":
            with torch.no_grad():
                model.embedding.weight += torch.randn(
                    model.embedding.weight.shape, generator=torch.Generator().manual_seed(1)
                )
        save_artifact(top / name / "model", model, tokenizer)
        facts = {"stage": "finetune", "status": "running", "parents": [{"path": str(top / parent)}]}
        (top / name / "run.json").write_text(json.dumps(facts))
    return top


def test_the_corpus_is_found_through_the_runs(family: Path) -> None:
    assert corpus_behind(family / "same") == family / "corpus_run"
    assert corpus_behind(family / "base") == family / "corpus_run"
    assert corpus_behind(family / "same" / "model") is None


def test_an_untouched_model_has_forgotten_nothing(family: Path) -> None:
    report = measure_forgetting(
        family / "same", family / "base", family / "corpus_run", open_device("cpu", "float32")
    )
    assert report["difference"] == 0
    assert "no forgetting shown" in report["verdict"]


def test_a_spoiled_model_has(family: Path) -> None:
    report = measure_forgetting(
        family / "spoiled", family / "base", family / "corpus_run", open_device("cpu", "float32")
    )
    assert report["low"] > 0
    assert report["difference"] == pytest.approx(report["after"] - report["before"])
    assert report["verdict"].startswith("it forgot")
    assert report["digest"] == open_artifact(family / "spoiled").digest
    assert report["base_digest"] == open_artifact(family / "base").digest
