"""Training on pairs: the objective against an independent formula, a run from files to translations, stop and resume."""

import json
import random

import numpy as np
import pytest
import torch
from torch.nn import functional

from glasshouse.artifact import open_artifact
from glasshouse.cli import main
from glasshouse.errors import InputError
from glasshouse.inference.generate import TranslationConfig, translate_texts
from glasshouse.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, initialize_sequences
from glasshouse.run import open_run
from glasshouse.text.pairs import PairStream
from glasshouse.training import objectives
from glasshouse.training.distributed import StopSignal
from glasshouse.training.objectives import IGNORED, SequenceBatch, linear_cross_entropy, sequence_to_sequence
from glasshouse.training.sequences import PairsConfig, sequence_shape, split_rows

NOUNS = {"cat": "Katze", "dog": "Hund", "bird": "Vogel", "cow": "Kuh", "horse": "Pferd", "fish": "Fisch"}
VERBS = {"sees": "sieht", "hears": "hört", "likes": "mag"}


def write_pairs(path, count: int, seed: int):
    draw, lines = random.Random(seed), []
    for _ in range(count):
        a, v, b = draw.choice(list(NOUNS)), draw.choice(list(VERBS)), draw.choice(list(NOUNS))
        lines.append(f"a {a} {v} a {b}\t{NOUNS[a]} {VERBS[v]} {NOUNS[b]}\n")
    path.write_text("".join(lines))
    return str(path)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [2**23, 300])
