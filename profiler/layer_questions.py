"""What a profile asks about its layers once rho is known: how the budget is split, and which options layers choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flowmm.models import LoadedModel
from flowmm.plans import Plan
from flowmm.plans.budget_rules import MEASURED_RULES, BudgetRule
from flowmm.profiler.attention_statistics import measure_statistic, with_rule_budgets
from flowmm.profiler.decisions import Budgets, measure_layers
from flowmm.profiler.forecast import LayerMeasurements
from flowmm.profiler.joint_budgets import with_budgets_of
from flowmm.profiler.journal import Journal, key_of
from flowmm.profiler.profiling import Progress
from flowmm.profiler.ranks import Ranks
from flowmm.profiler.samples import Sample
from flowmm.profiler.sensitivity import MIXED


@dataclass(frozen=True)
class LayerQuestions:
    """What is asked about layers.

    Attributes:
        rule: how the budget is split among layers; a plan: as it splits it.
        choices: whether layers may choose other options than the plan's.
        protocol: ``aware``, ``blind`` or ``mixed`` (both).
        prompts: that are asked, at most.
    """

    rule: BudgetRule | Budgets | Plan
    choices: bool
    protocol: Literal["mixed", "aware", "blind"]
    prompts: int

    @property
    def measurements(self) -> LayerMeasurements:
        """The questions that compressed prompts answer."""
        protocols = MIXED if self.protocol == "mixed" else (self.protocol,)
        budgets: Budgets | None = self.rule if self.rule == "measured" or self.rule == "joint" else None
        held = isinstance(self.rule, Plan) and self.rule.allocations is not None
        return LayerMeasurements(self.prompts, protocols, budgets, self.choices, held)

    def journal(self, records: Path | None, plan: Plan, *, resume: bool) -> Journal:
        """What an earlier run that was killed left beside the records about the layers of the same plan.

        Args:
            records: of the prompts' rho; ``None``: nothing is kept.
            resume: False starts over.

        Raises:
            InputError: the file cannot be read or written.
        """
        if records is None:
            return Journal()
        path = records.with_name(records.name + ".layers")
        if not resume:
            path.unlink(missing_ok=True)
        timeless = plan.as_json() | {"created_at": None}
        return Journal(path, {"plan": key_of(timeless), "protocol": self.protocol, "prompts": str(self.prompts)})

    def answer(
        self,
        model: LoadedModel,
        plan: Plan,
        samples: Iterable[Sample],
        *,
        progress: Callable[[str, str], Progress | None] = lambda _, __: None,
        journal: Journal | None = None,
        ranks: Ranks | None = None,
    ) -> Plan:
        """`plan` with its budget split by the rule, and with the layers' own choices if asked for.

        Arguments and errors as of :func:`flowmm.profiler.decisions.measure_layers`, and PlanMismatchError: budgets of a
        plan for another architecture.
        """
        asked = self.measurements
        if isinstance(self.rule, Plan):
            plan = with_budgets_of(plan, self.rule)
        elif self.rule != "measured" and self.rule != "joint":
            statistic = None
            if self.rule in MEASURED_RULES:
                shown = progress("measured layers on", "prompts")
                statistic = measure_statistic(model, self.rule, samples, limit=self.prompts, progress=shown)
            plan = with_rule_budgets(plan, self.rule, statistic)
        return measure_layers(
            model,
            plan,
            samples,
            budgets=asked.budgets,
            choices=asked.choices,
            limit=asked.prompts,
            protocols=asked.protocols,
            progress=progress,
            journal=journal,
            ranks=ranks,
        )
