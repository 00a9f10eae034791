"""The optimiser: orthogonalised momentum for weight matrices, AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from flowmm.pocket.precision import fast_dtype


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Push the singular values of ``matrices [n, rows, columns]`` towards 1 by Newton-Schulz iterations."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(fast_dtype())
    flip = x.shape[-2] > x.shape[-1]
    x = x.mT if flip else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if flip else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; matrices of one shape are orthogonalised in one batched call."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # ty: ignore[incompatible-method-override]
        """Apply one update to every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append((parameter, parameter.grad))
            for shape, pairs in by_shape.items():
                update = orthogonalise(torch.stack([self._momentum(*pair, group["momentum"]) for pair in pairs]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (parameter, _), change in zip(pairs, update, strict=True):
                    parameter.sub_(change, alpha=scale)

    def _momentum(self, parameter: torch.nn.Parameter, gradient: torch.Tensor, momentum: float) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)
