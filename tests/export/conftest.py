"""Small models of every layout, with weights at random, saved once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from glasshouse.artifact import save_artifact
from glasshouse.models.decoder import Decoder, DecoderConfig
from glasshouse.models.encoder import Encoder, EncoderConfig
from glasshouse.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from glasshouse.text.tokenizer import Tokenizer, open_tokenizer, train_tokenizer

TEXT = [
    "The cat sat on the mat. ",
    "It's 2026: 1234 ünïcödé words, 猫坐在垫子上。\n\n",
    "def cat(x):\n    return x\n",
] * 20
SHAPE = {"vocab_size": 324, "embedding_dim": 64, "num_layers": 3, "num_heads": 4, "head_dim": 16,
         "feed_forward_dim": 96, "context_length": 256, "norm_epsilon": 1e-5}  # fmt: skip
PLAIN = SHAPE | {"query_key_norm": False}
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 16}  # fmt: skip
CONFIGS = {
    "qwen3": DecoderConfig(**SHAPE, num_key_value_heads=2),
    "qwen3 wide": DecoderConfig(**SHAPE | {"head_dim": 32}, num_key_value_heads=4, tie_embeddings=False),
    "llama": DecoderConfig(**PLAIN, num_key_value_heads=2, tie_embeddings=False),
    "llama scaled": DecoderConfig(**PLAIN, num_key_value_heads=1, rope_theta=5000.0, rope_scaling=SCALING),
    "llama linear": DecoderConfig(
        **PLAIN, num_key_value_heads=4, rope_scaling={"rope_type": "linear", "factor": 4.0}
    ),
    "llama biased": DecoderConfig(**PLAIN, num_key_value_heads=2, bias="all"),
    "mistral": DecoderConfig(**PLAIN | {"head_dim": 32}, num_key_value_heads=2, sliding_window=48),
    "mistral of one layer": DecoderConfig(
        **PLAIN | {"head_dim": 32, "num_layers": 1}, num_key_value_heads=2, sliding_window=48
    ),
    "qwen2": DecoderConfig(**PLAIN, num_key_value_heads=2, bias="query_key_value"),
    "gpt2": DecoderConfig(**PLAIN, num_key_value_heads=4, position="learned", norm="layer", bias="all",
                          gated=False, activation="gelu_tanh"),
}  # fmt: skip


OTHERS = {
    "modernbert": EncoderConfig(320, 64, 5, 4, 96, 256, local_window=4, global_every=2),
    "bert": EncoderConfig(
        300,
        64,
        3,
        4,
        96,
        128,
        position="learned",
        local_window=None,
        global_every=1,
        token_types=2,
        norm_place="after",
        norm_epsilon=1e-12,
        gated=False,
        bias="all",
    ),
    "t5": EncoderDecoderConfig(320, 32, 1, 1, 2, 16, 48, 128),
}


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    """Every parameter at random, norms and biases too: a norm of ones or a bias of zero hides a forgotten one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = name.endswith("weight") and "norm" in name
            parameter.copy_(1 + 0.3 * noise if scale else 0.2 * noise)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(TEXT), 320)


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory) -> Tokenizer:
    """BERT's: lower case, WordPiece, [CLS] and [SEP]."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    backend.train_from_iterator([*TEXT, *["привет мир cafe naive 12"] * 3], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    folder = tmp_path_factory.mktemp("wordpiece")
    backend.save(str(folder / "tokenizer.json"))
    roles = {f"{name.strip('[]').lower()}_token": name for name in special}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return open_tokenizer(folder)


@pytest.fixture(scope="session")
def configs() -> dict[str, DecoderConfig]:
    return CONFIGS


@pytest.fixture(scope="session")
def model_folder(tokenizer, wordpiece, tmp_path_factory) -> Callable[[str], Path]:
    """Gives the folder of a model of one of `CONFIGS` or `OTHERS`."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            config = CONFIGS.get(name) or OTHERS[name]
            if isinstance(config, DecoderConfig):
                model = Decoder(config).eval()
            else:
                model = (Encoder if isinstance(config, EncoderConfig) else EncoderDecoder)(config).eval()
            randomise(model)
            made[name] = tmp_path_factory.mktemp("models") / name.replace(" ", "-")
            save_artifact(made[name], model, wordpiece if name == "bert" else tokenizer)
        return made[name]

    return folder
