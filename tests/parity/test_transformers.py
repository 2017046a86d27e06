"""What we compute is what transformers computes, for every family on disk, in both directions."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from glasshouse.artifact import open_artifact, save_artifact
from glasshouse.inference.engine import generate
from glasshouse.inference.generate import continue_text
from glasshouse.inference.sampling import GenerationConfig
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.text.tokenizer import Tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TOLERANCE = 1e-4
LENGTHS = (1, 2, 7, 33, 96)  # the window of the sliding models is 8; the scaled rotary model was made for 16
TEXT = [
    "The cat sat on the mat. ",
    "It's 2026: 1234 ünïcödé words, 猫坐在垫子上。\n\n",
    "def cat(x):\n    return x\n",
] * 20

BASE = {"vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
GPT2 = {"vocab_size": 320, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
CASES = {
    "qwen3 tied": ("Qwen3", BASE | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 untied": (
        "Qwen3",
        BASE | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "qwen3 sliding": ("Qwen3", BASE | {"head_dim": 16} | SLIDING),
    "llama tied": ("Llama", BASE | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama untied": ("Llama", BASE | {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama scaled": ("Llama", BASE | {"rope_parameters": LLAMA3}),
    "llama linear": ("Llama", BASE | {"rope_parameters": LINEAR}),
    "llama biased": (
        "Llama",
        BASE | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "mistral": ("Mistral", BASE | {"sliding_window": 8, "head_dim": 16}),
    "mistral without a window": ("Mistral", BASE | {"sliding_window": None}),
    "qwen2": ("Qwen2", BASE),
    "qwen2 sliding": ("Qwen2", BASE | {"tie_word_embeddings": True} | SLIDING),
    "gpt2": ("GPT2", GPT2),
    "gpt2 untied": ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 80}),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Models this small are slowed down by threads that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(TEXT), 300)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter at random, norms and biases too: a norm of ones or a bias of zero hides a forgotten one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name or "ln_" in name else 0.2 * noise)


def theirs(case: str, **changes):
    family, settings = CASES[case]
    config = getattr(transformers, f"{family}Config")(**settings | changes)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family + head)(config).eval()
    randomise(model, seed=1)
    return model


def our_logits(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(tokens))


def their_logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


def assert_same_logits(model: Decoder, reference) -> None:
    generator = torch.Generator().manual_seed(2)
    for length in LENGTHS:
        tokens = torch.randint(0, 320, (2, length), generator=generator)
        expected = their_logits(reference, tokens)
        assert expected.std() > 0.1  # a flat output would agree with anything
        assert (our_logits(model, tokens) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_both_directions(case, tokenizer, tmp_path):
    reference = theirs(case)
    reference.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    artifact = open_artifact(tmp_path / "theirs")
    assert not artifact.verified
    assert_same_logits(artifact.model, reference)

    save_artifact(tmp_path / "ours", artifact.model, tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert_same_logits(artifact.model, again)
    expected_class = "LlamaForCausalLM" if case == "mistral without a window" else type(reference).__name__
    assert type(again).__name__ == expected_class
    assert {name: tuple(value.shape) for name, value in again.state_dict().items()} == {
        name: tuple(value.shape) for name, value in reference.state_dict().items()
    }
    for name, value in again.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name
    assert open_artifact(tmp_path / "ours").config == artifact.config


def test_old_spelling_of_the_config(tokenizer, tmp_path):
    """Files from before transformers 5: torch_dtype, top-level rope_theta, rope_scaling with "type"."""
    reference = theirs("llama linear")
    reference.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    del facts["rope_parameters"]
    facts |= {
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "torch_dtype": facts.pop("dtype"),
    }
    (tmp_path / "config.json").write_text(json.dumps(facts))
    assert_same_logits(open_artifact(tmp_path).model, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_the_same_numbers(dtype, tokenizer, tmp_path):
    theirs("qwen3 tied").to(dtype).save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    artifact = open_artifact(tmp_path / "theirs")
    assert {parameter.dtype for parameter in artifact.model.parameters()} == {dtype}
    save_artifact(tmp_path / "ours", artifact.model, tokenizer)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == dtype
    assert_same_logits(open_artifact(tmp_path / "ours", dtype=torch.float32).model, again.float())


def test_shards_open_in_both_directions(tokenizer, tmp_path):
    reference = theirs("qwen3 untied")
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    tokenizer.save(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    artifact = open_artifact(tmp_path / "theirs")
    assert_same_logits(artifact.model, reference)
    save_artifact(tmp_path / "ours", artifact.model, tokenizer, shard_bytes=60_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert_same_logits(
        artifact.model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    )


def test_native_model_opens_as_their_class(tokenizer, tmp_path):
    """A decoder of ours, never seen by transformers, with weights it drew itself."""
    for query_key_norm, expected in ((True, "Qwen3ForCausalLM"), (False, "LlamaForCausalLM")):
        config = DecoderConfig(320, 48, 2, 4, 2, 16, 80, 128, query_key_norm=query_key_norm, dropout=0.1)
        model = Decoder(config).eval()
        randomise(model, seed=3)
        save_artifact(tmp_path / expected, model, tokenizer)
        reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / expected).eval()
        assert type(reference).__name__ == expected
        assert_same_logits(model, reference)


def test_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    save_artifact(tmp_path, Decoder(DecoderConfig(320, 16, 1, 2, 1, 8, 24, 64)), tokenizer)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = open_artifact(tmp_path).tokenizer
    for text in [
        "",
        " ",
        "The cat sat.",
        "  two  spaces\t\n",
        "naïve café 猫 🐈‍⬛ \u0301",
        "x" * 300,
        "12345 it's",
        *TEXT[:3],
    ]:
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == expected
        assert reference.decode(expected, clean_up_tokenization_spaces=False) == text
    assert len(reference) == ours.vocab_size
    assert reference.eos_token_id == ours.end_of_document
    assert reference.pad_token_id == ours.pad


# ---- generated text


STARTS = range(0, 34, 2)
PROMPTS = [
    text[start : start + 1 + start % 7]
    for text in (TEXT[0] * 3, TEXT[1] * 2, TEXT[2] * 3)
    for start in STARTS
]
PROMPTS = [*PROMPTS[:49], ""]


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A model that learned the three texts for some seconds, so that it says them with conviction."""
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(300, 48, 2, 4, 2, 16, 96, 128))
    ids = torch.tensor(tokenizer.encode("".join(TEXT)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        starts = torch.randint(0, len(ids) - 33, (16,))
        window = torch.stack([ids[start : start + 33] for start in starts])
        logits = model.logits(model(window[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("trained")
    save_artifact(folder, model, tokenizer)
    return folder


def greedy(model: Decoder, tokenizer: Tokenizer, prompt: list[int], count: int) -> list[int]:
    config = GenerationConfig(temperature=0.0, repetition_penalty=1.5, max_new_tokens=count)
    return [token.id for token in generate(model, tokenizer, prompt, config)]


def their_greedy(model, prompt: list[int], count: int, **settings) -> list[int]:
    tokens = torch.tensor([prompt])
    mask = torch.ones_like(tokens)
    found = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=count, **settings)
    return found[0, len(prompt) :].tolist()


def test_greedy_text_of_fifty_prompts(trained):
    artifact = open_artifact(trained, dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(trained).eval()
    reader = transformers.AutoTokenizer.from_pretrained(trained)
    texts = set()
    for prompt in PROMPTS:
        ours = list(continue_text(artifact, prompt, GenerationConfig(temperature=0.0, max_new_tokens=40)))
        ids = reader(prompt)["input_ids"]
        expected = their_greedy(model, ids, 40)
        assert [token.id for token in ours] == expected, prompt
        text = reader.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert "".join(token.text for token in ours) == text
        texts.add(text)
    assert len(PROMPTS) == 50
    assert len(texts) > 15  # not one answer to everything


@pytest.mark.parametrize("case", ["llama scaled", "mistral", "qwen2 sliding", "gpt2"])
def test_greedy_tokens_of_random_models(case, tokenizer, tmp_path):
    """The cache, beyond the sliding window too (40 tokens where it is 8), and the repetition penalty, without which a
    random model says one word for ever."""
    reference = theirs(case, vocab_size=300)
    reference.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    artifact = open_artifact(tmp_path)
    seen = set()
    for prompt in ([5], [5, 200, 17], list(range(100, 130))):
        ours = greedy(artifact.model, artifact.tokenizer, prompt, 40)
        ends = {"eos_token_id": tokenizer.end_of_document, "pad_token_id": tokenizer.pad}
        assert ours == their_greedy(reference, prompt, 40, repetition_penalty=1.5, **ends)
        seen |= set(ours)
    assert len(seen) > 8
