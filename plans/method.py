"""Method parameters: every choice the FlowMM paper leaves open, as a named, validated option.

The gaps and their readings are numbered G1-G33 in the project's method notes; each field names the paper's symbol or
equation it settles. A plan stores these parameters, so a run is described completely by plan, budget and prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

MERGE_OPERATORS = (
    "evict",
    "average",
    "pivotal",
    "weighted",
    "weighted_norm",
    "factory_weighted",
    "d2o",
    "gauss",
    "kvpress",
    "mass",
    "keep_mass",
    "keep_mass_bias",
    "count_bias",
    "tangent",
)


def require_operator(name: str) -> str:
    """`name`, if it is a merge operator.

    Raises:
        ValueError: it is none.
    """
    if name not in MERGE_OPERATORS:
        raise ValueError(f"{name!r}: expected one of {', '.join(MERGE_OPERATORS)}")
    return name


def parse_rule(rule: str, known: Mapping[str, bool | None]) -> tuple[str, float | None]:
    """Split ``name`` or ``name:number``; `known` says for each name whether it takes a number (``None``: may take one).

    Raises:
        ValueError: unknown name, missing or unwanted number (pydantic turns it into a field error).
    """
    name, colon, number = rule.partition(":")
    if name not in known:
        raise ValueError(f"{rule!r}: expected one of {', '.join(sorted(known))}")
    if known[name] not in (None, bool(colon)):
        raise ValueError(f"{rule!r}: write {name + ':<number>' if known[name] else name}")
    if not colon:
        return name, None
    if not isfinite(value := float(number)):
        raise ValueError(f"{rule!r}: expected a finite number")
    return name, value


TAU_RULES = {"abs": True, "mean_mult": True, "pivot_quantile": True, "mass": True, "none": False}
PROXY_RULES = {"last": True, "last_text": True}
SELECTORS = {
    "proxy": False,
    "proxy_pool": True,
    "column_mean": None,
    "kcenter": None,
    "weighted_kcenter": None,
    "novelty": None,
    "random": None,
    "uniform": False,
}
MASS_RULES = {"proxy": False, "column_mean": None}
FlowKind = Literal["raw", "nosink", "nosink_auto", "balanced", "lift", "v2t", "t2v"]
# These compare keys whose rotation by position has been undone.
UNROTATED_SELECTORS = ("kcenter", "weighted_kcenter", "novelty")


def parse_selector(selector: str) -> tuple[tuple[str, float | None], ...]:
    """Parts of a selector: one rule, or two joined by ``+`` that share the free entries half and half.

    Raises:
        ValueError: an unknown part, or more than two.
    """
    parts = selector.split("+")
    if len(parts) > 2:
        raise ValueError(f"{selector!r}: at most two selectors can share the budget")
    return tuple(parse_rule(part, SELECTORS) for part in parts)


class MethodParameters(BaseModel):
    """What happens to a layer's KV cache after prefill. Defaults are the ``robust`` preset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = Field("robust", description="preset these parameters started from")
    budget: float = Field(
        0.2, gt=0, le=1, description="share of the prompt's entries kept, unless a run asks otherwise"
    )

    theta: float = Field(0.25, ge=0, le=1, description="rho above theta: cross-modal layer (eq. 6-7)")
    rho_kind: FlowKind = Field(
        "raw", description="estimate of a profiled layer's rho that is compared with theta; lift is compared with 1"
    )
    flow: Literal["on", "off:any", "off:intra", "inverted"] = Field(
        "on", description="on: the layer's mode decides; the others are controls"
    )
    cross_scope: Literal["any", "other_only"] = Field(
        "any", description="a cross layer merges into pivots of any modality, or of the other one only"
    )

    selector: str = Field(
        "proxy+weighted_kcenter",
        description="what ranks entries: proxy (eq. 8) | proxy_pool:kernel | column_mean[:rows] | kcenter[:picks] | "
        "weighted_kcenter[:picks] | novelty[:window] | random[:seed] | uniform, or two of them as a+b",
    )
    first_share: float = Field(
        0.5, ge=0, le=1, description="share of the free entries that the first of two selectors picks"
    )
    image_quota: float = Field(
        1.0, ge=0, le=1, description="share of an image's proportional part of the free entries that it is sure to get"
    )
    modality_floor: float = Field(
        0.0, ge=0, le=0.5, description="share of the free entries that each present modality is sure to get"
    )
    proxies: str = Field("last:4", description="rows that give importance (eq. 8): last:n | last_text:n")
    keep_proxies: bool = Field(True, description="proxies are kept, inside the budget")
    n_sink: int = Field(1, ge=0, description="first entries kept inside the budget; they never absorb")
    gqa_reduce: Literal["mean", "max", "sum"] = Field("mean", description="query heads to KV head")

    gate: bool = Field(False, description="only pivots with importance <= tau absorb (eq. 10)")
    tau: str = Field("pivot_quantile:0.8", description="abs:x | mean_mult:c | pivot_quantile:q | mass:mu | none")
    gate_action: Literal["reroute", "drop"] = Field(
        "reroute", description="entry whose nearest pivot is protected: next eligible pivot, or evicted"
    )
    fallback: Literal["drop", "relax_tau", "any_modality"] = Field(
        "drop", description="entry without any eligible pivot in its modality"
    )
    min_sim: float = Field(0.5, ge=-1, le=1, description="cosine below which an entry is evicted, not merged")
    merge: str = Field("tangent", description="merge operator (eq. 5)")
    mass: str = Field("column_mean:64", description="masses of the mass operators: proxy (eq. 8) | column_mean[:rows]")
    key_space: Literal["post_rope", "match_pre_rope", "pre_rope"] = Field(
        "post_rope",
        description="keys are compared and merged as cached; compared, or also merged, with rotation undone",
    )

    @field_validator("tau")
    @classmethod
    def _tau_rule(cls, rule: str) -> str:
        parse_rule(rule, TAU_RULES)
        return rule

    @field_validator("proxies")
    @classmethod
    def _proxy_rule(cls, rule: str) -> str:
        _, count = parse_rule(rule, PROXY_RULES)
        if count is None or count < 1 or count != int(count):
            raise ValueError(f"{rule!r}: the number of proxies is a whole number of at least 1")
        return rule

    @field_validator("selector")
    @classmethod
    def _selector(cls, selector: str) -> str:
        parse_selector(selector)
        return selector

    @field_validator("mass")
    @classmethod
    def _mass_rule(cls, rule: str) -> str:
        parse_rule(rule, MASS_RULES)
        return rule

    @field_validator("merge")
    @classmethod
    def _merge_operator(cls, name: str) -> str:
        return require_operator(name)

    @property
    def needs_rotary(self) -> bool:
        """Whether keys must be rotated back, so that the prompt's rotary embedding is needed."""
        names = {name for name, _ in parse_selector(self.selector)}
        return self.key_space != "post_rope" or not names.isdisjoint(UNROTATED_SELECTORS)

    @property
    def threshold(self) -> float:
        """What a layer's flow of kind `rho_kind` must exceed to be cross-modal: chance level for lift, else theta."""
        return 1.0 if self.rho_kind == "lift" else self.theta

    @classmethod
    def from_preset(cls, preset: str, **changes: object) -> Self:
        """Parameters of a named preset with some fields changed.

        Raises:
            ValueError: no such preset (KeyError is avoided so that pydantic and click can show it).
        """
        if preset not in PRESETS:
            raise ValueError(f"preset {preset!r}: expected one of {', '.join(PRESETS)}")
        return cls.model_validate({"preset": preset, **PRESETS[preset], **changes})


PRESETS: dict[str, dict[str, object]] = {
    # The closest literal reading of the paper (eq. 5-10); nothing forced, one operator for keys and values.
    "paper": {
        "selector": "proxy",
        "proxies": "last_text:32",
        "keep_proxies": False,
        "n_sink": 0,
        "gate": True,
        "tau": "pivot_quantile:0.8",
        "min_sim": -1.0,
        "merge": "average",
        "mass": "proxy",
        "image_quota": 0.0,
    },
    # Chosen on the pocket model's validation split; docs/choices.md has the numbers.
    "robust": {},
    # Best when the question is in the prompt: the entries and the masses that its last rows ask for.
    "aware": {"selector": "proxy", "mass": "proxy", "min_sim": -1.0, "image_quota": 0.0},
    # Best when questions come later: entries that one would miss most, nothing chosen by the prompt's end.
    "reuse": {"selector": "weighted_kcenter", "keep_proxies": False},
    # Same pivots as `robust`, nothing merged: separates selection from merging.
    "evict": {"merge": "evict"},
}
