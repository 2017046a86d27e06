"""Predictions against what is counted independently, and requests that contradict themselves."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glasshouse.device import Device
from glasshouse.errors import InputError
from glasshouse.models.decoder import Decoder
from glasshouse.training import plan
from glasshouse.training.objectives import TokenBatch, next_token
from glasshouse.training.optimization import MasterOptimizer, OptimizationConfig
from glasshouse.training.plan import (
    SIZES,
    ShapeRequest,
    decoder_shape,
    flops_per_token,
    model_memory,
    parameter_count,
    predict,
    requested_size,
    settle,
)

CPU = Device("cpu", "float32", 0, 1)
FAST = OptimizationConfig()


@pytest.fixture
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes two seconds, or one when compiled."""
    monkeypatch.setattr(plan, "measure_step", lambda shape, how, device, compiled: 1.0 if compiled else 2.0)


def test_operations_are_those_that_pytorch_counts() -> None:
    config = decoder_shape(SIZES["nano"], 400)
    model = Decoder(config)
    tokens = torch.randint(400, (2, 64))
    with FlopCounterMode(display=False) as counter:
        logits = model.logits(model(tokens))
        logits.sum().backward()
    counted = counter.get_total_flops() / tokens.numel()
    # PyTorch counts whole squares of attention, we the causal half; norms and the like are in neither
    causal_half = 6.0 * config.num_layers * config.embedding_dim * 64
    assert flops_per_token(config, 64) + causal_half == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_state_takes_the_bytes_that_were_counted(kind: str, dtype: torch.dtype) -> None:
    config = decoder_shape(SIZES["nano"], 400, "qwen3")
    model = Decoder(config).to(dtype)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    optimizer = MasterOptimizer(model, OptimizationConfig(kind))
    tokens = torch.randint(400, (2, 64))
    next_token(model, TokenBatch(tokens, tokens, torch.arange(64).expand(2, 64), None))[0].backward()
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    optimizer.accumulate()
    if dtype == torch.bfloat16:
        gradients += sum(gradient.nbytes for gradient in optimizer.gradients())
    optimizer.step(1.0, 1.0)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    kept = sum(tensor.nbytes for name, tensor in optimizer.state().items() if not name.startswith("step."))
    if dtype == torch.float32:
        kept -= weights  # the masters are the weights
    expected = model_memory(config, OptimizationConfig(kind), dtype)
    assert weights + kept + gradients == pytest.approx(expected, rel=0.01)


@pytest.mark.usefixtures("quick_timing")
def test_steps_follow_from_minutes_epochs_or_the_size() -> None:
    request = ShapeRequest("nano", minutes=1.0, compile="off")
    assert settle(request, FAST, CPU, 400, 10**6).shape.steps == int(60 * plan.TRAINING_SHARE / 2)
    by_epochs = settle(replace(request, minutes=None, epochs=3.0), FAST, CPU, 400, 10_240).shape
    assert by_epochs.tokens == 3 * 10_240
    default = settle(replace(request, minutes=None), FAST, CPU, 400, 10**9).shape
    assert default.tokens == pytest.approx(20 * parameter_count(default.model), rel=0.01)
    small = settle(replace(request, minutes=None), FAST, CPU, 400, 10_240).shape
    assert small.tokens == 8 * 10_240


@pytest.mark.usefixtures("quick_timing")
def test_layers_are_compiled_only_when_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    short = settle(ShapeRequest("nano", steps=100), FAST, CPU, 400, 10**6)
    long = settle(ShapeRequest("nano", minutes=60.0), FAST, CPU, 400, 10**6)
    assert not short.compiled
    assert long.compiled
    assert long.shape.steps == int(3600 * plan.TRAINING_SHARE)  # at the compiled speed
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not settle(ShapeRequest("nano", minutes=60.0), FAST, CPU, 400, 10**6).compiled


def test_a_gpu_that_is_not_here_is_planned_from_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one = Device("cuda", "bfloat16", 0, 1)
    predictions = []
    for gpus in (1, 8):
        device = replace(one, world_size=gpus)
        predictions.append(
            predict(settle(ShapeRequest("large", steps=100), FAST, device, 32000, 10**9), FAST, device)
        )
    assert "not measured" in predictions[0].method
    assert predictions[0].seconds == pytest.approx(8 * predictions[1].seconds)
    assert predictions[0].joules == pytest.approx(predictions[1].joules)
    assert predictions[0].flops == pytest.approx(
        6 * parameter_count(decoder_shape(SIZES["large"], 32000)) * 100 * 524288, rel=0.2
    )


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_a_shape_that_fits_together(name: str) -> None:
    size = requested_size(ShapeRequest(name))
    config = decoder_shape(size, 1000)
    assert config.head_dim * config.num_heads == size.width
    assert size.batch_tokens % size.context == 0
    assert parameter_count(config) > 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ShapeRequest("nano", steps=5, epochs=1.0), "three ways to say one thing"),
        (ShapeRequest("nano", compile="maybe"), "unknown compile 'maybe'"),
        (ShapeRequest("nano", batch_tokens=10), "less than one row"),
        (ShapeRequest("nano", heads=4, key_value_heads=3), "cannot share 3 key_value_heads"),
        (ShapeRequest("nano", layers=-1), "layers must be above 0"),
    ],
)
@pytest.mark.usefixtures("quick_timing")
def test_contradictions_are_refused(request_: ShapeRequest, message: str) -> None:
    with pytest.raises(InputError, match=message):
        settle(request_, FAST, CPU, 400, 10**6)
