"""The decoder and its attention: causal to the bit, blind across documents, the same by every path, open to taps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from glasshouse.models import attention
from glasshouse.models.attention import Mask, additive, attend
from glasshouse.models.decoder import Decoder, DecoderConfig, initialize

CONFIG = DecoderConfig(60, 32, 2, 4, 2, 8, 48, 400)
VARIANTS = {
    "qwen3": CONFIG,
    "llama": replace(CONFIG, query_key_norm=False, tie_embeddings=False),
    "window": replace(CONFIG, sliding_window=5),
    "gpt2": replace(
        CONFIG,
        position="learned",
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        bias="all",
        query_key_norm=False,
        num_key_value_heads=4,
    ),
}


def random_decoder(config: DecoderConfig, seed: int = 0) -> Decoder:
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(60, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("trained", [False, True], ids=["fused", "explicit"])
@pytest.mark.parametrize("name", VARIANTS)
def test_changing_a_token_leaves_earlier_logits_bit_equal(name: str, trained: bool) -> None:
    model, tokens = random_decoder(VARIANTS[name]), random_tokens(2, 300)
    changed = tokens.clone()
    changed[:, 200] = (changed[:, 200] + 1) % 60
    with torch.set_grad_enabled(trained):  # with gradients attention is spelled out, in blocks
        before, after = (model.logits(model(some)).detach() for some in (tokens, changed))
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_path_of_attention_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_decoder(VARIANTS[name]), random_tokens(2, 300)
    documents = torch.arange(300).div(70, rounding_mode="floor").expand(2, -1)
    for numbers in (None, documents):
        with torch.no_grad():
            fused = model(tokens, documents=numbers)
            shown = model(tokens, documents=numbers, tap=lambda _, value: value)
        blocks = model(tokens, documents=numbers).detach()
        monkeypatch.setattr(attention, "BLOCK", 1000)
        whole = model(tokens, documents=numbers).detach()
        monkeypatch.setattr(attention, "BLOCK", 7)
        small = model(tokens, documents=numbers).detach()
        for other in (shown, blocks, whole, small):
            torch.testing.assert_close(other, fused, rtol=1e-4, atol=1e-4)


def test_attention_equals_a_plain_loop() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9])
    mask = Mask(True, 4, documents)
    read = attend(query, key, value, additive(mask.seen(9, 9, query.device), query.dtype))
    for row in range(2):
        for head in range(4):
            for place in range(9):
                seen = [
                    other
                    for other in range(max(0, place - 3), place + 1)
                    if documents[row, other] == documents[row, place]
                ]
                scores = (
                    torch.stack([query[row, head, place] @ key[row, head // 2, o] for o in seen]) / 8**0.5
                )
                expected = torch.softmax(scores, 0) @ value[row, head // 2, seen]
                torch.testing.assert_close(read[row, head, place], expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_are_read_like_separate_ones(name: str) -> None:
    model = random_decoder(VARIANTS[name])
    lengths = (17, 140, 3)
    tokens = random_tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = torch.cat([torch.full((length,), n) for n, length in enumerate(lengths)])[None]
    for trained in (False, True):
        with torch.set_grad_enabled(trained):
            packed = model(tokens, positions=positions, documents=documents).detach()
            separate = [model(piece).detach() for piece in tokens.split(lengths, dim=1)]
        torch.testing.assert_close(packed, torch.cat(separate, dim=1), rtol=1e-4, atol=1e-5)
    unmasked = model(tokens, positions=positions).detach()
    assert not torch.allclose(unmasked, packed, atol=1e-2)


def test_a_tap_sees_every_activation_and_its_answer_takes_its_place() -> None:
    model, tokens = random_decoder(CONFIG), random_tokens(2, 12)
    seen: dict[str, Tensor] = {}

    def record(name: str, value: Tensor) -> Tensor:
        assert name not in seen, f"{name} is shown twice"
        seen[name] = value
        return value

    with torch.no_grad():
        plain, shown = model(tokens), model(tokens, tap=record)
    torch.testing.assert_close(plain, shown, rtol=1e-5, atol=1e-5)
    expected = {"embedding", "norm"}
    for layer in range(2):
        expected |= {
            f"layers.{layer}.{part}" for part in ("residual_before", "residual_middle", "residual_after")
        }
        expected |= {
            f"layers.{layer}.attention.{part}"
            for part in ("query", "key", "value", "scores", "pattern", "read", "output")
        }
        expected |= {f"layers.{layer}.feed_forward.{part}" for part in ("hidden", "output")}
    assert set(seen) == expected
    pattern = seen["layers.1.attention.pattern"]
    assert pattern.shape == (2, 4, 12, 12)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 12))
    middle, written = seen["layers.0.residual_middle"], seen["layers.0.feed_forward.output"]
    assert torch.equal(middle + written, seen["layers.0.residual_after"])

    def silence(name: str, value: Tensor) -> Tensor:
        return (
            torch.zeros_like(value) if name.endswith(("attention.output", "feed_forward.output")) else value
        )

    with torch.no_grad():
        silenced = model(tokens, tap=silence)
        torch.testing.assert_close(silenced, model.norm(model.embedding(tokens)))


def test_fresh_weights_follow_from_the_seed_and_start_as_a_shallow_model() -> None:
    first, second, other = Decoder(CONFIG), Decoder(CONFIG), Decoder(CONFIG)
    initialize(first, 3)
    initialize(second, 3)
    initialize(other, 4)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    tokens = random_tokens(1, 5)
    with torch.no_grad():
        torch.testing.assert_close(first(tokens), first.norm(first.embedding(tokens)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch asks for it itself while it compiles
def test_compiled_layers_share_one_compilation_and_train_alike() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    config = replace(CONFIG, num_layers=12)
    model, compiled = random_decoder(config).train(), random_decoder(config).train()
    counter = CompileCounterWithBackend("aot_eager")
    for layer in compiled.layers:
        layer.compile(backend=counter)
    tokens = random_tokens(2, 300)
    for some in (model, compiled):
        some(tokens).square().sum().backward()
    assert counter.frame_count == 1
    for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)
