"""The encoder-decoder: what sees what, caches, taps, dropout, fresh weights, positions."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from glasshouse.models.encoder_decoder import (
    EncoderDecoder,
    EncoderDecoderConfig,
    initialize_sequences,
    relative_bucket,
    sinusoids,
)

T5 = EncoderDecoderConfig(50, 32, 2, 3, 4, 8, 48, 64, relative_buckets=(8, 20))
MARIAN = EncoderDecoderConfig(
    50, 32, 2, 3, 4, 8, 48, 64, position="sinusoidal", norm="layer", norm_epsilon=1e-5, norm_place="after",
    activation="relu", gated=False, bias="all", embedding_scale=32**0.5, output="tied",
)  # fmt: skip
BART = replace(MARIAN, position="learned", activation="gelu", embedding_scale=1.0)
CONFIGS = {"t5": T5, "t5 scaled": replace(T5, output="scaled"), "marian": MARIAN, "bart": BART}
each_layout = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def made(config: EncoderDecoderConfig) -> EncoderDecoder:
    model = EncoderDecoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm.weight" in name else 0.2 * noise)
    return model.eval()


def ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


class JoinedCache:
    """The plainest cache there is: tensors joined."""

    def __init__(self):
        self.parts: dict[int, tuple[Tensor, Tensor]] = {}
        self.length = 0
        self.layers = 3

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.parts:
            key, value = (
                torch.cat([old, new], 2) for old, new in zip(self.parts[layer], (key, value), strict=True)
            )
        self.parts[layer] = key, value
        if layer == self.layers - 1:
            self.length = key.shape[2]
        return key, value


def test_at_most_twenty_fields():
    assert len(fields(EncoderDecoderConfig)) <= 20


@each_layout
@torch.no_grad()
def test_what_stands_at_padding_changes_nothing_bit_for_bit(config):
    model, sources, targets = made(config), ids(1, 3, 12), ids(2, 3, 7)
    mask = torch.arange(12)[None] < torch.tensor([[12], [8], [3]])
    memory = model.encode(sources, mask)
    other = torch.where(mask, sources, (sources + 17) % 50)
    assert not torch.equal(sources, other)
    again = model.encode(other, mask)
    assert torch.equal(memory[mask], again[mask])
    first = model.logits(model(targets, memory=memory, memory_mask=mask))
    memory = torch.where(mask[..., None], again, torch.full_like(again, 1e3))
    assert torch.equal(first, model.logits(model(targets, memory=memory, memory_mask=mask)))


@each_layout
@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_padded_batch(config):
    model, sources, targets = made(config), ids(1, 2, 12), ids(2, 2, 7)
    mask = torch.arange(12)[None] < torch.tensor([[12], [5]])
    batched = model(targets, memory=model.encode(sources, mask), memory_mask=mask)
    alone = model(targets[1:], memory=model.encode(sources[1:, :5]))
    assert torch.allclose(batched[1:], alone, atol=1e-5)


@each_layout
@torch.no_grad()
def test_the_decoder_sees_no_later_token_and_the_encoder_sees_all(config):
    model, sources, targets = made(config), ids(1, 2, 9), ids(2, 2, 9)
    changed = targets.clone()
    changed[:, 5:] = (changed[:, 5:] + 3) % 50
    memory = model.encode(sources)
    before, after = model(targets, memory=memory), model(changed, memory=memory)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    sources[:, -1] = (sources[:, -1] + 1) % 50
    assert (model.encode(sources)[:, 0] - memory[:, 0]).abs().max() > 1e-4


@each_layout
@pytest.mark.parametrize("cuts", [[1] * 9, [4, 5], [3, 1, 1, 4]])
@torch.no_grad()
def test_cached_is_uncached(config, cuts):
    model, sources, targets = made(config), ids(1, 2, 11), ids(2, 2, 9)
    mask = torch.arange(11)[None] < torch.tensor([[11], [6]])
    memory = model.encode(sources, mask)
    whole = model(targets, memory=memory, memory_mask=mask)
    cache, known = JoinedCache(), model.remember(memory)
    pieces = [model(p, memory=known, memory_mask=mask, cache=cache) for p in targets.split(cuts, dim=1)]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-5)


@each_layout
def test_training_computes_what_reading_does(config):
    """With gradients attention is spelled out, without it is PyTorch's own."""
    model, sources, targets = made(config), ids(1, 2, 11), ids(2, 2, 9)
    mask = torch.arange(11)[None] < torch.tensor([[11], [6]])
    spelled = model(targets, memory=model.encode(sources, mask), memory_mask=mask)
    assert spelled.requires_grad
    with torch.no_grad():
        fused = model(targets, memory=model.encode(sources, mask), memory_mask=mask)
    assert torch.allclose(spelled, fused, atol=1e-5)


