"""The studies of ``docs/choices.md``: a question, and the variants whose comparison answers it.

A variant is a method as in :mod:`flowmm.evaluation.methods`, or ``METHOD@KIND`` with a kind of plan
(:mod:`flowmm.evaluation.plan_kinds`); without one, every layer keeps the same number of entries. One factor changes at
a time around a reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowmm.evaluation.methods import FULL
from flowmm.evaluation.protocols import PROTOCOLS

BUDGETS = (0.2, 0.1, 0.05, 0.02)
THETAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)


@dataclass(frozen=True)
class Block:
    """One table: variants, the reference first."""

    variants: tuple[str, ...]

    @property
    def reference(self) -> str:
        """What the others are compared with."""
        return self.variants[0]


@dataclass(frozen=True)
class Study:
    """A question and its tables."""

    name: str
    title: str
    question: str
    blocks: tuple[Block, ...]
    budgets: tuple[float, ...] = BUDGETS
    protocols: tuple[str, ...] = tuple(PROTOCOLS)

    @property
    def command(self) -> str:
        """What prints its numbers again."""
        return f"python -m flowmm.evaluation.choices {self.name}"


def around(method: str, *changes: str) -> Block:
    """A method, then the method with each change."""
    joint = "," if ":" in method else ":"
    return Block((method, *(f"{method}{joint}{change}" for change in changes)))


_OPERATORS = ("average", "pivotal", "weighted", "mass", "keep_mass", "keep_mass_bias", "count_bias")
_SELECTORS = (
    "proxy", "proxy_pool:5", "column_mean:64", "kcenter", "weighted_kcenter", "proxy+kcenter", "novelty",
    "proxy+novelty", "column_mean:64+kcenter", "random", "uniform",
)  # fmt: skip

STUDIES = {
    study.name: study
    for study in (
        Study(
            "merge_operator",
            "Merge operator",
            "What should become of an evicted entry (eq. 5)? Same pivots everywhere; the reference evicts the rest. "
            "First with the pivots and the matching of the default preset, then with those of the paper.",
            (
                Block(("robust:merge=evict", "robust", *(f"robust:merge={name}" for name in _OPERATORS))),
                Block(("paper:merge=evict", "paper:gate=false", "paper:merge=tangent,gate=false")),
            ),
        ),
        Study(
            "selector",
            "Selector",
            "Which entries stay (eq. 8)? All with the merging of the default preset, then without merging.",
            (
                around("robust", *(f"selector={name}" for name in _SELECTORS), "first_share=0.25"),
                around(
                    "robust:merge=evict",
                    *(f"selector={name}" for name in ("proxy", "weighted_kcenter", "random", "uniform")),
                ),
            ),
        ),
        Study(
            "tau_gate",
            "Sensitivity gate and tau",
            "Should pivots above tau be protected from absorbing others (eq. 10), and how is tau set?",
            (
                around(
                    "paper",
                    "gate_off",
                    "tau=pivot_quantile:0.5",
                    "tau=mean_mult:4",
                    "tau=mass:0.5",
                    "gate_action=drop",
                ),
                around("robust", "gate=true", "gate=true,gate_action=drop", "gate=true,tau=pivot_quantile:0.5"),
            ),
        ),
        Study(
            "proxies",
            "Proxies",
            "How many rows at the prompt's end rank the entries, and are they kept?",
            (
                around(
                    "robust",
                    "proxies=last:1",
                    "proxies=last:2",
                    "proxies=last:8",
                    "proxies=last:16",
                    "proxies=last_text:32",
                    "keep_proxies=false",
                ),
            ),
        ),
        Study(
            "theta",
            "theta and the flow estimator",
            "Which layers may merge across modalities (eq. 6-7)? `@online` layers decide per prompt by theta; "
            "`@by_lift` and `@by_t2v` take the modes from another estimator; the others agree with `raw` at 0.25 in "
            "every layer.",
            (
                Block(("paper:any_pivot", "paper", "paper:intra_only", "paper@by_lift", "paper@by_t2v")),
                Block(("robust:any_pivot", "robust", "robust:intra_only", "robust@by_lift")),
                Block(("paper:any_pivot", *(f"paper:theta={theta}@online" for theta in THETAS))),
            ),
        ),
        Study(
            "cross_scope",
            "Cross scope",
            "Does a cross-modal layer merge into any pivot, or only into pivots of the other modality?",
            (around("paper", "strict_cross"), around("robust", "strict_cross")),
        ),
        Study(
            "sinks",
            "Window and sinks",
            "How many first entries and how long a recent window are kept in any case, inside the budget?",
            (around("robust", "n_sink=0", "n_sink=4", "nothing_forced", "proxies=last:16"),),
        ),
        Study(
            "floors",
            "Modality floor and image quota",
            "Should each modality, or each image, be sure of a share of the entries?",
            (
                around("robust", "image_quota=0.5", "image_quota=0"),
                around("robust:image_quota=0", *(f"modality_floor={floor}" for floor in (0.1, 0.25))),
            ),
        ),
        Study(
            "key_space",
            "Key space",
            "Are keys compared and merged as cached, or with the rotation by position undone?",
            (around("robust", "key_space=match_pre_rope", "key_space=pre_rope"),),
        ),
        Study(
            "min_sim",
            "Similarity floor",
            "Below which cosine is an entry evicted rather than merged?",
            (around("robust", "min_sim=-1", "min_sim=0.3", "min_sim=0.65", "min_sim=0.8"),),
        ),
        Study(
            "mass_source",
            "Mass source",
            "Which rows' attention weighs the entries of a merge?",
            (around("robust", "mass=proxy", "mass=column_mean:16", "mass=column_mean"),),
        ),
        Study(
            "layer_budgets",
            "Layer budgets",
            "The same total, split evenly over the layers or as the plan measured it (`@measured`)?",
            tuple(
                Block((method, f"{method}@measured"))
                for method in ("robust", "robust:merge=evict", "paper", "robust:selector=random")
            ),
        ),
        Study(
            "presets",
            "The presets",
            "The chosen presets against each other and the full cache, with measured layer budgets and with even ones.",
            (
                Block((FULL, *(f"{preset}@measured" for preset in ("robust", "aware", "reuse", "evict", "paper")))),
                Block((FULL, "robust", "aware", "reuse", "evict", "paper")),
            ),
        ),
    )
}
