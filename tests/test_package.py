"""What the package itself exports: the first example of the README."""

import subprocess
import sys

import pytest
import torch

import glasshouse
from glasshouse.errors import InputError
from glasshouse.training.loop import Schedule, train_steps
from glasshouse.training.objectives import TokenBatch, next_token
from glasshouse.training.optimization import MasterOptimizer, OptimizationConfig


@pytest.fixture
def model():
    made = glasshouse.Transformer(vocab_size=40, embedding_dim=32, num_heads=4, num_layers=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:  # fresh blocks write nothing; here they must
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made.eval()


def test_logits_of_every_position(model):
    assert model(torch.randint(0, 40, (3, 17))).shape == (3, 17, 40)


def test_no_position_sees_a_later_one(model):
    tokens = torch.randint(0, 40, (2, 20), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 40
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_the_order_of_earlier_tokens_matters(model):
    tokens = torch.tensor([[1, 2, 3, 4, 5], [2, 1, 3, 4, 5]])
    first, second = model(tokens)
    assert (first[-1] - second[-1]).abs().max() > 1e-3


def test_it_learns_in_the_same_loop():
    """Counting upwards modulo 40: what comes next follows from the token before."""
    model = glasshouse.Transformer(40, 32, 4, 2, seed=3)
    rows = (torch.arange(16)[None] + torch.arange(8)[:, None] * 5) % 40

    def batches(step: int):
        tokens = (rows + step) % 40
        yield TokenBatch(tokens, (tokens + 1) % 40, torch.arange(16).expand(8, 16), None)

    optimizer = MasterOptimizer(model.decoder, OptimizationConfig(learning_rate=1e-2))
    losses = [
        step.loss for step in train_steps(model.decoder, next_token, batches, optimizer, Schedule(0, 60))
    ]
    assert losses[-1] < 0.3 < 3.0 < losses[0]
    assert model(torch.tensor([[7, 8, 9]]))[0, -1].argmax() == 10


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(InputError, match="30 does not split into 4 heads"):
        glasshouse.Transformer(40, 30, 4, 2)
    with pytest.raises(InputError, match="not above 0"):
        glasshouse.Transformer(40, 32, 4, 0)


def test_importing_the_package_loads_no_pytorch():
    code = "import sys, glasshouse; assert 'torch' not in sys.modules; assert glasshouse.Transformer"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_errors():
    with pytest.raises(AttributeError, match="has no attribute 'Transfomer'"):
        glasshouse.Transfomer  # noqa: B018
