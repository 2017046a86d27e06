"""A model folder comes back bit for bit, or is refused by name; a save that is cut short leaves the old one whole."""

import json
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glasshouse.artifact import open_artifact, save_artifact
from glasshouse.errors import InputError
from glasshouse.files import read_json, sha256_file, verify_manifest, write_json, write_manifest
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.text.tokenizer import Tokenizer, train_tokenizer

SIZES = {"vocab_size": 280, "embedding_dim": 24, "num_layers": 2, "num_heads": 4, "head_dim": 6, "feed_forward_dim": 40,
         "context_length": 32}  # fmt: skip
CONFIGS = {
    "qwen3": DecoderConfig(**SIZES, num_key_value_heads=2, dropout=0.1),
    "qwen3 untied": DecoderConfig(**SIZES, num_key_value_heads=4, tie_embeddings=False, sliding_window=8),
    "llama": DecoderConfig(**SIZES, num_key_value_heads=1, query_key_norm=False, tie_embeddings=False),
    "llama biased": DecoderConfig(**SIZES, num_key_value_heads=2, query_key_norm=False, bias="all"),
    "mistral": DecoderConfig(**SIZES, num_key_value_heads=2, query_key_norm=False, sliding_window=8),
    "qwen2": DecoderConfig(**SIZES, num_key_value_heads=2, query_key_norm=False, bias="query_key_value"),
    "gpt2": DecoderConfig(**SIZES, num_key_value_heads=4, query_key_norm=False, position="learned", norm="layer",
                          bias="all", gated=False, activation="gelu_tanh", dropout=0.1),
}  # fmt: skip

FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", "manifest.json"]  # fmt: skip


def random_model(config: DecoderConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["the cat sat on the mat. "] * 50), 270)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_artifact(folder, random_model(CONFIGS["qwen3"]), tokenizer)
    return folder


