"""Adapters beside PEFT's: what we save it opens, what it saves we open, and both compute the same."""

from pathlib import Path

import pytest
import torch

from glasshouse.adapter import open_adapter, save_adapter
from glasshouse.artifact import open_artifact
from glasshouse.errors import InputError
from glasshouse.models.decoder import Decoder
from glasshouse.models.lora import AdapterConfig, adapt, adapter_tensors, merged

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # of two libraries that are not ours


def base_folder(folder: Path, family: str = "llama") -> Path:
    """A model folder that transformers made, with a tokenizer of ours."""
    from glasshouse.text.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(iter(["the cat sees the dog and the dog sees the cat " * 20]), 270)
    shape = {
        "vocab_size": 270, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "eos_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=270, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    else:
        config = transformers.LlamaConfig(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def tokens() -> torch.Tensor:
    return torch.randint(266, (2, 10), generator=torch.Generator().manual_seed(1))


def open_model(folder: Path) -> Decoder:
    model = open_artifact(folder).model
    assert isinstance(model, Decoder)
    return model


def disturb(values: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in values:
            value += 0.1 * torch.randn(value.shape, generator=generator)


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_peft_opens_ours(tmp_path: Path, magnitude: bool) -> None:
    folder = base_folder(tmp_path / "base")
    model = open_model(folder)
    config = AdapterConfig(4, 8.0, ("attention.query", "feed_forward.down"), 0.0, magnitude)
    adapt(model, config, 0)
    disturb(list(adapter_tensors(model).values()))
    save_adapter(tmp_path / "adapter", model, config, str(folder))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    with torch.no_grad():
        expected, plain = model.logits(model(tokens())), open_model(folder)
        assert torch.allclose(theirs(tokens()).logits, expected, atol=1e-4)
        assert not torch.allclose(plain.logits(plain(tokens())), expected, atol=1e-2)
        together = theirs.merge_and_unload()(tokens()).logits
        whole = merged(model)
        assert torch.allclose(whole.logits(whole(tokens())), together, atol=1e-4)


@pytest.mark.parametrize("magnitude", [False, True], ids=["lora", "dora"])
def test_ours_opens_peft_s(tmp_path: Path, magnitude: bool) -> None:
    folder = base_folder(tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_dora=magnitude, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(theirs, settings)
    disturb([value for name, value in theirs.named_parameters() if "lora" in name])
    theirs.save_pretrained(tmp_path / "adapter")
    model = open_model(folder)
    assert open_adapter(tmp_path / "adapter", model).rank == 3
    with torch.no_grad():
        assert torch.allclose(model.logits(model(tokens())), theirs.eval()(tokens()).logits, atol=1e-4)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = base_folder(tmp_path / "base")
    model, config = open_model(folder), AdapterConfig(4, targets=("attention.query",))
    adapt(model, config, 0)
    save_adapter(tmp_path / "adapter", model, config, str(folder))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        open_adapter(tmp_path / "adapter", open_model(folder))
    weights.write_bytes(whole)
    open_adapter(tmp_path / "adapter", open_model(folder))
    other = open_model(base_folder(tmp_path / "other", "gpt2"))
    with pytest.raises(InputError, match="no layer"):
        open_adapter(tmp_path / "adapter", other)
    adapt(other, config, 0)
    with pytest.raises(InputError, match="one matrix"):
        save_adapter(tmp_path / "fused", other, config, "base")
    assert not (tmp_path / "fused").exists()
