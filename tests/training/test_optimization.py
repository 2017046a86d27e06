"""Our Muon against PyTorch's, the masters against a float32 run, and state that comes back bit for bit."""

import pytest
import torch
from tests.training.test_objectives import random_model
from torch import nn

from glasshouse.training.optimization import (
    MasterOptimizer,
    Muon,
    OptimizationConfig,
    is_hidden_matrix,
    orthogonalize,
)


def test_muon_equals_pytorch() -> None:
    torch.manual_seed(0)
    shapes = [(16, 16), (48, 16), (16, 48), (16, 16)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    muon = Muon(ours, 0.02, 0.1)
    reference = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        muon.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        # the iterations run in bfloat16, whose rounding differs between one matrix and a batch of them
        torch.testing.assert_close(one, other, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrices).float())
    assert values.min() > 0.3
    assert values.max() < 1.5


def test_only_matrices_inside_layers_go_to_muon() -> None:
    model = random_model()
    chosen = {name for name, parameter in model.named_parameters() if is_hidden_matrix(name, parameter)}
    assert chosen
    assert all(name.endswith(".weight") and "norm" not in name for name in chosen)
    assert "embedding.weight" not in chosen


def test_small_updates_survive_in_the_masters_of_a_bfloat16_model() -> None:
    model = random_model().bfloat16()
    optimizer = MasterOptimizer(model, OptimizationConfig("adamw", learning_rate=1e-5, weight_decay=0.0))
    before = optimizer.masters["embedding.weight"].clone()
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.accumulate()
        optimizer.step(1.0, 1.0)
    moved = before - optimizer.masters["embedding.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 3e-5), rtol=0.05, atol=1e-7)
    assert torch.equal(model.embedding.weight, optimizer.masters["embedding.weight"].bfloat16())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_comes_back_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    def random_steps(optimizer: MasterOptimizer, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for parameter in optimizer.parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.accumulate()
            optimizer.step(1.0, 1.0)

    first = MasterOptimizer(random_model().to(dtype), OptimizationConfig(kind))
    random_steps(first, 3, 0)
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    second = MasterOptimizer(random_model(9).to(dtype), OptimizationConfig(kind))
    second.load(saved)
    random_steps(first, 3, 1)
    random_steps(second, 3, 1)
    for name, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_clipping_limits_the_gradient() -> None:
    model = random_model()
    optimizer = MasterOptimizer(model, OptimizationConfig("adamw", clip=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    norm = optimizer.step(1.0, 2.0)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert norm == pytest.approx(0.5 * count**0.5)
    momentum = optimizer.optimizers[0].state[model.embedding.weight]["exp_avg"]
    assert float(momentum.flatten()[0]) == pytest.approx(0.1 * 0.5 * (0.5 / norm), rel=1e-4)