@pytest.fixture
def model_folder(saved, tmp_path) -> Path:
    """A whole folder, with its manifest, to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def foreign(model_folder) -> Path:
    """The same as another tool would have written it: without a manifest."""
    (model_folder / "manifest.json").unlink()
    return model_folder


def assert_refused(call, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def same(first: Decoder, second: Decoder) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])
        for name, tensor in ours.items()
    )


def edit(path: Path, **changes) -> None:
    facts = read_json(path) | changes
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not ...}))


# ---- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", CONFIGS)
def test_saved_and_opened_bit_for_bit(family, dtype, tokenizer, tmp_path):
    model = random_model(CONFIGS[family], dtype=dtype)
    digest = save_artifact(tmp_path / "model", model, tokenizer, generation={"temperature": 0.8})
    opened = open_artifact(tmp_path / "model")
    assert same(opened.model, model)
    assert opened.config == opened.model.config == CONFIGS[family]
    assert (opened.digest, opened.verified, opened.path) == (digest, True, tmp_path / "model")
    assert digest == verify_manifest(tmp_path / "model")
    assert opened.generation["temperature"] == 0.8
    assert not opened.model.training
    assert opened.tokenizer.encode("the cat") == tokenizer.encode("the cat")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        model.eval()
        assert torch.equal(opened.model.logits(opened.model(tokens)), model.logits(model(tokens)))


def test_the_files(saved, tokenizer):
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    with safe_open(saved / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
    ids = {"bos_token_id": tokenizer.end_of_document, "eos_token_id": tokenizer.end_of_document,
           "pad_token_id": tokenizer.pad}  # fmt: skip
    assert read_json(saved / "generation_config.json") == ids
    assert ids.items() <= read_json(saved / "config.json").items()


def test_the_same_model_has_the_same_digest(saved, tokenizer, tmp_path):
    first = save_artifact(tmp_path / "a", random_model(CONFIGS["qwen3"]), tokenizer)
    assert first == open_artifact(saved).digest
    assert save_artifact(tmp_path / "a", random_model(CONFIGS["qwen3"], seed=1), tokenizer) != first


def test_generation_settings_override_the_tokenizers_ids(saved, tokenizer, tmp_path):
    save_artifact(
        tmp_path, random_model(CONFIGS["qwen3"]), tokenizer, generation={"eos_token_id": [3, 4], "top_p": 0.9}
    )
    assert open_artifact(tmp_path).generation["eos_token_id"] == [3, 4]
    assert read_json(tmp_path / "config.json")["eos_token_id"] == [3, 4]
    assert "top_p" not in read_json(tmp_path / "config.json")


def test_dtype_and_device(saved):
    opened = open_artifact(saved, dtype=torch.bfloat16, device="cpu")
    expected = random_model(CONFIGS["qwen3"]).bfloat16()
    assert same(opened.model, expected)
    meta = open_artifact(saved, device="meta")
    assert {parameter.device.type for parameter in meta.model.parameters()} == {"meta"}


@pytest.mark.gpu
def test_opened_on_a_gpu(saved):
    opened = open_artifact(saved, device="cuda")
    assert same(opened.model.cpu(), random_model(CONFIGS["qwen3"]))


def test_training_an_opened_model_leaves_the_file_alone(model_folder, tokenizer):
    opened = open_artifact(model_folder)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in opened.model.parameters())
    with torch.no_grad():
        for parameter in opened.model.parameters():
            parameter.add_(1.0)
    verify_manifest(model_folder)
    save_artifact(
        model_folder, opened.model, tokenizer
    )  # over the very file that its weights are mapped from
    assert same(open_artifact(model_folder).model, opened.model)


def test_cut_into_shards(tokenizer, tmp_path):
    model = random_model(CONFIGS["gpt2"])
    save_artifact(tmp_path, model, tokenizer, shard_bytes=8000)
    index = read_json(tmp_path / "model.safetensors.index.json")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    for shard in shards:
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / shard).values()) <= max(8000, 3 * largest)
    assert same(open_artifact(tmp_path).model, model)


def test_a_folder_that_another_tool_wrote(foreign):
    opened = open_artifact(foreign)
    assert same(opened.model, random_model(CONFIGS["qwen3"]))
    assert not opened.verified
    assert len(opened.digest) == 64
    again = open_artifact(foreign, verify=False)
    assert (again.verified, again.digest) == (False, "")
    (foreign / "README.md").write_text("not part of the model")
    assert open_artifact(foreign).digest == opened.digest
    edit(foreign / "config.json", rms_norm_eps=1e-5)
    assert open_artifact(foreign).digest != opened.digest


def test_old_names_and_constants_are_read(foreign):
    """Files without the prefix, with stored frequencies, and with the tied head written a second time."""
    weights = load_file(foreign / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    renamed["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    renamed["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(renamed, foreign / "model.safetensors")
    assert same(open_artifact(foreign).model, random_model(CONFIGS["qwen3"]))
    renamed["lm_head.weight"][3, 3] += 1
    save_file(renamed, foreign / "model.safetensors")
    assert_refused(
        lambda: open_artifact(foreign),
        "ties lm_head.weight to model.embed_tokens.weight",
        "tie_word_embeddings",
    )


# ---- runs


def test_a_finished_run_names_the_digest_of_its_model(model_folder):
    run = model_folder.parent
    digest = sha256_file(model_folder / "manifest.json")
    write_json(run / "run.json", {"status": "finished", "digest": digest})
    opened = open_artifact(run)
    assert (opened.digest, opened.verified, opened.path) == (digest, True, model_folder)
    edit(model_folder / "config.json", rms_norm_eps=1e-5)
    write_manifest(model_folder)  # altered, and the manifest forged to match
    assert_refused(lambda: open_artifact(run), "not the one its run recorded")
    assert_refused(lambda: open_artifact(run, verify=False), "not the one its run recorded")
    (model_folder / "manifest.json").unlink()
    assert_refused(lambda: open_artifact(run), "manifest is missing", "manifest.json")


def test_an_unfinished_run_is_opened_by_its_manifest_alone(model_folder):
    write_json(model_folder.parent / "run.json", {"status": "running", "digest": "of something older"})
    assert open_artifact(model_folder.parent).verified


def test_runs_that_hold_no_model(model_folder):
    run = model_folder.parent
    write_json(run / "run.json", {"status": "finished"})
    assert_refused(lambda: open_artifact(run), "names no digest", "run.json")
    shutil.rmtree(model_folder)
    assert_refused(lambda: open_artifact(run), "holds no model", str(run))
    (run / "run.json").write_text("{")
    assert_refused(lambda: open_artifact(run), "not valid JSON", "run.json")


# ---- what is no model


def test_nothing_there(tmp_path):
    assert_refused(lambda: open_artifact(tmp_path / "none"), "no such model", "none")
    (tmp_path / "file").write_text("x")
    assert_refused(lambda: open_artifact(tmp_path / "file"), "not a folder")
    assert_refused(lambda: open_artifact(tmp_path), "no weights here")


def test_a_name_is_fetched_only_when_asked_for(monkeypatch, foreign):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def fetch(repository, revision, allow_patterns):
        asked.append((repository, revision))
        assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in allow_patterns)
        return str(foreign)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert_refused(lambda: open_artifact("owner/name"), "no such model", "hub:OWNER/NAME")
    assert asked == []
    assert same(open_artifact("hub:owner/name").model, random_model(CONFIGS["qwen3"]))
    open_artifact("hub:owner/name@v1.0")
    assert asked == [("owner/name", None), ("owner/name", "v1.0")]


def test_a_name_that_cannot_be_fetched(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(lambda: open_artifact("hub:owner/no-such-model"), "cannot fetch", "owner/no-such-model")
    assert_refused(lambda: open_artifact("hub:a b/../c"), "cannot fetch")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_refused(lambda: open_artifact("hub:owner/name"), "pip install huggingface_hub")


def test_links_of_the_hubs_cache_are_followed_and_no_others(foreign, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(foreign.iterdir())):
        shutil.copy(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    assert same(open_artifact(snapshot).model, random_model(CONFIGS["qwen3"]))
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(foreign / "config.json")
    assert_refused(lambda: open_artifact(snapshot), "link", "config.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "all.pkl"])
def test_pickles_are_refused_and_never_opened(name, foreign, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (foreign / "model.safetensors").unlink()
    (foreign / name).write_bytes(pickle.dumps(Bomb()))
    assert_refused(lambda: open_artifact(foreign), "pickle", name, "safetensors")
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_under_the_name_of_safetensors(foreign):
    torch.save({"a": torch.ones(3)}, foreign / "model.safetensors")
    assert_refused(lambda: open_artifact(foreign), "not a whole safetensors file", "model.safetensors")


# ---- torn and altered folders


@pytest.mark.parametrize("name", FILES)
def test_each_file_torn_flipped_emptied_missing_linked(name, model_folder, tmp_path):
    path = model_folder / name
    original = path.read_bytes()
    flipped = bytearray(original)
    flipped[len(flipped) // 2] ^= 4
    for content in (original[: len(original) // 2], original[:-1], original + b" ", bytes(flipped), b""):
        if name == "manifest.json" and content in (original + b" ", bytes(flipped), original[:-1]):
            continue  # only a run knows what the manifest should be; see the tests of runs
        path.write_bytes(content)
        assert_refused(lambda: open_artifact(model_folder), name)
    path.rename(tmp_path / "elsewhere")
    if name != "manifest.json":
        assert_refused(lambda: open_artifact(model_folder), name)
    path.symlink_to(tmp_path / "elsewhere")
    assert_refused(lambda: open_artifact(model_folder), name, "link")


def test_a_stranger_in_the_folder(model_folder):
    (model_folder / "code.py").write_text("print()")
    assert_refused(lambda: open_artifact(model_folder), "code.py")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_foreign_files_emptied_missing_linked(name, foreign, tmp_path):
    (foreign / name).rename(tmp_path / "elsewhere")
    assert_refused(lambda: open_artifact(foreign), name)
    (foreign / name).symlink_to(tmp_path / "elsewhere")
    assert_refused(lambda: open_artifact(foreign), name, "link")
    (foreign / name).unlink()
    (foreign / name).write_bytes(b"")
    assert_refused(lambda: open_artifact(foreign), name, "empty")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_oversized_files_are_refused_unread(name, foreign):
    with open(foreign / name, "ab") as file:
        file.truncate(2**40)  # sparse: takes no disk, and reading it would take all memory
    assert_refused(lambda: open_artifact(foreign), name, "at most")


def test_an_oversized_index_or_run_is_refused_unread(foreign):
    (foreign / "model.safetensors").unlink()
    with open(foreign / "model.safetensors.index.json", "ab") as file:
        file.truncate(2**40)
    assert_refused(lambda: open_artifact(foreign), "index.json", "at most")
    with open(foreign.parent / "run.json", "ab") as file:
        file.truncate(2**40)
    assert_refused(lambda: open_artifact(foreign.parent), "run.json", "at most")


def test_truncated_weights_are_refused_at_every_length(foreign):
    original = (foreign / "model.safetensors").read_bytes()
    for length in [*range(1, 30), *random.Random(0).sample(range(30, len(original)), 60), len(original) - 1]:
        (foreign / "model.safetensors").write_bytes(original[:length])
        assert_refused(lambda: open_artifact(foreign), "model.safetensors")
    (foreign / "model.safetensors").write_bytes(original + b"\0" * 8)
    assert_refused(lambda: open_artifact(foreign), "model.safetensors")


def test_a_spoilt_header_is_refused_or_harmless(foreign):
    original = (foreign / "model.safetensors").read_bytes()
    header = int.from_bytes(original[:8], "little") + 8
    draw = random.Random(1)
    refused = 0
    for _ in range(300):
        altered = bytearray(original)
        for _ in range(draw.choice([1, 1, 4])):
            altered[draw.randrange(header)] = draw.randrange(256)
        (foreign / "model.safetensors").write_bytes(altered)
        try:
            open_artifact(foreign, verify=False)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
    assert refused > 200
    (foreign / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + original[8:])
    assert_refused(lambda: open_artifact(foreign), "model.safetensors")


# ---- folders that do not fit together


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 2**40}, ["hidden_size"]),
        ({"hidden_size": 32}, ["shape", "the config means"]),
        ({"vocab_size": 300}, ["shape", "model.embed_tokens.weight"]),
        ({"num_hidden_layers": 3, "layer_types": ...}, ["model.layers.2.", "missing"]),
        ({"num_hidden_layers": 1, "layer_types": ...}, ["model.layers.1.", "no place"]),
        ({"tie_word_embeddings": False}, ["lm_head.weight", "missing"]),
        ({"model_type": "llama", "architectures": ...}, ["no place", "_norm.weight"]),
        ({"model_type": "rwkv"}, ["unknown model family", "rwkv", "qwen3"]),
        ({"auto_map": {"AutoModel": "x.Y"}}, ["never run"]),
        ({"num_attention_heads": "4"}, ["num_attention_heads", "config.json"]),
    ],
)
def test_config_and_weights_disagree(changes, words, foreign):
    edit(foreign / "config.json", **changes)
    assert_refused(lambda: open_artifact(foreign), str(foreign), *words)


def test_a_config_that_is_no_object_or_too_deep(foreign):
    for text, word in (
        ("[]", "JSON object"),
        ("[" * 10**5, "not valid JSON"),
        ('{"hidden_size":' * 10**4, "not valid"),
    ):
        (foreign / "config.json").write_text(text)
        assert_refused(lambda: open_artifact(foreign), word, "config.json")


def test_tensors_missing_extra_misshapen_mistyped(foreign):
    path = foreign / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    whole = weights[name]
    spoilt = {
        "missing": {key: tensor for key, tensor in weights.items() if key != name},
        "no place": weights | {"model.layers.0.mlp.up_proj.extra": torch.ones(2)},
        "shape": weights | {name: whole.t().contiguous()},
        "format I8": weights | {name: whole.to(torch.int8)},
        "format F64": weights | {name: whole.double()},
        "format F8": weights | {name: whole.to(torch.float8_e4m3fn)},
    }
    for word, tensors in spoilt.items():
        save_file(tensors, path)
        assert_refused(lambda: open_artifact(foreign), word, "model.safetensors", "up_proj")
    save_file({}, path)
    assert_refused(lambda: open_artifact(foreign), "missing", "model.safetensors")


def test_shards_missing_leaving_doubled_linked(tokenizer, tmp_path):
    folder = tmp_path / "model"
    save_artifact(folder, random_model(CONFIGS["qwen3"]), tokenizer, shard_bytes=8000)
    (folder / "manifest.json").unlink()
    index_path = folder / "model.safetensors.index.json"
    index = read_json(index_path)
    shards = sorted(set(index["weight_map"].values()))
    assert same(open_artifact(folder).model, random_model(CONFIGS["qwen3"]))

    shutil.move(folder / shards[1], tmp_path / shards[1])
    assert_refused(lambda: open_artifact(folder), "missing", shards[1])
    (folder / shards[1]).symlink_to(tmp_path / shards[1])
    assert_refused(lambda: open_artifact(folder), "link", shards[1])
    (folder / shards[1]).unlink()
    for name in (
        f"../{shards[1]}",
        str(tmp_path / shards[1]),
        "a/../../x.safetensors",
        "..",
        "",
        "x.bin",
        ".\\x",
        3,
        None,
    ):
        weight_map = {
            key: name if value == shards[1] else value for key, value in index["weight_map"].items()
        }
        write_json(index_path, {"weight_map": weight_map})
        assert_refused(lambda: open_artifact(folder), "the index names", "index.json")
    for value in ([], {}, {"weight_map": {}}, {"weight_map": "x"}):
        index_path.write_text(json.dumps(value))
        assert_refused(lambda: open_artifact(folder), "index.json")
    write_json(index_path, index)
    shutil.copy(folder / shards[0], folder / shards[1])
    assert_refused(lambda: open_artifact(folder), "twice", shards[1])


def test_a_tokenizer_larger_than_the_embedding(saved, tokenizer, tmp_path):
    small = DecoderConfig(**SIZES | {"vocab_size": 269}, num_key_value_heads=2)
    assert_refused(lambda: save_artifact(tmp_path / "model", random_model(small), tokenizer), "270", "269")
    assert not (tmp_path / "model").exists()
    save_artifact(tmp_path / "model", random_model(CONFIGS["qwen3"]), tokenizer)
    (tmp_path / "model" / "manifest.json").unlink()
    train_tokenizer(
        iter(["the cat sat on the mat. All work and no play makes Jack a dull boy. "] * 9), 290
    ).save(tmp_path / "model")
    assert_refused(lambda: open_artifact(tmp_path / "model"), "290", "280")
