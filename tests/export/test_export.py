"""The verb: what it writes, prints and refuses; whatever fails leaves nothing behind."""

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch

import glasshouse.cli as cli
from glasshouse.artifact import open_artifact
from glasshouse.errors import InputError
from glasshouse.export import export
from glasshouse.export.export import ExportSettings, export_model
from glasshouse.export.gguf_model import open_gguf
from glasshouse.export.replay import read_rows
from glasshouse.files import verify_manifest

LAYOUTS = ["qwen3", "qwen3 wide", "llama", "llama scaled", "llama linear", "llama biased", "qwen2", "gpt2"]


def refused(capsys, *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown.startswith("glasshouse: ")
    return shown


def record(folder: Path) -> dict:
    return json.loads((folder / "export.json").read_text())


@pytest.mark.parametrize("layout", [*LAYOUTS, "mistral"])
def test_read_back_it_is_the_same_model(layout, model_folder, tmp_path, capsys):
    folder = export_model(ExportSettings(str(model_folder(layout)), "gguf", "f32", tmp_path / "out"))
    name = model_folder(layout).name
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.gguf", "Modelfile", "export.json", "manifest.json",
    }  # fmt: skip
    verify_manifest(folder)
    model = open_artifact(model_folder(layout)).model
    again = open_gguf(folder / f"{name}.gguf", model.config.rope_scaling)
    tokens = list(range(40))
    assert torch.equal(read_rows(again, tokens), read_rows(model, tokens)[:, :320])
    replay = record(folder)["replay"]
    assert (replay["largest"], replay["disagreements"]) == (0.0, 0)
    assert replay["tokens"] > 200
    shown = capsys.readouterr().out
    assert "replayed 6 prompts" in shown
    assert "every likeliest token is the same" in shown
    assert ("cut from 256 to the sliding window of 48" in shown) == (layout == "mistral")


def test_rounded_weights_are_near_and_smaller(model_folder, tmp_path, capsys):
    sizes, typical = {}, {}
    for kind in ("f32", "f16", "bf16", "q8_0", "q4_0"):
        folder = export_model(ExportSettings(str(model_folder("qwen3")), "gguf", kind, tmp_path / kind))
        sizes[kind] = (folder / "qwen3.gguf").stat().st_size
        typical[kind] = record(folder)["replay"]["typical"]
        assert ("1 matrix kept in q8_0" in capsys.readouterr().out) == (kind == "q4_0")
    assert sizes["q4_0"] < sizes["q8_0"] < sizes["f16"] == sizes["bf16"] < 0.75 * sizes["f32"]
    assert 0 == typical["f32"] < typical["f16"] < typical["bf16"] < typical["q8_0"] < typical["q4_0"]


