"""The encoder: who sees whom, what the taps are shown, what another head keeps."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from glasshouse.models.encoder import Encoder, EncoderConfig, HeadConfig, mean_of_tokens, with_head

MODERN = EncoderConfig(60, 32, 5, 4, 48, 64, local_window=3, global_every=2)
BERT = EncoderConfig(60, 32, 3, 4, 48, 64, position="learned", local_window=None, global_every=1, token_types=2,
                     norm_place="after", gated=False, bias="all")  # fmt: skip
CONFIGS = {"modernbert": MODERN, "bert": BERT, "roberta": replace(BERT, position_offset=2, token_types=1)}


def random_encoder(config: EncoderConfig, seed: int = 0) -> Encoder:
    model = Encoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm.weight" in name else 0.2 * noise)
    return model.eval()


def tokens_of(rows: int = 2, length: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


each_layout = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@each_layout
@pytest.mark.parametrize("training", [False, True])
def test_a_token_of_padding_or_of_another_document_changes_nothing(config, training):
    """Bit for bit, on the fused path and on the one that training takes on a CPU."""
    model = random_encoder(config)
    tokens = tokens_of()
    documents = torch.tensor([[0] * 7 + [1] * 9 + [2] * 4, [0] * 12 + [1] * 8])
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 17:] = False
    positions = torch.cat([torch.arange(7), torch.arange(9), torch.arange(4)])[None].expand(2, -1)

    def read(changed: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(training):
            return model(changed, mask=mask, documents=documents, positions=positions).detach()

    before = read(tokens)
    for row, column in ((0, 18), (0, 3), (0, 9), (1, 15)):
        changed = tokens.clone()
        changed[row, column] = (changed[row, column] + 1) % 60
        after = read(changed)
        same = (documents == documents[row, column]) & (torch.arange(2) == row)[:, None]
        same &= mask == mask[row, column]
        assert torch.equal(before[~same], after[~same])
        assert not torch.equal(before[row, column], after[row, column])
        if config.local_window is None and mask[row, column]:  # every token of its document sees it
            assert (before != after).any(-1)[same].all()


@each_layout
def test_packed_documents_are_read_as_each_by_itself(config):
    model = random_encoder(config)
    tokens, lengths = tokens_of(1, 20), [7, 9, 4]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = model(tokens, documents=documents, positions=positions)
        alone = torch.cat([model(piece) for piece in tokens.split(lengths, dim=1)], dim=1)
        leaking = model(tokens, positions=positions)
    assert (packed - alone).abs().max() < 1e-5
    assert (leaking - alone).abs().max() > 1e-2


def test_local_layers_see_as_far_to_either_side_and_no_further():
    patterns = {}

    def look(name: str, value: torch.Tensor) -> torch.Tensor:
        patterns[name] = value
        return value

    model = random_encoder(MODERN)
    with torch.no_grad():
        model(tokens_of(), tap=look)
    distance = (torch.arange(20)[:, None] - torch.arange(20)[None]).abs()
    for layer in range(5):
        pattern = patterns[f"layers.{layer}.attention.pattern"]
        assert torch.allclose(pattern.sum(-1), torch.ones(()))
        near = distance <= 3 if layer % 2 else distance < 99
        assert ((pattern > 0) == near).all()


@each_layout
def test_attention_equals_a_plain_loop(config):
    """The first layer, spelled out position by position from its weights."""
    config = replace(config, position="learned" if config.position == "learned" else "rotary")
    model = random_encoder(config)
    tokens, seen = tokens_of(1, 6), {}
    with torch.no_grad():
        model(tokens, tap=lambda name, value: seen.setdefault(name, value))
    prefix = "layers.0.attention."
    query, key, value = (seen[prefix + name][0] for name in ("query", "key", "value"))
    for head in range(4):
        for here in range(6):
            scores = torch.stack([query[head, here] @ key[head, there] / 8**0.5 for there in range(6)])
            weights = scores.exp() / scores.exp().sum()
            expected = sum(weights[there] * value[head, there] for there in range(6))
            found = seen[prefix + "read"][0, here, head * 8 : head * 8 + 8]
            assert (found - expected).abs().max() < 1e-5


@each_layout
def test_a_tap_sees_every_activation_and_its_answer_takes_its_place(config):
    model, tokens, names = random_encoder(config), tokens_of(), []

    def note(name: str, value: torch.Tensor) -> torch.Tensor:
        names.append(name)
        return value

    with torch.no_grad():
        plain = model(tokens)
        assert (model(tokens, tap=note) - plain).abs().max() < 1e-5
        for name in names:

            def silence(other: str, value: torch.Tensor, chosen: str = name) -> torch.Tensor:
                return torch.zeros_like(value) if other == chosen else value

            assert not torch.allclose(model(tokens, tap=silence), plain, atol=1e-4), name
    expected = {"embedding"} | ({"norm"} if config.norm_place == "before" else set())
    for layer in range(config.num_layers):
        parts = [
            "residual_before",
            "residual_middle",
            "residual_after",
            "feed_forward.hidden",
            "feed_forward.output",
        ]
        parts += [
            f"attention.{part}" for part in ("query", "key", "value", "scores", "pattern", "read", "output")
        ]
        expected |= {f"layers.{layer}.{part}" for part in parts}
    assert set(names) == expected
    assert len(names) == len(expected)


def test_the_order_of_tokens_matters_and_parts_of_a_text_differ():
    for config in CONFIGS.values():
        model, tokens = random_encoder(config), tokens_of(1, 8)
        with torch.no_grad():
            turned = model(tokens.flip(1)).flip(1)
            assert not torch.allclose(model(tokens), turned, atol=1e-3)
    model = random_encoder(BERT)
    with torch.no_grad():
        first, second = model(tokens), model(tokens, token_types=torch.ones_like(tokens))
        assert torch.equal(first, model(tokens, token_types=torch.zeros_like(tokens)))
    assert not torch.allclose(first, second, atol=1e-3)


def test_shapes_of_the_heads_and_the_mean_without_padding():
    labels = ("no", "yes", "perhaps")
    tokens, mask = tokens_of(), torch.ones(2, 20, dtype=torch.bool)
    mask[1, 11:] = False
    shapes = {
        "masked": (2, 20, 60),
        "sequence": (2, 3),
        "token": (2, 20, 3),
        "span": (2, 20, 2),
        "none": (2, 20, 32),
    }
    for layout in (MODERN, BERT):
        for kind, shape in shapes.items():
            named = labels if kind in ("sequence", "token") else ()
            model = random_encoder(replace(layout, head=HeadConfig(kind, named)))
            with torch.no_grad():
                assert model.logits(model(tokens, mask=mask), mask).shape == shape
    hidden = torch.randn(2, 20, 32)
    expected = torch.stack([hidden[0].mean(0), hidden[1, :11].mean(0)])
    assert torch.allclose(mean_of_tokens(hidden, mask), expected, atol=1e-6)
    assert torch.allclose(mean_of_tokens(hidden, None), hidden.mean(1))
    averaging = random_encoder(replace(MODERN, head=HeadConfig("sequence", labels, "mean")))
    with torch.no_grad():
        both = averaging.logits(hidden, mask)
        alone = averaging.logits(hidden[1:, :11])
    assert torch.allclose(both[1:], alone, atol=1e-5)


def test_another_head_shares_the_body_and_keeps_what_means_the_same():
    base = random_encoder(MODERN)
    new = HeadConfig("sequence", ("no", "yes"))
    changed = with_head(base, new, seed=3)
    assert changed.config == replace(MODERN, head=new)
    assert changed.embedding.weight.data_ptr() == base.embedding.weight.data_ptr()
    assert torch.equal(changed.head.dense.weight, base.head.dense.weight)
    assert changed.head.bias is None
    assert 0.01 < changed.head.output.weight.std() < 0.03
    assert not changed.head.output.bias.any()
    assert torch.equal(changed.head.output.weight, with_head(base, new, seed=3).head.output.weight)
    assert not torch.equal(changed.head.output.weight, with_head(base, new, seed=4).head.output.weight)
    assert with_head(base, base.config.head, seed=3) is base
    tokens = tokens_of()
    with torch.no_grad():
        assert torch.equal(changed(tokens), base(tokens))
        assert functional.softmax(changed.logits(changed(tokens)), -1).shape == (2, 2)

    masked, pooled = random_encoder(BERT), random_encoder(replace(BERT, head=HeadConfig("pooler")))
    fresh, kept = with_head(masked, new, seed=0), with_head(pooled, new, seed=0)
    assert not torch.equal(
        fresh.head.dense.weight, masked.head.dense.weight
    )  # another matrix by the same name
    assert torch.equal(kept.head.dense.weight, pooled.head.dense.weight)


def test_dropout_is_for_training_alone():
    model = random_encoder(replace(MODERN, dropout=0.5))
    tokens = tokens_of()
    with torch.no_grad():
        assert torch.equal(model(tokens), model(tokens))
        model.train()
        assert not torch.equal(model(tokens), model(tokens))
