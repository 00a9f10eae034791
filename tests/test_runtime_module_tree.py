"""What code compiled ahead of time depends on in a model, and the twin of a model that is traced in its stead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import nn

from flowmm.runtime.module_tree import UnsuitedError, describe, twin, weights_of


@pytest.fixture
def model() -> Any:
    return tiny_model(layers=2)


def _attention(model: Any) -> Any:
    return model.model.language_model.layers[0].self_attn


def _untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _patch_class(model: Any) -> None:
    norm = model.model.language_model.norm
    norm.__class__ = type(type(norm).__name__, (type(norm),), {"forward": lambda self, states: 2 * states})


CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda model: setattr(_attention(model), "scaling", 0.3),
    "sections of rotary angles": lambda model: model.model.language_model.rotary_emb.mrope_section.reverse(),
    "configuration": lambda model: setattr(model.config.text_config, "rms_norm_eps", 0.1),
    "attention": lambda model: model.set_attn_implementation({"text_config": "eager"}),
    "training": lambda model: model.train(),
    "dtype": lambda model: model.to(torch.bfloat16),
    "strides": lambda model: setattr(_attention(model).q_proj.weight, "data", torch.randn(64, 64).T),
    "tied weights": _untie,
    "class": _patch_class,
    "module": lambda model: setattr(_attention(model), "o_proj", nn.Sequential(_attention(model).o_proj)),
}
UNSUITED: dict[str, Callable[[Any], Any]] = {
    "hook": lambda model: _attention(model).register_forward_hook(lambda *_: None),
    "hook before": lambda model: model.register_forward_pre_hook(lambda *_: None),
    "replaced forward": lambda model: setattr(model.lm_head, "forward", model.lm_head.forward),
    "compiled module": lambda model: model.lm_head.compile(),
    "meta": lambda model: model.lm_head.to("meta"),
    "kind of weight": lambda model: setattr(model.lm_head, "weight", type("Packed", (nn.Parameter,), {})()),
    "class from no file": lambda model: setattr(
        model, "extra", type("Mine", (nn.Module,), {"__module__": "__console__"})()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_described(model: Any, change: Callable[[Any], Any]) -> None:
    before = describe(model)
    assert before == describe(model)
    change(model)
    assert describe(model) != before


def test_values_of_weights_are_not(model: Any) -> None:
    before = describe(model)
    model.lm_head.weight.data = torch.zeros_like(model.lm_head.weight)
    model.model.language_model.norm.weight = nn.Parameter(torch.zeros_like(model.model.language_model.norm.weight))
    model.generation_config.max_new_tokens = 3
    assert describe(model) == before == describe(tiny_model(seed=1, layers=2))


@pytest.mark.parametrize("change", UNSUITED.values(), ids=UNSUITED)
def test_what_cannot_be_described_is_refused(model: Any, change: Callable[[Any], Any]) -> None:
    change(model)
    with pytest.raises(UnsuitedError):
        describe(model)


def test_a_hook_on_all_modules_is_refused(model: Any) -> None:
    with nn.modules.module.register_module_forward_hook(lambda *_: None), pytest.raises(UnsuitedError):
        describe(model)


def test_another_process_describes_alike(model: Any) -> None:
    code = "from tiny import *; from flowmm.runtime.module_tree import *; print(describe(tiny_model(layers=2)))"
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[1]); {code}", str(Path(__file__).parent)]
    other = subprocess.run(words, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True, capture_output=True, text=True)
    assert other.stdout.strip() == describe(model)


def test_what_is_exchanged_in_a_twin_stays_there(model: Any) -> None:
    model.register_forward_hook(lambda *_: 1 / 0)
    ids, before = torch.tensor([[5, 6, 7]]), {name: id(weight) for name, weight in weights_of(model).items()}
    other = twin(model)
    assert {name: id(weight) for name, weight in weights_of(other).items()} == before
    with torch.no_grad():
        expected = other(input_ids=ids).logits
        for module in other.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = None if parameter is None else nn.Parameter(torch.zeros_like(parameter))
        assert not torch.equal(other(input_ids=ids).logits, expected)
        assert torch.equal(twin(model)(input_ids=ids).logits, expected)
    assert {name: id(weight) for name, weight in weights_of(model).items()} == before
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids)