def test_the_command(model_folder, tmp_path, monkeypatch, capsys):
    """With the defaults: float16, a folder below exports/; again, and the folder is replaced."""
    shutil.copytree(model_folder("qwen3"), tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert cli.main(["export", "small", "--to", "gguf"]) == 0
        assert "wrote exports/small-gguf-f16" in capsys.readouterr().out
    facts = record(tmp_path / "exports" / "small-gguf-f16")
    assert (facts["to"], facts["type"], facts["model"]) == ("gguf", "f16", "small")
    assert facts["digest"] == open_artifact("small").digest
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["small-gguf-f16"]


@pytest.mark.parametrize(("stage", "template"), [("pretrain", False), ("finetune", True)])
def test_a_pretrained_run_gets_no_chat_template(stage, template, model_folder, tmp_path):
    run = tmp_path / "base"
    shutil.copytree(model_folder("qwen3"), run / "model")
    (run / "run.json").write_text(json.dumps({"stage": stage, "status": "running"}))
    folder = export_model(ExportSettings(str(run), "gguf", "f16", tmp_path / "out"))
    assert ("im_start" in (folder / "Modelfile").read_text()) == template
    assert (folder / "base.gguf").exists()


def test_refusals_of_the_command(model_folder, tmp_path, capsys):
    model, out = model_folder("qwen3"), tmp_path / "out"
    assert "choose one of gguf, onnx, int8, int4" in refused(
        capsys, "export", model, "--to", "h5", "--out", out
    )
    assert "--to" in refused(capsys, "export", model, "--out", out)
    assert "q8_0" in refused(capsys, "export", model, "--to", "gguf", "--type", "int8", "--out", out)
    assert "--limit" in refused(capsys, "export", model, "--to", "gguf", "--limit", "far", "--out", out)
    assert "--limit" in refused(capsys, "export", model, "--to", "gguf", "--limit", "-1", "--out", out)
    assert "no such model" in refused(capsys, "export", tmp_path / "none", "--to", "gguf", "--out", out)
    assert "MODEL" in refused(capsys, "export", "--to", "gguf")
    assert "unexpected" in refused(capsys, "export", model, "--to", "gguf", "--overwrite")
    assert not any(tmp_path.iterdir())


def test_what_is_in_the_way_stays(model_folder, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    message = refused(capsys, "export", model_folder("qwen3"), "--to", "gguf", "--out", tmp_path / "mine")
    assert "something else is there" in message
    (tmp_path / "file").write_text("x")
    refused(capsys, "export", model_folder("qwen3"), "--to", "gguf", "--out", tmp_path / "file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "thesis.txt"]
    made = export_model(ExportSettings(str(model_folder("qwen3")), "gguf", "f16", tmp_path / "made"))
    (made / "notes.txt").write_text("mine")
    refused(capsys, "export", model_folder("qwen3"), "--to", "gguf", "--out", made)
    assert (made / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert (
        cli.main(["export", str(model_folder("qwen3")), "--to", "gguf", "--out", str(tmp_path / "empty")])
        == 0
    )


def test_over_the_limit_nothing_is_left_and_the_old_stays(model_folder, tmp_path, capsys):
    model, out = model_folder("llama"), tmp_path / "out"
    words = ["export", model, "--to", "gguf", "--out", out]
    message = refused(capsys, *words, "--type", "q4_0", "--limit", "0.001")
    assert "differs from the model" in message
    assert "first differing token" in message
    assert not any(tmp_path.iterdir())
    assert cli.main([str(word) for word in [*words, "--type", "f32"]]) == 0
    before = record(out)
    refused(capsys, *words, "--type", "q4_0", "--limit", "0.001")
    assert record(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_wrong_layout_is_caught_by_the_replay(model_folder, tmp_path, monkeypatch):
    """Query heads that are not turned back: the file is whole, and says something else."""
    turned = export.open_gguf

    def spoiled(path, scaling):
        model = turned(path, scaling)
        with torch.no_grad():
            weight = model.layers[1].attention.query.weight
            weight.copy_(weight.flip(0))
        return model

    monkeypatch.setattr(export, "open_gguf", spoiled)
    with pytest.raises(InputError, match="differs from the model"):
        export_model(ExportSettings(str(model_folder("llama")), "gguf", "f16", tmp_path / "out"))
    assert not any(tmp_path.iterdir())


def test_no_space_left(model_folder, tmp_path, monkeypatch, capsys):
    """Too little at the start; and a disk that fills while the file is written (a limit on the size of files)."""
    words = ["export", model_folder("qwen3"), "--to", "gguf", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr("glasshouse.files.free_bytes", lambda path: 1000)
        assert "not enough disk" in refused(capsys, *words)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        message = refused(capsys, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write" in message
    assert not any(tmp_path.iterdir())


def test_the_extra_is_named_when_it_is_missing(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = refused(capsys, "export", model_folder("qwen3"), "--to", "gguf", "--out", tmp_path / "out")
    assert 'pip install ".[export]"' in message
    assert not any(tmp_path.iterdir())


def test_a_short_context_is_enough(tokenizer, tmp_path):
    """Prompts are cut to what the model reads."""
    from glasshouse.artifact import save_artifact
    from glasshouse.models.decoder import Decoder, DecoderConfig, initialize

    model = Decoder(DecoderConfig(320, 32, 1, 2, 1, 16, 32, 8)).eval()
    initialize(model, 0)
    save_artifact(tmp_path / "model", model, tokenizer)
    folder = export_model(ExportSettings(str(tmp_path / "model"), "gguf", "f32", tmp_path / "out"))
    assert record(folder)["replay"]["prompts"] == 6
    assert record(folder)["replay"]["tokens"] <= 48


@pytest.mark.parametrize("name", ["modernbert", "bert"])
def test_an_encoder_makes_vectors(name, model_folder, tmp_path, capsys):
    folder = export_model(ExportSettings(str(model_folder(name)), "gguf", "f32", tmp_path / "out"))
    assert {path.name for path in folder.iterdir()} == {f"{name}.gguf", "export.json", "manifest.json"}
    replay = record(folder)["replay"]
    assert (replay["largest"], replay["divergence"]) == (0.0, None)
    shown = capsys.readouterr().out
    assert "vectors and scores: largest difference 0" in shown
    assert "the head is left out" in shown
    assert ("combining marks" in shown) == (name == "bert")


def test_an_encoder_decoder_has_no_gguf(model_folder, tmp_path, capsys):
    assert "--to onnx" in refused(
        capsys, "export", model_folder("t5"), "--to", "gguf", "--out", tmp_path / "out"
    )
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_that_composes_is_mentioned(model_folder, tmp_path, capsys):
    shutil.copytree(model_folder("qwen3"), tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    path = tmp_path / "model" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    export_model(ExportSettings(str(tmp_path / "model"), "gguf", "f16", tmp_path / "out"))
    assert "(NFC)" in capsys.readouterr().out


# ---- weights of few bits


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_folder_of_few_bits(kind, model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", str(model_folder("qwen3")), "--to", kind, "--out", str(out)]) == 0
    assert "through the folder as opened again" in capsys.readouterr().out
    artifact = open_artifact(out)  # the manifest holds, with the record in it
    assert artifact.verified
    assert record(out)["type"] == kind
    assert 0 < record(out)["replay"]["typical"] < (0.2 if kind == "int8" else 1.0)
    source = open_artifact(model_folder("qwen3")).model
    weights = (out / "model.safetensors").stat().st_size
    assert weights < 0.8 * (model_folder("qwen3") / "model.safetensors").stat().st_size
    tokens = list(range(30))
    assert not torch.equal(read_rows(artifact.model, tokens), read_rows(source, tokens))
    for to in ("gguf", "onnx", "int8"):
        message = refused(capsys, "export", out, "--to", to, "--out", tmp_path / "again")
        assert "few bits already" in message
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- ONNX


def test_onnx(model_folder, tmp_path, capsys, monkeypatch):
    """Replayed through onnxruntime, with the files that tokenize beside it; over the limit, nothing is left."""
    model, out = model_folder("mistral of one layer"), tmp_path / "out"
    assert cli.main(["export", str(model), "--to", "onnx", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "through onnxruntime" in shown.out
    assert "every likeliest token is the same" in shown.out
    assert shown.err == ""
    verify_manifest(out)
    names = {path.name for path in out.iterdir()}
    assert names == {"model.onnx", "export.json", "manifest.json", *export.BESIDE}
    assert record(out)["replay"]["largest"] < 1e-4
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()

    monkeypatch.setattr(export, "save_graphs", lambda folder, model: shutil.copy(out / "model.onnx", folder))
    other = model_folder("mistral")
    message = refused(capsys, "export", other, "--to", "onnx", "--out", tmp_path / "other")
    assert "onnx" in message
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("library", ["onnx", "onnxscript"])
def test_onnx_needs_its_libraries(library, model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    message = refused(capsys, "export", model_folder("gpt2"), "--to", "onnx", "--out", tmp_path / "out")
    assert f"{library} is needed" in message
    assert "q8_0" not in message
    assert "f32" in refused(capsys, "export", model_folder("gpt2"), "--to", "onnx", "--type", "q8_0")
    assert not any(tmp_path.iterdir())
