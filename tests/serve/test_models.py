"""Several models in one house: by name, quantized, and one that reads but does not write."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from tests.serve.conftest import CPU, GREETING, Live, running

from glasshouse.artifact import open_artifact, save_artifact
from glasshouse.errors import InputError
from glasshouse.models.encoder import Encoder, EncoderConfig
from glasshouse.serve.models import House, open_models
from glasshouse.text.tokenizer import open_tokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def encoder_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with random weights."""
    tokenizer = open_tokenizer(model_folder)
    model = Encoder(EncoderConfig(tokenizer.vocab_size, 32, 2, 4, 48, 128, local_window=3, global_every=2))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.copy_(1 + 0.3 * noise if "norm.weight" in name else 0.2 * noise)
    folder = tmp_path_factory.mktemp("reader") / "model"
    save_artifact(folder, model.eval(), tokenizer)
    return folder


@pytest.fixture(scope="module")
def two(model_folder: Path, encoder_folder: Path) -> Iterator[Live]:
    with running(model_folder, more=[f"reader={encoder_folder}"]) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/chat/completions", {"messages": HELLO, "stream": True}),
        ("/v1/responses", {"input": "a"}),
    ],
)
def test_a_model_that_only_reads_says_so(two: Live, path: str, fields: dict):
    answer = two.client.post(path, json={"model": "reader", **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_writes_no_text")
    assert "/v1/embeddings" in error["message"]


def test_its_vectors_are_the_encoders(two: Live, encoder_folder: Path):
    answer = two.client.post(
        "/v1/embeddings", json={"model": "reader", "input": ["hello", "a longer text"]}
    ).json()
    artifact = open_artifact(encoder_folder)
    for item, text in zip(answer["data"], ["hello", "a longer text"], strict=True):
        with torch.inference_mode():
            hidden = artifact.model(torch.tensor([artifact.tokenizer.prompt(text)]))[0].mean(0)
        expected = torch.nn.functional.normalize(hidden, dim=0).numpy()
        assert np.array(item["embedding"]) == pytest.approx(expected, abs=1e-5)


def test_both_are_listed_and_answer_by_name(two: Live):
    models = {model["id"]: model for model in two.client.get("/v1/models").json()["data"]}
    assert list(models) == ["chat", "reader"]
    assert models["chat"]["capabilities"] == {
        "generate": True,
        "chat": True,
        "instructed": True,
        "embed": True,
    }
    assert models["reader"]["capabilities"] == {
        "generate": False,
        "chat": False,
        "instructed": True,
        "embed": True,
    }
    assert (
        two.ask("/v1/chat/completions", messages=HELLO, temperature=0)["choices"][0]["message"]["content"]
        == GREETING
    )
    assert two.client.post("/tokenize", json={"prompt": "a"}).json()["error"]["code"] == "missing_model"
    assert 'model="chat"' in two.client.get("/metrics").text


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_model_answers_and_tells_its_price(model_folder: Path, kind: str):
    house = House(open_models([f"chat={model_folder}"], CPU, kind))
    plain = House(open_models([f"chat={model_folder}"], CPU))
    served = house.models["chat"]
    assert f"{kind}: " in served.note
    assert "bits per byte" in served.note
    assert plain.models["chat"].note == ""
    assert served.parameters == plain.models["chat"].parameters > 10_000
    with running(model_folder, quantize=kind) as server:
        answer = server.ask("/v1/chat/completions", messages=HELLO, temperature=0)["choices"][0]
        text = answer["message"]["content"]
        assert text == GREETING if kind == "int8" else text
    with pytest.raises(InputError, match="--quantize"):
        open_models([str(model_folder)], CPU, "int3")


def test_a_run_that_was_pretrained_and_no_more_was_not_taught_to_answer(model_folder: Path, tmp_path: Path):
    """The page begins with free text where its run says so, with a conversation elsewhere."""
    for stage, taught in (("pretrain", False), ("finetune", True)):
        run = tmp_path / stage
        shutil.copytree(model_folder, run / "model")
        (run / "run.json").write_text(json.dumps({"stage": stage, "status": "running"}))
        assert open_models([str(run)], CPU)[stage].instructed is taught


def test_while_loading_nothing_is_answered_but_health(model_folder: Path):
    with running(model_folder, load=False) as server:
        assert server.client.get("/health").status_code == 200
        for method, path in (
            ("GET", "/ready"),
            ("GET", "/v1/models"),
            ("POST", "/v1/completions"),
            ("GET", "/metrics"),
        ):
            answer = server.client.request(method, path)
            assert answer.status_code == 503, path
            assert answer.json()["error"]["code"] == "loading"
            assert int(answer.headers["retry-after"]) > 0
        with pytest.raises(httpx2.HTTPStatusError):
            server.client.get("/").raise_for_status()
