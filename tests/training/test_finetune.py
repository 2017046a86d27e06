"""The stage on a small base model: it learns the answers alone, resumes exactly, and leaves a whole model behind."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from glasshouse.adapter import open_adapter
from glasshouse.artifact import open_artifact, require_decoder
from glasshouse.config import config_to_dict
from glasshouse.errors import InputError
from glasshouse.inference.engine import Engine
from glasshouse.inference.request import Request
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.models.lora import merged
from glasshouse.run import Run, create_run, open_run
from glasshouse.training.finetune import FinetuneConfig, finetune
from glasshouse.training.pretrain import PretrainConfig, pretrain

COLOURS = {"cat": "grey", "dog": "brown", "bird": "blue", "cow": "white", "child": "pink", "fish": "gold"}


@pytest.fixture(scope="module")
def base(corpus_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model pretrained for a second."""
    folder = tmp_path_factory.mktemp("base") / "run"
    config = PretrainConfig(
        corpus_folder, size="nano", steps=40, batch_tokens=512, threads=1, validations=2, device="cpu"
    )
    run = create_run(folder, "pretrain", {"corpus": str(corpus_folder)}, [corpus_folder])
    pretrain(config, run)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    rows = [
        {"prompt": f"{how} {what}?", "completion": colour}
        for how in ("Colour of the", "Which colour is the", "Say the colour of a")
        for what, colour in COLOURS.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def quick(base: Path, data: Path, **settings: object) -> FinetuneConfig:
    config = FinetuneConfig(
        base, (str(data),), method="lora", steps=30, rows=4, micro_rows=4, validations=3, threads=1, device="cpu",
        dtype="float32", context=64, learning_rate=1e-2,
    )  # fmt: skip
    return replace(config, **settings)  # type: ignore[arg-type]


def start(folder: Path, config: FinetuneConfig) -> Run:
    return create_run(folder, "finetune", config_to_dict(config), [config.model])


def ends_its_turn(folder: Path, question: str) -> bool:
    """Whether the model answers a question and then stops by itself."""
    artifact = open_artifact(folder)
    prompt = artifact.tokenizer.encode_chat([{"role": "user", "content": question}])
    ends = frozenset(np.atleast_1d(artifact.generation["eos_token_id"]).tolist())
    request = Request(tuple(prompt), GenerationConfig(temperature=0, max_new_tokens=16), end_tokens=ends)
    *written, last = Engine(require_decoder(artifact), artifact.tokenizer).stream(request)
    return bool(written) and last.finish == "end"


@pytest.fixture(scope="module")
def chatty(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has seen conversations, and so needs adapters alone."""
    run = start(
        tmp_path_factory.mktemp("chatty") / "run",
        quick(base, data, method="full", steps=60, learning_rate=2e-2),
    )
    finetune(quick(base, data, method="full", steps=60, learning_rate=2e-2), run)
    return run.path


@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
def test_each_method_learns_and_leaves_a_whole_model(
    base: Path, data: Path, tmp_path: Path, method: str
) -> None:
    config = quick(base, data, method=method, steps=60, learning_rate=2e-2)
    run = start(tmp_path / "run", config)
    finetune(config, run)
    losses = [record["loss"] for record in run.metrics() if "loss" in record]
    assert losses[-1] < 0.6 * losses[0]
    facts = run.read()
    assert facts["status"] == "finished"
    assert facts["parents"][0]["digest"] == open_run(base).digest()
    assert "eos_token_id" in open_artifact(run.path).generation


def test_a_model_learns_to_end_its_turn(base: Path, chatty: Path) -> None:
    assert all(ends_its_turn(chatty, f"Colour of the {what}?") for what in COLOURS)
    assert not ends_its_turn(base, "Colour of the cat?")


def test_the_merged_model_is_the_base_with_the_adapter(chatty: Path, data: Path, tmp_path: Path) -> None:
    config = quick(chatty, data)
    run = start(tmp_path / "run", config)
    finetune(config, run)
    whole = require_decoder(open_artifact(run.path, dtype=torch.float32))
    model = require_decoder(open_artifact(chatty, dtype=torch.float32))
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model.logits(model(tokens))
        open_adapter(run.path / "adapter", model)
        adapted = model.logits(model(tokens))
        assert torch.allclose(whole.logits(whole(tokens)), adapted, atol=1e-4)
        assert torch.allclose(merged(model).logits(merged(model)(tokens)), adapted, atol=1e-4)
        assert not torch.allclose(plain, adapted, atol=1e-2)


@pytest.mark.parametrize("seen", [True, False])
def test_only_what_is_meant_is_trained(
    base: Path, chatty: Path, data: Path, tmp_path: Path, seen: bool
) -> None:
    """The layers that were asked for, and, in a model that never saw a conversation, the vectors of its special tokens."""
    model = chatty if seen else base
    config = quick(model, data, targets=("attention.query",))
    run = start(tmp_path / "run", config)
    finetune(config, run)
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (model, run.path))
    changed = {name: value != before[name].to(value.dtype) for name, value in after.items()}
    layers = {name for name, where in changed.items() if where.any()} - {"model.embed_tokens.weight"}
    assert layers == {f"model.layers.{number}.self_attn.q_proj.weight" for number in range(2)}
    rows = changed["model.embed_tokens.weight"].any(dim=1).nonzero().flatten().tolist()
    special = open_artifact(model).tokenizer.special
    assert rows == ([] if seen else sorted(special[name] for name in ("<|im_start|>", "<|im_end|>")))


def test_what_is_asked_teaches_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    """Other questions of the same number of tokens, same answers: the gradient of a question's own words is not there."""
    from glasshouse.text.examples import ExampleCounts, read_examples
    from glasshouse.text.supervision import Lessons, encode_examples
    from glasshouse.text.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(base / "model")
    lessons = encode_examples(tokenizer, read_examples([data], ExampleCounts()), 64, ExampleCounts())
    batch = Lessons(lessons, 64, tokenizer.pad, 0).batch(0, 2)
    learned = batch.labels[batch.labels != -100]
    words = set(tokenizer.decode(learned.tolist(), keep_special=True).replace("<|im_end|>", " ").split())
    assert words <= set(COLOURS.values())


def program(folder: Path, config: FinetuneConfig) -> subprocess.Popen[str]:
    code = (
        "import sys, json; from pathlib import Path; from glasshouse.run import open_run;"
        "from glasshouse.training.finetune import FinetuneConfig, finetune;"
        "s = json.loads(sys.argv[2]); s.update(model=Path(s['model']), data=tuple(s['data']), targets=tuple(s['targets']));"
        "finetune(FinetuneConfig(**s), open_run(Path(sys.argv[1])))"
    )
    settings = json.dumps({**asdict(config), "model": str(config.model), "data": list(config.data)})
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder), settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_and_resumed_it_ends_with_the_same_weights(base: Path, data: Path, tmp_path: Path) -> None:
    config = quick(base, data, save_minutes=0.0)
    whole = start(tmp_path / "whole", config)
    finetune(config, whole)
    killed = start(tmp_path / "killed", config)
    process = program(killed.path, config)
    while process.poll() is None:
        if (killed.path / "metrics.jsonl").exists() and (killed.path / "metrics.jsonl").read_bytes().count(
            b"loss"
        ) > 7:
            process.kill()
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not killed.read().get("steps")
    process = program(killed.path, config)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    one, other = (load_file(run.model_path / "model.safetensors") for run in (whole, killed))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "magic"}, "unknown method"),
        ({"rank": 0}, "rank is 0"),
        ({"context": 10_000}, "reads at most"),
        ({"targets": ("c_attn",)}, "no linear layer is called 'c_attn'"),
        ({"method": "full", "adapter": Path("x")}, "no place"),
        ({"validation_fraction": 1.5}, "validation_fraction"),
        ({"data": ("missing.jsonl",)}, "no such file"),
        ({"model": Path("nowhere")}, "no such model"),
    ],
)
def test_what_cannot_be_done_is_refused(
    base: Path, data: Path, tmp_path: Path, settings: dict[str, object], said: str
) -> None:
    config = replace(quick(base, data), **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=said):
        finetune(config, start(tmp_path / "run", config))
