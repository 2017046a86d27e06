"""What real llama.cpp reads and says is what we read and say, for every layout: a prebuilt one, run by Node.

The package is found in .venv/node, or where GLASSHOUSE_NODE says (`make install` puts it there where npm can).
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from glasshouse.artifact import open_artifact
from glasshouse.export.gguf_decoder import usable_context
from glasshouse.export.gguf_model import save_gguf
from glasshouse.export.replay import read_rows
from glasshouse.inference.engine import generate
from glasshouse.inference.sampling import GenerationConfig

ROOT = Path(__file__).resolve().parent.parent.parent
RUNNER = Path(__file__).with_name("llama.mjs")
AWKWARD = [
    "Привет, мир! Жили-были",
    "猫坐在垫子上。从前有座山",
    "👩‍👩‍👧 🏳️‍🌈 🐈‍⬛",
    "नमस्ते दुनिया",
    "e\u0301 a\u0308 é ö",
    "  two  spaces\t\n\n \r\n x  ",
    "def f(x):\n    return x ** 2  # <|im_end|>\n",
    "12345 3.14159 it's I'LL 2026",
]
PROMPTS = ["The cat sat", "It's 2026", "def cat(", "猫"]
COUNT = 24
LAYOUTS = [
    "qwen3",
    "qwen3 wide",
    "llama",
    "llama scaled",
    "llama linear",
    "llama biased",
    "mistral",
    "qwen2",
    "gpt2",
]
CASES = [(layout, kind) for layout in LAYOUTS for kind in ("f32", "f16")]
CASES += [("llama", "bf16"), ("qwen3", "q8_0"), ("llama", "q8_0"), ("qwen3", "q4_0"), ("gpt2", "q4_0")]
LARGEST = {"f32": 1e-4, "f16": 0.1, "bf16": 0.5}
"""Allowed logit difference; the spread is about 1.7. GPT-2 has its own: llama.cpp rounds GELU to 16 bits."""


def node_folder() -> Path:
    return Path(os.environ.get("GLASSHOUSE_NODE", ROOT / ".venv" / "node"))


@pytest.fixture(scope="module")
def llama_cpp():
    """Runs jobs in one process of llama.cpp."""
    folder = node_folder()
    if not (folder / "node_modules" / "node-llama-cpp").is_dir() or not shutil.which("node"):
        pytest.skip(
            f"no node-llama-cpp in {folder}: npm i --ignore-scripts node-llama-cpp @node-llama-cpp/linux-x64"
        )

    def run(jobs: list[dict]) -> list[dict]:
        done = subprocess.run(
            ["node", RUNNER, folder], input=json.dumps(jobs), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def answers(llama_cpp, model_folder, tokenizer, tmp_path_factory):
    """What llama.cpp says to every case, from one process."""
    jobs = []
    prompts = [tokenizer.prompt(prompt) for prompt in PROMPTS]
    for layout, kind in CASES:
        file = tmp_path_factory.mktemp("gguf") / "model.gguf"
        save_gguf(file, open_artifact(model_folder(layout)), layout, kind)
        job = {
            "file": str(file),
            "texts": AWKWARD,
            "prompts": prompts,
            "count": COUNT,
            "read": texts(tokenizer),
        }
        jobs.append(job)
    return dict(zip(CASES, llama_cpp(jobs), strict=True))


def texts(tokenizer) -> list[list[int]]:
    """Tokens whose logits are compared: the last is 46 long, below the window of 48."""
    return [tokenizer.prompt(text) for text in PROMPTS] + [list(range(100, 146))]


def greedy(model, tokenizer, prompt: list[int]) -> list[int]:
    config = GenerationConfig(temperature=0.0, max_new_tokens=COUNT)
    ends = [tokenizer.special["<|im_end|>"]]
    return [token.id for token in generate(model, tokenizer, prompt, config, end_tokens=ends)]


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_tokenizes_and_spells_alike(layout, kind, answers, tokenizer):
    answer = answers[layout, kind]
    assert answer["tokens"] == [tokenizer.encode(text) for text in AWKWARD]
    assert answer["texts"] == AWKWARD


@pytest.mark.parametrize(("layout", "kind"), [case for case in CASES if not case[1].startswith("q")])
def test_computes_the_same_logits(layout, kind, answers, model_folder, tokenizer):
    model = open_artifact(model_folder(layout), dtype=torch.float32).model
    for tokens, theirs in zip(texts(tokenizer), answers[layout, kind]["logits"], strict=True):
        ours = read_rows(model, tokens)[:, : tokenizer.vocab_size]
        assert ours.std() > 1  # a flat output would agree with anything
        largest = 0.01 if (layout, kind) == ("gpt2", "f32") else LARGEST[kind]
        assert (ours - torch.tensor(theirs)).abs().max() < largest


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writes_the_same_text(layout, answers, model_folder, tokenizer):
    """float32: the same token, every time, up to the end that the model itself writes."""
    model = open_artifact(model_folder(layout), dtype=torch.float32).model
    assert usable_context(model.config) >= len(PROMPTS[1]) + COUNT
    for prompt, theirs in zip(PROMPTS, answers[layout, "f32"]["greedy"], strict=True):
        ours = greedy(model, tokenizer, tokenizer.prompt(prompt))
        ended = ours[-1] in (tokenizer.end_of_document, tokenizer.special["<|im_end|>"])
        assert theirs[: len(ours)] == ours
        assert ended or len(theirs) == len(ours)
    assert len({token for answer in answers[layout, "f32"]["greedy"] for token in answer}) > 8


def test_an_encoder_makes_the_same_vectors(llama_cpp, model_folder, tokenizer, tmp_path):
    """Longer than the window of 4 to either side; llama.cpp rounds GELU to 16 bits."""
    artifact = open_artifact(model_folder("modernbert"))
    save_gguf(tmp_path / "model.gguf", artifact, "modernbert", "f32")
    texts = ["The cat sat on the mat. " * 3, *AWKWARD]
    job = {"file": str(tmp_path / "model.gguf"), "texts": texts, "embed": texts}
    [answer] = llama_cpp([job])
    assert answer["tokens"] == [tokenizer.encode(text) for text in texts]
    for text, vector in zip(texts, answer["vectors"], strict=True):
        theirs, tokens = torch.tensor(vector), tokenizer.prompt(text)
        with torch.no_grad():
            ours = artifact.model(torch.tensor([tokens]))[0].mean(0)
            other = artifact.model(torch.tensor([tokens[1:]]))[0].mean(0)
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9999
        assert torch.cosine_similarity(other, theirs, dim=0) < 0.9999  # without the token that begins a text


def test_bert_reads_the_same_pieces_and_makes_the_same_vectors(llama_cpp, model_folder, wordpiece, tmp_path):
    artifact = open_artifact(model_folder("bert"))
    save_gguf(tmp_path / "model.gguf", artifact, "bert", "f32")
    texts = ["The cat sat on the MAT. " * 3, "It's 2026, café É naïve ä", "猫坐在垫子上。 Привет, мир!",
             "👩‍👩‍👧 xyzzy qqq", "  two\t\n x=return(x) [MASK] "]  # fmt: skip
    [answer] = llama_cpp([{"file": str(tmp_path / "model.gguf"), "texts": texts, "embed": texts}])
    assert answer["tokens"] == [wordpiece.encode(text) for text in texts]
    for text, vector in zip(texts, answer["vectors"], strict=True):
        tokens = [wordpiece.start, *wordpiece.encode(text), wordpiece.end_of_document]
        with torch.no_grad():
            ours = artifact.model(torch.tensor([tokens]))[0].mean(0)
        assert torch.cosine_similarity(ours, torch.tensor(vector), dim=0) > 0.9999


@pytest.mark.parametrize(("layout", "kind"), [case for case in CASES if case[1].startswith("q")])
def test_quantized_files_say_nearly_the_same(layout, kind, answers, model_folder, tokenizer):
    """llama.cpp rounds the activations too: near, not equal. Weights drawn at random suffer most from rounding."""
    model = open_artifact(model_folder(layout), dtype=torch.float32).model
    pairs = zip(texts(tokenizer), answers[layout, kind]["logits"], strict=True)
    ours, theirs = [], []
    for tokens, logits in pairs:
        ours.append(read_rows(model, tokens)[:, : tokenizer.vocab_size])
        theirs.append(torch.tensor(logits))
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    typical = (ours - theirs).square().mean().sqrt() / ours.std()
    print(f"{layout} {kind}: typical difference {typical:.3f} of the spread")
    assert 1e-4 < typical < (0.1 if kind == "q8_0" else 0.7)  # unrelated models are 1.4 apart
