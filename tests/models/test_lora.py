"""Adapters: they begin as nothing, merge into the same function, and leave the frozen weights alone."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from glasshouse.errors import InputError
from glasshouse.models.decoder import Decoder, DecoderConfig, initialize
from glasshouse.models.layers import QuantizedLinear
from glasshouse.models.lora import (
    Adapted,
    AdapterConfig,
    adapt,
    adapted_layers,
    adapter_tensors,
    load_adapter,
    merged,
    quantize_layers,
    train_rows,
)

CONFIG = DecoderConfig(64, 32, 2, 4, 2, 8, 64, 128)
SETTINGS = {
    "lora": AdapterConfig(rank=4, alpha=8.0),
    "dora": AdapterConfig(rank=4, alpha=8.0, magnitude=True),
    "query and value": AdapterConfig(rank=2, alpha=2.0, targets=("attention.query", "value")),
}
each_kind = pytest.mark.parametrize("kind", SETTINGS)


def decoder(config: DecoderConfig = CONFIG) -> Decoder:
    model = Decoder(config)
    initialize(model, 0)
    for parameter in model.parameters():  # what starts at zero would hide mistakes
        with torch.no_grad():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def tokens() -> Tensor:
    return torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(2))


def disturb(model: Decoder) -> None:
    """Adapters that have learned something."""
    generator = torch.Generator().manual_seed(3)
    for value in adapter_tensors(model).values():
        value += 0.1 * torch.randn(value.shape, generator=generator)


@each_kind
def test_a_fresh_adapter_changes_nothing(kind: str) -> None:
    model = decoder()
    before = model(tokens())
    names = adapt(model, SETTINGS[kind], 0)
    assert len(names) == (14 if kind != "query and value" else 4)
    assert torch.allclose(model(tokens()), before, atol=1e-6)


@each_kind
def test_merged_equals_adapter(kind: str) -> None:
    model = decoder()
    adapt(model, SETTINGS[kind], 0)
    before = model(tokens())
    disturb(model)
    apart = model(tokens())
    assert not torch.allclose(apart, before, atol=1e-2)
    model = merged(model)
    assert not adapted_layers(model)
    assert torch.allclose(model(tokens()), apart, atol=1e-5)
    assert list(model.state_dict()) == list(decoder().state_dict())


def test_dora_is_the_formula_of_its_paper() -> None:
    """m * (W + s B A) / |W + s B A|, row by row."""
    layer = torch.nn.Linear(6, 5)
    adapted = Adapted(layer, AdapterConfig(rank=2, alpha=3.0, magnitude=True))
    with torch.no_grad():
        for parameter in (adapted.down, adapted.up, adapted.magnitude):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    whole = layer.weight + 1.5 * adapted.up @ adapted.down
    whole = adapted.magnitude[:, None] * whole / whole.pow(2).sum(1, keepdim=True).sqrt()
    hidden = torch.randn(3, 6)
    assert torch.allclose(adapted(hidden), hidden @ whole.T + layer.bias, atol=1e-5)


@each_kind
def test_only_the_adapters_learn(kind: str) -> None:
    model = decoder()
    frozen = {name: value.clone() for name, value in model.state_dict().items()}
    adapt(model, SETTINGS[kind], 0)
    disturb(model)
    model.logits(model(tokens())).square().mean().backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == set(adapter_tensors(model))
    for name, value in model.state_dict().items():
        plain = name.replace(".base.", ".")
        assert plain not in frozen or torch.equal(value, frozen[plain])


def test_gradients_through_codes_are_those_through_the_spelled_out_weights() -> None:
    plain = torch.nn.Linear(64, 48)
    quantized = QuantizedLinear.from_linear(plain.weight, plain.bias, 4)
    spelled = torch.nn.Linear(64, 48)
    spelled.weight, spelled.bias = (
        torch.nn.Parameter(quantized.weight.clone()),
        torch.nn.Parameter(plain.bias.detach()),
    )
    config, found = AdapterConfig(rank=4), []
    for base in (quantized, spelled):
        adapted = Adapted(base, config)
        with torch.no_grad():
            for value in (adapted.down, adapted.up):
                value.copy_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
        hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = functional.mse_loss(adapted(hidden), torch.ones(5, 48))
        loss.backward()
        found.append([loss.detach(), hidden.grad, adapted.down.grad, adapted.up.grad])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_codes_stay_the_only_copy_of_the_weights() -> None:
    """The backward pass keeps no spelled-out matrix."""
    quantized = QuantizedLinear.from_linear(torch.randn(256, 256), None, 4)
    adapted, kept = Adapted(quantized, AdapterConfig(rank=2)), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapted(torch.randn(3, 256).requires_grad_()).sum().backward()
    assert max(kept) < 256 * 256


def test_a_quantized_layer_merges_into_a_plain_one() -> None:
    model = decoder()
    quantize_layers(model, 4)
    adapt(model, SETTINGS["lora"], 0)
    disturb(model)
    with torch.enable_grad():
        apart = model(tokens())
    model = merged(model)
    assert torch.allclose(model(tokens()), apart, atol=1e-4)


def test_adapters_move_between_models() -> None:
    one, other = decoder(), decoder()
    for model in (one, other):
        adapt(model, SETTINGS["dora"], 0)
    disturb(one)
    saved = {name: value.clone() for name, value in adapter_tensors(one).items()}
    load_adapter(other, saved)
    assert torch.equal(one(tokens()), other(tokens()))
    saved.pop("layers.0.attention.query.up")
    with pytest.raises(InputError, match=r"layers\.0\.attention\.query\.up is missing"):
        load_adapter(other, saved)
    wrong = copy.deepcopy(adapter_tensors(one)) | {"layers.0.attention.query.up": torch.zeros(3, 3)}
    with pytest.raises(InputError, match=r"\(3, 3\)"):
        load_adapter(other, wrong)


def test_an_unknown_layer_is_named() -> None:
    with pytest.raises(InputError, match=r"attention\.query") as refused:
        adapt(decoder(), AdapterConfig(targets=("c_attn",)), 0)
    assert "c_attn" in str(refused.value)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_some_tokens_learn_and_no_others(tied: bool) -> None:
    model = decoder(replace(CONFIG, tie_embeddings=tied))
    adapt(model, SETTINGS["lora"], 0)
    before = model.embedding.weight.detach().clone()
    train_rows(model, [3, 7])
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0
    )
    given = torch.tensor([[3, 5, 7, 9]])
    model.logits(model(given)).log_softmax(-1)[..., 3].mean().neg().backward()
    optimizer.step()
    changed = (model.embedding.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [3, 7]
