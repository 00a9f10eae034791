"""Compressions of one prompt that share their work give what each gives on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowmm.plans import PRESETS, MethodParameters
from flowmm.plans.method import MERGE_OPERATORS, SELECTORS
from flowmm.runtime.compression import CompressedLayer, compress_layer
from flowmm.runtime.prompt import PromptLayout, find_proxies
from flowmm.runtime.rotary import Rotary
from flowmm.runtime.shared import Shared

CHANGES: tuple[dict[str, Any], ...] = (
    {},
    *({"merge": name} for name in MERGE_OPERATORS),
    *({"selector": name if takes_number is not True else f"{name}:3"} for name, takes_number in SELECTORS.items()),
    {"first_share": 0.2},
    {"image_quota": 0.5},
    {"modality_floor": 0.3},
    {"proxies": "last_text:6"},
    {"keep_proxies": False},
    {"n_sink": 4},
    {"gqa_reduce": "max"},
    {"gate": True},
    {"gate": True, "tau": "pivot_quantile:0.3"},
    {"gate": True, "gate_action": "drop"},
    {"gate": True, "fallback": "relax_tau"},
    {"cross_scope": "other_only"},
    {"cross_scope": "other_only", "fallback": "any_modality"},
    {"min_sim": 0.2},
    {"mass": "proxy"},
    {"key_space": "match_pre_rope"},
    {"key_space": "pre_rope"},
)
# What these decide, `cross` and `counts` say.
DECIDED_BEFORE = {"preset", "budget", "theta", "rho_kind", "flow"}
LENGTH, DIM = 40, 8


def compressions(shared: Shared | None) -> list[CompressedLayer]:
    """Every preset with every change, in both modes and with two budgets."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, LENGTH, DIM) for heads in (4, 2, 2))
    layout = PromptLayout.from_masks(torch.arange(LENGTH)[None] % 5 > 1, torch.ones(1, LENGTH, dtype=torch.bool))
    angle = torch.rand(1, LENGTH, DIM // 2).repeat(1, 1, 2)
    rotary = Rotary(angle.cos(), angle.sin())
    methods = [MethodParameters.from_preset(preset, **change) for preset in ("robust", "paper") for change in CHANGES]
    return [
        compress_layer(
            query,
            key,
            value,
            layout,
            find_proxies(layout, method.proxies),
            (count,),
            torch.tensor([cross]),
            method,
            DIM**-0.5,
            rotary,
            shared=shared,
        )
        for count in (12, 25)
        for cross in (False, True)
        for method in methods
    ]


def test_every_parameter_is_varied() -> None:
    varied = {name for change in CHANGES for name in change}
    assert varied == set(MethodParameters.model_fields) - DECIDED_BEFORE
    assert {"robust", "paper"} <= set(PRESETS)


def test_sharing_changes_nothing() -> None:
    for together, alone in zip(compressions(Shared()), compressions(None), strict=True):
        assert torch.equal(together.positions, alone.positions)
        assert torch.equal(together.entries.keys, alone.entries.keys)
        assert torch.equal(together.entries.values, alone.entries.values)
        biased, alike = together.entries.bias, alone.entries.bias
        assert (biased is None) == (alike is None)
        assert biased is None or alike is None or torch.equal(biased, alike)
        assert torch.equal(together.assignment.target, alone.assignment.target)
        assert torch.equal(torch.stack(together.totals), torch.stack(alone.totals))


@pytest.mark.parametrize(("first", "second", "equal"), [(("a", 1), ("a", 1), True), (("a", 1), ("a", 2), False)])
def test_equal_dependences_are_computed_once(first: tuple[str, int], second: tuple[str, int], equal: bool) -> None:
    shared = Shared()
    results = [shared.once(dependence, object) for dependence in (first, second)]
    assert (results[0] is results[1]) == equal
