"""The stage on a small run: every figure in the report, computed again another way."""

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glasshouse.artifact import save_artifact
from glasshouse.corpus.documents import Document
from glasshouse.device import open_device
from glasshouse.errors import InputError
from glasshouse.evaluation.baselines import train_ngram
from glasshouse.evaluation.compare import compare_runs, measure_costs, read_costs
from glasshouse.evaluation.evaluate import EvaluateConfig, evaluate, summary
from glasshouse.evaluation.perplexity import draw_documents
from glasshouse.files import atomic_folder
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.run import Run, create_run
from glasshouse.text.packing import TRAIN, VALIDATION, open_corpus
from glasshouse.text.shards import write_corpus
from glasshouse.text.tokenizer import train_tokenizer

CONFIG = EvaluateConfig(device="cpu", dtype="float32")
WORDS = ["the", "cat", "sat", "on", "mat", "你好", "dog", "ran", "away\n"]


def make_documents(count, longest=60):
    draw = random.Random(1)
    return [
        Document(f"id{number}", " ".join(draw.choices(WORDS, k=draw.randrange(3, longest))), f"s{number % 3}", "CC0",
                 "zh" if number % 4 == 0 else "en", {})
        for number in range(count)
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def keep_threads():
    """open_device sets the process's threads; give them back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def make_corpus(path, documents, vocab_size=270):
    tokenizer = train_tokenizer((one.text for one in documents), vocab_size)
    run = create_run(path, "prepare", {}, [])
    with atomic_folder(run.corpus_path) as temporary:
        write_corpus(temporary, documents, tokenizer, 0.25)
    run.finish()
    return run, tokenizer


def make_model(path, corpus, tokenizer, seed=0):
    run = create_run(path, "pretrain", {}, [corpus.path])
    model = Decoder(DecoderConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, 32))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    save_artifact(run.model_path, model, tokenizer)
    run.finish()
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    corpus, tokenizer = make_corpus(folder / "corpus", make_documents(200))
    runs = [make_model(folder / f"seed{seed}", corpus, tokenizer, seed) for seed in range(2)]
    return corpus, tokenizer, runs, [evaluate(CONFIG, run) for run in runs]


def test_the_report_is_attached_and_names_what_it_measured(made):
    corpus, _, runs, reports = made
    attached = runs[0].reports()["evaluation"]
    assert attached == json.loads(json.dumps(reports[0]))
    assert attached["digest"] == runs[0].read()["digest"] == runs[0].digest()
    assert attached["held_out"]["corpus"] == corpus.digest()
    assert attached["command"]
    assert attached["seed"] == 0
    assert "windows half a context apart" in attached["method"]
    assert reports[0]["held_out"]["digest"] == reports[1]["held_out"]["digest"]


def test_figures_are_those_of_the_whole_split(made):
    corpus, _, _, reports = made
    split, report = open_corpus(corpus.corpus_path).split(VALIDATION), reports[0]
    assert report["held_out"]["documents"] == report["held_out"]["of_documents"] == split.documents
    assert (report["held_out"]["bytes"], report["held_out"]["tokens"]) == (split.bytes, split.tokens)
    figures, units = report["bits_per_byte"], report["units"]
    assert figures["value"] == pytest.approx(sum(units["nats"]) / math.log(2) / sum(units["bytes"]), rel=1e-4)
    assert figures["low"] < figures["value"] < figures["high"]
    # A model of random weights pays about log2(vocabulary) bits a token.
    assert figures["value"] == pytest.approx(math.log2(270) * split.tokens / split.bytes, rel=0.1)


def test_the_baseline_is_the_ngram_model_on_the_same_tokens(made):
    corpus, tokenizer, _, reports = made
    opened, report = open_corpus(corpus.corpus_path), reports[0]
    train, split = opened.split(TRAIN), opened.split(VALIDATION)
    documents = [train.document(number)[0] for number in range(train.documents)]
    model = train_ngram(documents, 270, tokenizer.end_of_document)
    nats = -sum(model.log_probabilities(split.document(number)[0]).sum() for number in range(split.documents))
    assert report["baseline"]["value"] == pytest.approx(nats / math.log(2) / split.bytes)
    assert report["baseline"]["tokens"] == train.tokens
    difference = report["difference"]
    assert difference["value"] == pytest.approx(
        report["bits_per_byte"]["value"] - report["baseline"]["value"]
    )
    assert difference["verdict"] == "the baseline is better"
    assert difference["low"] > 0


def test_groups_add_up(made):
    report = made[3][0]
    for groups, names in ((report["languages"], {"en", "zh"}), (report["sources"], {"s0", "s1", "s2"})):
        assert {group["name"] for group in groups} == names
        assert sum(group["documents"] for group in groups) == report["held_out"]["documents"]
        mean = sum(group["value"] * group["bytes"] for group in groups) / report["held_out"]["bytes"]
        assert mean == pytest.approx(report["bits_per_byte"]["value"])
        baseline = sum(group["baseline"] * group["bytes"] for group in groups) / report["held_out"]["bytes"]
        assert baseline == pytest.approx(report["baseline"]["value"])


def test_the_gap_is_held_out_less_training(made):
    train = made[3][0]["train"]
    assert train["gap"] == pytest.approx(made[3][0]["bits_per_byte"]["value"] - train["value"])
    assert train["gap_low"] < train["gap"] < train["gap_high"]
    assert train["tokens"] == made[3][0]["held_out"]["tokens"] // 2
    assert abs(train["gap"]) < 0.2  # a model that was never trained knows neither


def test_the_summary_says_it_in_lines(made):
    text = summary(made[3][0])
    assert "5-gram" in text
    assert "the baseline is better" in text


def test_runs_compare_through_their_reports_and_through_a_corpus(made, tmp_path):
    corpus, _, runs, _ = made
    device = open_device("cpu", "float32", threads=torch.get_num_threads())
    read, measured = read_costs(runs[0].path), measure_costs(runs[0].path, corpus.path, device)
    np.testing.assert_allclose(read.nats, measured.nats, atol=1e-3)
    assert (read.held_out, read.languages) == (measured.held_out, measured.languages)
    [same, *_] = compare_runs([runs[0].path], [runs[0].path])
    assert "no difference shown" in same.verdict
    other, tokenizer = make_corpus(tmp_path / "other", make_documents(60, longest=20), 265)
    stranger = make_model(tmp_path / "stranger", other, tokenizer, 5)
    evaluate(CONFIG, stranger)
    with pytest.raises(InputError, match="same held-out documents"):
        compare_runs([runs[0].path], [stranger.path])
    found = compare_runs([runs[0].path], [stranger.path], corpus=corpus.path, device=device)
    assert found[0].left != found[0].right
    assert found[0].units == made[3][0]["held_out"]["documents"]


def test_less_text_when_asked(made):
    corpus, _, runs, _ = made
    split = open_corpus(corpus.corpus_path).split(VALIDATION)
    chosen = draw_documents(split, 2000, 0)
    assert 1 < len(chosen) < split.documents
    assert sum(split.document(number)[1] for number in chosen) <= 2000
    assert chosen == sorted(chosen) == draw_documents(split, 2000, 0) != draw_documents(split, 2000, 1)
    assert len(draw_documents(split, 1, 0)) == 1
    shutil.copytree(runs[0].path, runs[0].path.parent / "copy")
    report = evaluate(replace(CONFIG, bytes=2000, baseline_tokens=500), Run(runs[0].path.parent / "copy"))
    assert report["held_out"]["documents"] == len(chosen)
    assert 500 <= report["baseline"]["tokens"] < 700
    assert "blocks" in report["method"]
    assert report["units"]["languages"] == []


def test_refusals(made, tmp_path):
    corpus, tokenizer, runs, _ = made
    for wrong in ({"bytes": 0}, {"order": 0}, {"baseline_tokens": 0}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            EvaluateConfig(**wrong)
    other, _ = make_corpus(tmp_path / "other", make_documents(60, longest=20), 265)
    with pytest.raises(InputError, match="another tokenizer"):
        evaluate(replace(CONFIG, corpus=str(other.path)), runs[0])
    orphan = make_model(tmp_path / "orphan", corpus, tokenizer)
    orphan.update(parents=[])
    with pytest.raises(InputError, match="names no corpus"):
        evaluate(CONFIG, orphan)
    orphan.update(parents=[{"path": str(corpus.path), "digest": "0" * 64}])
    with pytest.raises(InputError, match="not the one the run was trained on"):
        evaluate(CONFIG, orphan)
    assert not (orphan.path / "reports").exists()
    assert Path(other.path).exists()
