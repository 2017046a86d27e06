"""What onnxruntime computes from the graphs is what we compute, at any number of rows and tokens, in any number of parts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glasshouse.export.onnx_model import save_graphs
from glasshouse.export.onnx_session import ExportedModel, open_session
from glasshouse.export.replay import read_rows
from glasshouse.models.decoder import Decoder
from glasshouse.models.encoder import Encoder, EncoderConfig, HeadConfig
from glasshouse.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

MODERN = EncoderConfig(320, 32, 4, 4, 48, 96, local_window=4, global_every=2)
BERT = EncoderConfig(320, 32, 2, 4, 48, 96, position="learned", local_window=None, global_every=1, token_types=2,
                     norm_place="after", gated=False, bias="all")  # fmt: skip
SEQUENCE = {"vocab_size": 320, "embedding_dim": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
            "head_dim": 8, "feed_forward_dim": 48, "context_length": 96}  # fmt: skip
OTHERS = {
    "modernbert": Encoder(MODERN),
    "modernbert for texts": Encoder(replace(MODERN, head=HeadConfig("sequence", ("a", "b"), "mean"))),
    "bert": Encoder(BERT),
    "bert for texts": Encoder(replace(BERT, head=HeadConfig("sequence", ("a", "b", "c")))),
    "bert without a head": Encoder(replace(BERT, head=HeadConfig("none"))),
    "t5": EncoderDecoder(EncoderDecoderConfig(**SEQUENCE)),
    "marian": EncoderDecoder(
        EncoderDecoderConfig(
            **SEQUENCE, position="sinusoidal", norm="layer", norm_place="after", gated=False, bias="all",
            activation="relu", output="tied",
        )
    ),
}  # fmt: skip
TOLERANCE = 1e-4


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randint(0, 320, shape, generator=torch.Generator().manual_seed(3))


def random(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = name.endswith("weight") and "norm" in name
            parameter.copy_(1 + 0.3 * noise if scale else 0.2 * noise)
    return model.eval()


def check_decoder(model: Decoder, folder: Path) -> None:
    exported = ExportedModel(folder)
    for length, parts in ((1, 1), (2, 2), (7, 1), (33, 5), (100, 2), (60, 60)):
        tokens = tokens_of(length).tolist()
        ours = read_rows(model, tokens)
        assert ours.std() > 1  # a flat output would agree with anything
        assert (exported.decoder_logits(tokens, parts) - ours).abs().max() < TOLERANCE


def test_a_decoder(configs, tmp_path):
    """With a window, which the example that is traced never reaches; weights in a file of their own; several rows."""
    model = random(Decoder(configs["mistral of one layer"]))
    save_graphs(tmp_path, model, external_bytes=0)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert (tmp_path / "model.onnx.data").stat().st_size > 0.9 * 4 * sum(
        p.numel() for p in model.parameters()
    )
    check_decoder(model, tmp_path)
    session = open_session(tmp_path / "model.onnx")
    tokens = tokens_of(3, 9)
    past = {given.name: np.zeros((3, 2, 0, 32), dtype=np.float32) for given in session.get_inputs()[1:]}
    logits, *present = session.run(None, past | {"input_ids": tokens.numpy()})
    with torch.no_grad():
        expected = model.logits(model(tokens))
    assert np.abs(logits - expected.numpy()).max() < TOLERANCE
    assert [given.name for given in session.get_outputs()][:3] == [
        "logits",
        "present.0.key",
        "present.0.value",
    ]
    assert {state.shape for state in present} == {(3, 2, 9, 32)}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mistral", "qwen3", "llama scaled", "llama biased", "qwen2", "gpt2"])
def test_other_decoders(layout, configs, tmp_path):
    model = random(Decoder(configs[layout]))
    save_graphs(tmp_path, model)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    check_decoder(model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_encoders_and_encoder_decoders(name, tmp_path):
    """Padding behind every text changes nothing, in the graph as in the model."""
    model = random(OTHERS[name])
    save_graphs(tmp_path, model)
    exported = ExportedModel(tmp_path)
    for length in (1, 2, 7, 33, 90):
        tokens = tokens_of(length).tolist()
        ours = read_rows(model, tokens)
        assert ours.std() > 0.1
        assert exported.rows(tokens).shape == ours.shape
        assert (exported.rows(tokens) - ours).abs().max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modernbert for texts", "t5"])
def test_rows_of_different_lengths(name, tmp_path):
    """Two texts in one batch, the shorter one padded, say what each says by itself."""
    model = random(OTHERS[name])
    save_graphs(tmp_path, model)
    texts = [tokens_of(12).tolist(), tokens_of(5).tolist()]
    ids = np.array([texts[0], texts[1] + [0] * 7], dtype=np.int64)
    mask = np.array([[1] * 12, [1] * 5 + [0] * 7], dtype=np.int64)
    first = open_session(tmp_path / ("model.onnx" if name != "t5" else "encoder_model.onnx"))
    hidden, *scores = first.run(None, {"input_ids": ids, "attention_mask": mask})
    for row, tokens in enumerate(texts):
        with torch.no_grad():
            given = torch.tensor([tokens])
            expected = model.encode(given) if name == "t5" else model(given)
        assert np.abs(hidden[row, : len(tokens)] - expected[0].numpy()).max() < TOLERANCE
        if scores:
            with torch.no_grad():
                assert np.abs(scores[0][row] - model.logits(expected)[0].numpy()).max() < TOLERANCE