@each_layout
@torch.no_grad()
def test_a_tap_sees_every_pattern_and_its_answer_takes_its_place(config):
    model, sources, targets = made(config), ids(1, 1, 5), ids(2, 1, 4)
    seen: dict[str, Tensor] = {}

    def look(name: str, value: Tensor) -> Tensor:
        assert name not in seen
        seen[name] = value
        return value

    plain = model(targets, memory=model.encode(sources))
    tapped = model(targets, memory=model.encode(sources, tap=look), tap=look)
    assert torch.allclose(plain, tapped, atol=1e-5)
    for layer in range(3):
        cross = seen[f"decoder.layers.{layer}.cross_attention.pattern"]
        assert cross.shape == (1, 4, 4, 5)
        assert torch.allclose(cross.sum(-1), torch.ones(1, 4, 4))
        own = seen[f"decoder.layers.{layer}.attention.pattern"]
        assert (own.triu(1) == 0).all()
        assert torch.allclose(own.sum(-1), torch.ones(1, 4, 4))
    assert seen["encoder.layers.1.attention.pattern"].shape == (1, 4, 5, 5)
    assert "encoder.layers.0.cross_attention.pattern" not in seen

    def silence(name: str, value: Tensor) -> Tensor:
        return torch.zeros_like(value) if "cross_attention.output" in name else value

    first, second = (model(targets, memory=model.encode(ids(s, 1, 5)), tap=silence) for s in (3, 4))
    assert torch.equal(first, second)  # nothing of the source comes through


def test_dropout_acts_in_training_only_and_the_seed_decides():
    model, sources, targets = made(replace(MARIAN, dropout=0.3)), ids(1, 2, 8), ids(2, 2, 8)

    def run() -> Tensor:
        torch.manual_seed(5)
        return model(targets, memory=model.encode(sources))

    quiet = run()
    assert torch.equal(quiet, made(MARIAN)(targets, memory=made(MARIAN).encode(sources)))
    model.train()
    assert torch.equal(run(), run())
    assert not torch.allclose(run(), quiet, atol=0.1)


@each_layout
def test_fresh_weights_start_near_the_uniform_guess_and_every_one_learns(config):
    model = EncoderDecoder(config)
    initialize_sequences(model, 1)
    again = EncoderDecoder(config)
    initialize_sequences(again, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    sources, targets, labels = ids(1, 8, 9), ids(2, 8, 9), ids(3, 8, 9)
    if config.norm_place == "before":  # blocks that write nothing have no gradient inside until they write
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("output.weight", "down.weight")):
                    parameter.normal_(0, 0.05)
    logits = model.logits(model(targets, memory=model.encode(sources)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert loss.item() < 2 * math.log(
        50
    )  # a tied head knows the token it was given, which costs a little at first
    loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [
        name for name in silent if "attention.key.bias" not in name
    ]  # softmax ignores a shift of all scores


def test_buckets_are_those_of_the_paper():
    """Raffel et al. 2020: with 32 buckets, distances to 7 exactly each way, then logarithmically to 128."""
    both = relative_bucket(torch.tensor([0, -1, -7, -8, -127, -128, -5000, 1, 7, 5000]), False, 32, 128)
    assert both.tolist() == [0, 1, 7, 8, 15, 15, 15, 17, 23, 31]
    back = relative_bucket(torch.tensor([3, 0, -1, -15, -16, -128, -5000]), True, 32, 128)
    assert back.tolist() == [0, 0, 1, 15, 16, 31, 31]
    steps = relative_bucket(-torch.arange(200), True, 32, 128).diff()
    assert ((steps == 0) | (steps == 1)).all()


def test_sinusoids_are_those_of_the_paper():
    table = sinusoids(torch.arange(10), 6, torch.float32)
    for position in (0, 1, 9):
        for pair in range(3):
            angle = position / 10000 ** (2 * pair / 6)
            assert float(table[position, pair]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(table[position, 3 + pair]) == pytest.approx(math.cos(angle), abs=1e-6)


@each_layout
@torch.no_grad()
def test_order_matters_on_both_sides(config):
    model = made(config)
    sources, targets = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]]), torch.tensor([[5, 6, 7, 8], [6, 5, 7, 8]])
    from_sources = model(targets[:1].expand(2, -1), memory=model.encode(sources))
    assert (from_sources[0, -1] - from_sources[1, -1]).abs().max() > 1e-4
    from_targets = model(targets, memory=model.encode(sources[:1].expand(2, -1)))
    assert (from_targets[0, -1] - from_targets[1, -1]).abs().max() > 1e-4


@each_layout
@pytest.mark.parametrize("length", [1, 4])
@torch.no_grad()
def test_rows_of_one_source_share_what_is_known_of_it(config, length):
    """Three targets for each of two sources: the memory given once for each source, or once for each target."""
    model, sources, targets = made(config), ids(1, 2, 11), ids(2, 6, length)
    mask = torch.arange(11)[None] < torch.tensor([[11], [6]])
    memory = model.encode(sources, mask)
    shared = model(targets, memory=model.remember(memory), memory_mask=mask)
    memory, mask = memory.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    assert torch.allclose(shared, model(targets, memory=memory, memory_mask=mask), atol=1e-5)