def test_cross_entropy_with_bias_and_smoothing_is_pytorchs(monkeypatch, smoothing, chunk):
    monkeypatch.setattr(objectives, "CHUNK_SCORES", chunk)
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=draw, requires_grad=True) for shape in ((50, 16), (30, 16), (30,))
    )
    labels = torch.randint(0, 30, (50,), generator=draw)
    labels[::7] = IGNORED
    found = linear_cross_entropy(hidden, weight, labels, bias, smoothing)
    expected = functional.cross_entropy(
        hidden @ weight.T + bias, labels, reduction="sum", label_smoothing=smoothing, ignore_index=IGNORED
    )
    assert torch.allclose(found, expected, rtol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(3 * found, (hidden, weight, bias)),
        torch.autograd.grad(3 * expected, (hidden, weight, bias)),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def small_model(**changes) -> EncoderDecoder:
    model = EncoderDecoder(EncoderDecoderConfig(40, 16, 1, 1, 2, 8, 32, 64, **changes))
    initialize_sequences(model, 0)
    return model


def test_padded_batches_give_the_loss_of_single_pairs():
    draw = np.random.default_rng(0)
    sources = [draw.integers(4, 40, n) for n in (3, 9, 5)]
    targets = [draw.integers(4, 40, n) for n in (6, 2, 8)]
    stream = PairStream(sources, targets, 1, 0, 100, 0)
    model, objective = small_model(), sequence_to_sequence(0.1)

    def loss(rows: list[int]) -> tuple[float, int]:
        batch = stream.rows(rows)
        total, weight = objective(
            model,
            SequenceBatch(
                *(torch.from_numpy(a) for a in (batch.sources, batch.source_mask, batch.tokens, batch.labels))
            ),
        )
        return total.item(), weight

    together, singles = loss([0, 1, 2]), [loss([row]) for row in range(3)]
    assert together[0] == pytest.approx(sum(single[0] for single in singles), rel=1e-5)
    assert together[1] == sum(single[1] for single in singles) == 16


def test_processes_share_a_batch_without_losing_a_row():
    stream = PairStream(
        [np.array([5, n]) for n in range(7)], [np.array([6, n]) for n in range(7)], 1, 0, 100, 0
    )
    rows = stream.rows(range(7))
    parts = [piece for rank in range(3) for piece in split_rows(rows, rank, 3)]
    assert sorted(row[1] for piece in parts for row in piece.sources) == list(range(7))
    assert list(split_rows(stream.rows([0]), 1, 2)) == []


def test_settings_that_make_no_model_are_refused(tmp_path):
    with pytest.raises(InputError, match="width 30 does not split into 4 heads"):
        sequence_shape(PairsConfig((), (), width=30, heads=4), 100)
    with pytest.raises(InputError, match="unknown layout 'bart'"):
        sequence_shape(PairsConfig((), (), layout="bart"), 100)


TINY = ["--width", "32", "--heads", "2", "--layers", "1", "--feed_forward", "64", "--vocab_size", "300",
        "--batch_tokens", "512", "--learning_rate", "1e-2", "--matrix_learning_rate", "2e-2", "--threads", "1",
        "--dropout", "0.1", "--dtype", "float32"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A toy language learned through the command line, and its pairs."""
    folder = tmp_path_factory.mktemp("toy")
    train, held_out = write_pairs(folder / "train.tsv", 400, 0), write_pairs(folder / "val.tsv", 60, 1)
    out = folder / "run"
    words = [
        "pretrain",
        "--pairs",
        train,
        "--validation",
        held_out,
        *TINY,
        "--epochs",
        "25",
        "--out",
        str(out),
    ]
    assert main(words) == 0
    return folder, out


def test_a_toy_language_is_learned(trained):
    folder, out = trained
    pairs = [line.split("\t") for line in (folder / "val.tsv").read_text().splitlines()]
    answers = translate_texts(open_artifact(out), [source for source, _ in pairs])
    assert np.mean([answer == target for answer, (_, target) in zip(answers, pairs, strict=True)]) > 0.95
    facts = open_run(out).read()
    assert (facts["status"], facts["stage"]) == ("finished", "pretrain")
    generation = json.loads((out / "model" / "generation_config.json").read_text())
    assert generation["decoder_start_token_id"] == open_artifact(out).tokenizer.pad


def test_texts_keep_their_order_and_empty_ones_stay_empty(trained):
    artifact = open_artifact(trained[1])
    texts = ["a cat sees a dog", "", "a bird likes a cow", "   "]
    together = translate_texts(artifact, texts, TranslationConfig(rows=1))
    assert together == translate_texts(artifact, texts) == ["Katze sieht Hund", "", "Vogel mag Kuh", ""]
    assert translate_texts(artifact, texts[:1], TranslationConfig(beams=1)) == ["Katze sieht Hund"]
    with pytest.raises(InputError, match=r"text 2 has .* tokens and the model reads at most 512"):
        translate_texts(artifact, ["a", "a cat " * 600])


def test_the_verb_translate_writes_lines_and_scores(trained, tmp_path, capsys):
    out = trained[1]
    (tmp_path / "en").write_text("a cat sees a dog\na bird likes a cow\n")
    (tmp_path / "de").write_text("Katze sieht Hund\nVogel mag Kuh\n")
    words = [
        "translate",
        str(out),
        "--file",
        str(tmp_path / "en"),
        "--references",
        str(tmp_path / "de"),
        "--device",
        "cpu",
    ]
    assert main([*words, "--dtype", "float32"]) == 0
    written = capsys.readouterr()
    assert written.out == "Katze sieht Hund\nVogel mag Kuh\n"
    assert "chrF 100.0" in written.err
    assert main(["translate", str(out), "a dog hears a dog", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == "Hund hört Hund\n"
    assert main(["translate", str(out)]) == 2
    assert "nothing to translate" in capsys.readouterr().err
    (tmp_path / "de").write_text("Katze sieht Hund\n")
    assert main(words) == 2
    assert "2 lines and 1 references" in capsys.readouterr().err


def test_a_run_writes_its_card(trained, capsys):
    assert main(["report", str(trained[1])]) == 0
    assert (trained[1] / "README.md").read_text()


def test_stopped_and_resumed_is_uninterrupted(trained, monkeypatch, tmp_path):
    """The weights after 2 epochs at once, and after a stop in the middle, bit for bit."""
    folder, _ = trained
    words = ["pretrain", "--pairs", str(folder / "train.tsv"), "--validation", str(folder / "val.tsv"), *TINY,
             "--epochs", "2", "--validations", "2"]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    calls = iter(range(10**6))
    monkeypatch.setattr(StopSignal, "__call__", lambda self: next(calls) >= 9)
    assert main([*words, "--out", str(tmp_path / "cut")]) == 0
    monkeypatch.undo()
    assert open_run(tmp_path / "cut").read()["status"] == "stopped"
    assert main(["pretrain", "--out", str(tmp_path / "cut"), "--resume"]) == 0
    first, second = (open_artifact(tmp_path / name).model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_that_are_left_out_are_named(tmp_path, capsys):
    train = write_pairs(tmp_path / "train.tsv", 60, 0)
    text = (tmp_path / "train.tsv").read_text()
    (tmp_path / "train.tsv").write_text("a cat\t \n" + text + "\tKatze\n" + text.splitlines(True)[0])
    words = [
        "pretrain",
        "--pairs",
        train,
        "--validation",
        train,
        *TINY,
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "left out 2 rows with an empty side: 1, 62" in said
    assert "rows say what an earlier row says" in said
    assert "passes over 61 pairs" in said


def test_pairs_that_changed_are_refused_on_resume(trained, tmp_path, monkeypatch, capsys):
    train = write_pairs(tmp_path / "train.tsv", 60, 0)
    calls = iter(range(10**6))
    monkeypatch.setattr(StopSignal, "__call__", lambda self: next(calls) >= 9)
    words = [
        "pretrain",
        "--pairs",
        train,
        "--validation",
        str(trained[0] / "val.tsv"),
        *TINY,
        "--epochs",
        "30",
    ]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    monkeypatch.undo()
    write_pairs(tmp_path / "train.tsv", 61, 0)
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "not those this run was started on" in capsys.readouterr().err
