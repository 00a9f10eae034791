"""The online check: does this prompt's rho still look like the prompts the plan was calibrated on?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowmm.errors import DriftError
from flowmm.plans import MethodParameters
from flowmm.runtime.flow import RhoEstimate
from flowmm.runtime.report import LayerRecord

CheckAction = Literal["warn", "error", "adapt"]


class FlowDriftWarning(UserWarning):
    """A prompt's rho left what the plan recorded."""


@dataclass(frozen=True)
class PlannedRho:
    """Mean and standard deviation of a layer's raw rho over calibration prompts.

    `decides`: its mode came from comparing raw rho with theta, so that a prompt's own rho may decide otherwise.
    """

    mean: float
    std: float
    decides: bool = True


@dataclass(frozen=True)
class OnlineCheck:
    """Compare rho measured on this prompt with the plan.

    Compared is raw rho (eq. 6), whatever estimate decided the modes. A layer is reported when
    ``|rho - mean| > max(tolerance, sigmas * sqrt(std^2 + se^2))``, with the plan's spread over prompts and the standard
    error of the row sample.

    Attributes:
        action: ``warn`` (:class:`FlowDriftWarning`), ``error`` (:class:`flowmm.errors.DriftError` once the prefill is
            done) or ``adapt`` (this prompt's layers take the mode their own rho asks for, and nothing is raised).
        planned: one entry per layer; ``None`` where the plan holds no numbers.
    """

    action: CheckAction
    planned: tuple[PlannedRho | None, ...]
    tolerance: float = 0.05
    sigmas: float = 4.0

    def adapt(self, cross: Tensor, rho: RhoEstimate, layer: int, method: MethodParameters) -> Tensor:
        """``[B]`` bool: the mode to use; ``adapt`` changes it where rho is clear of theta by 2 standard errors.

        A mode that a person forced, or that was measured to cost less, stays.
        """
        planned = self.planned[layer]
        if self.action != "adapt" or method.flow != "on" or planned is None or not planned.decides:
            return cross
        clear = (rho.rho - method.theta).abs() > 2 * rho.standard_error
        return torch.where(clear, rho.rho > method.theta, cross)

    def compare(self, layers: Sequence[LayerRecord], comparable: Sequence[bool]) -> list[str]:
        """One sentence per layer and batch row that left the plan.

        Args:
            comparable: per row, whether its prompt holds both modalities; with one alone, rho is 0 and says nothing.
        """
        findings = []
        for layer, planned in zip(layers, self.planned, strict=True):
            if planned is None or layer.rho is None:
                continue
            rows = zip(layer.rho.rho.tolist(), layer.rho.standard_error.tolist(), strict=True)
            for row, (rho, error) in enumerate(rows):
                allowed = max(self.tolerance, self.sigmas * (planned.std**2 + error**2) ** 0.5)
                if comparable[row] and abs(rho - planned.mean) > allowed:
                    findings.append(
                        f"layer {layer.index}, row {row}: rho {rho:.3f} +- {error:.3f}, "
                        f"plan {planned.mean:.3f} +- {planned.std:.3f} (allowed {allowed:.3f})"
                    )
        return findings

    def act(self, findings: Sequence[str]) -> None:
        """Warn or raise; say what to do.

        Raises:
            DriftError: with ``action="error"`` and at least one finding.
        """
        if not findings or self.action == "adapt":
            return
        message = (
            f"rho left the plan in {len(findings)} place(s): {'; '.join(findings[:4])}. "
            "Profile again on prompts like this one, or use check='adapt'"
        )
        if self.action == "error":
            raise DriftError(message)
        warnings.warn(message, FlowDriftWarning, stacklevel=2)
