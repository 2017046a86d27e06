"""Optimizers and schedule: Muon for the hidden matrices, AdamW for the rest, both on float32 weights.

A model may compute in bfloat16 while its weights live in float32 here ("master weights"): an update a thousand times
smaller than a weight would vanish in bfloat16's eight bits. Knows nothing of losses or of data.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimizationConfig:
    """How weights are updated.

    Args:
        optimizer: "muon" (hidden matrices by Muon, the rest by AdamW) or "adamw" (everything).
        learning_rate: peak learning rate of AdamW.
        matrix_learning_rate: peak learning rate of Muon; each update has root mean square 0.2 times it.
        weight_decay: share of a matrix, times the learning rate, taken off at each step.
        clip: most the gradient's norm may be; 0 for no limit.
        warmup: share of the steps over which the learning rate rises.
        decay: share of the steps, at the end, over which it falls to zero.
    """

    optimizer: str = "muon"
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 2e-2
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: float = 0.02
    decay: float = 0.4


def learning_rate_factor(step: int, steps: int, warmup: float, decay: float) -> float:
    """Warm-up, stable, decay (arXiv:2405.18392): the share of the peak learning rate that step 0 .. steps-1 uses.

    Rises linearly over `warmup * steps`, stays at 1, falls linearly towards 0 over the last `decay * steps`.
    """
    rising = (step + 1) / max(1, round(warmup * steps))
    falling = (steps - step) / max(1, round(decay * steps))
    return min(1.0, rising, falling)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is meant for this parameter: a matrix inside a layer, not an embedding or the head."""
    return parameter.dim() == 2 and "layers." in name


class MasterOptimizer:
    """AdamW and Muon on the float32 weights of a model.

    Args:
        model: the model; its parameters may be float32 (then they are the masters) or bfloat16. Frozen ones are left
            alone.
        config: learning rates and the rest.
        masters: float32 weights by name to start from; the model's own where None.
    """

    def __init__(
        self, model: nn.Module, config: OptimizationConfig, masters: Mapping[str, Tensor] | None = None
    ):
        self.config = config
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            own = parameter.dtype == torch.float32
            self.masters[name] = parameter if own else parameter.detach().float().requires_grad_()
        if masters is not None:
            self.load_masters(masters)
        self.optimizers = self._optimizers()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        muon = {
            n for n, p in self.masters.items() if self.config.optimizer == "muon" and is_hidden_matrix(n, p)
        }
        rest = {name: master for name, master in self.masters.items() if name not in muon}
        decayed = [master for master in rest.values() if master.dim() == 2]
        plain = [master for master in rest.values() if master.dim() != 2]
        groups = [
            {"params": decayed, "weight_decay": self.config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(
            groups, lr=self.config.learning_rate, betas=(0.9, 0.95), eps=1e-10, fused=True
        )
        if not muon:
            return [adamw]
        matrices = [self.masters[name] for name in self.masters if name in muon]
        return [adamw, Muon(matrices, self.config.matrix_learning_rate, self.config.weight_decay)]

    def accumulate(self) -> None:
        """Add the gradients of the model's parameters to the masters', in float32, and clear them."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """The accumulated gradients, float32, in the order of the parameters."""
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def clear(self) -> None:
        """Forget the accumulated gradients."""
        for master in self.masters.values():
            master.grad = None

    def step(self, factor: float, weight: float) -> float:
        """Update the weights from the accumulated summed gradients and clear them.

        Args:
            factor: share of the peak learning rates to use.
            weight: what the sum of losses is divided by.

        Returns:
            The norm of the mean gradient; when it is not finite nothing was updated.
        """
        gradients = self.gradients()
        for gradient in gradients:
            gradient.mul_(1.0 / weight)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            if self.config.clip and norm > self.config.clip:
                for gradient in gradients:
                    gradient.mul_(self.config.clip / norm)
            for optimizer, peak in zip(self.optimizers, self._peaks(), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = peak * factor
                optimizer.step()
            self.publish()
        self.clear()
        return norm

    def _peaks(self) -> tuple[float, float]:
        return self.config.learning_rate, self.config.matrix_learning_rate

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters to the model's parameters."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    @torch.no_grad()
    def load_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Take over float32 weights by name, in the masters and the model."""
        for name, master in self.masters.items():
            master.copy_(masters[name])
        self.publish()

    def state(self) -> dict[str, Tensor]:
        """Everything a later process needs to go on: weights and optimizer state, by name."""
        tensors = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        names = {id(master): name for name, master in self.masters.items()}
        for optimizer in self.optimizers:
            for master, values in optimizer.state.items():
                for key, value in values.items():
                    tensors[f"{key}.{names[id(master)]}"] = torch.as_tensor(value)
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state` returned, bit for bit."""
        self.load_masters({name: tensors[f"master.{name}"] for name in self.masters})
        for optimizer in self.optimizers:
            keys = (
                ("step", "exp_avg", "exp_avg_sq")
                if isinstance(optimizer, torch.optim.AdamW)
                else ("momentum",)
            )
            for group in optimizer.param_groups:
                for master in group["params"]:
                    name = next(n for n, m in self.masters.items() if m is master)
                    found = {
                        key: tensors[f"{key}.{name}"].clone() for key in keys if f"{key}.{name}" in tensors
                    }
                    if found:
                        optimizer.state[master] = found


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    The same rule as `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` (Moonlight, arXiv:2502.16982), but
    matrices of one shape are orthogonalized together, in one batched product, which small matrices need to be fast.

    Args:
        parameters: matrices.
        learning_rate: step size.
        weight_decay: share taken off per step, times the learning rate.
        momentum: share of the old momentum that is kept.
        iterations: Newton-Schulz iterations.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        learning_rate: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        iterations: int = 5,
    ):
        defaults = {
            "lr": learning_rate,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "iterations": iterations,
        }
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for parameters in shapes.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, float]) -> None:
        """Update matrices of one shape together."""
        gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
        for parameter in parameters:
            self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        momenta = torch.stack([self.state[parameter]["momentum"] for parameter in parameters])
        momenta.lerp_(gradients, 1 - group["momentum"])
        update = orthogonalize(gradients.lerp_(momenta, group["momentum"]), int(group["iterations"]))
        rows, columns = parameters[0].shape
        rate = group["lr"] * 0.2 * max(rows, columns) ** 0.5
        for index, parameter in enumerate(parameters):
            self.state[parameter]["momentum"].copy_(momenta[index])
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update[index], alpha=-rate)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Each matrix with its singular values brought near 1, by Newton-Schulz iterations in bfloat16.

    Args:
        matrices: [N, rows, columns].
        iterations: how often the quintic 3.4445 s - 4.7750 s^3 + 2.0315 s^5 is applied to the singular values.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    result = matrices.bfloat16()
    result = result.transpose(1, 2) if tall else result
    result = result / (result.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = result @ result.transpose(1, 2)
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        result = torch.baddbmm(result, gram, result, beta=3.4445)
    return result.transpose(1, 2) if tall else result
