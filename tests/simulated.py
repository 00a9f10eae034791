"""Calibration prompts whose costs are made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flowmm.profiler.joint_costs import Arrangement


class SimulatedPrompts:
    """Stand in for `JointPrompts`: `cost` of an arrangement, plus noise of prompt and arrangement, never below 0."""

    def __init__(
        self, cost: Callable[[Arrangement], float], count: int = 32, noise: float = 0.0, seed: int = 0
    ) -> None:
        self.cost, self.count, self.noise = cost, count, noise
        self.generator = np.random.default_rng(seed)

    def __len__(self) -> int:
        return self.count

    def _some(self, count: int) -> SimulatedPrompts:
        return SimulatedPrompts(self.cost, count, self.noise, int(self.generator.integers(10**9)))

    def every(self, step: int, start: int) -> SimulatedPrompts:
        return self._some(len(range(start, self.count, step)))

    def window(self, _: int, size: int) -> SimulatedPrompts:
        return self._some(size)

    def parts(self, ends: Sequence[int]) -> list[SimulatedPrompts]:
        return [self._some(stop - start) for start, stop in zip((0, *ends), ends, strict=False)]

    def costs(self, arrangements: Sequence[Arrangement], of: Sequence[str] = ("shift_bound",), **_: Any) -> np.ndarray:
        mean = np.array([self.cost(one) for one in arrangements] * len(of))
        return np.maximum(0, mean + self.noise * self.generator.normal(size=(self.count, len(mean))))
