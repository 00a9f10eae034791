"""A saved context: another process continues it as if nothing had happened, and nobody else can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_runtime_oracle import BATCH, GREEDY, PROMPT, logits_of, uneven_plan
from tiny import tiny_inputs, tiny_model

import flowmm
from flowmm.errors import ContextFormatError, ContextMismatchError, InputError
from flowmm.plans import Plan
from flowmm.runtime.saved import _digest

QUESTION = torch.tensor([[7, 8, 9, 10]])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def plan(model: Any) -> Plan:
    return uneven_plan(model)


def ask(model: Any, cache: Any) -> torch.Tensor:
    held = cache.ids.filled
    ids = torch.cat([held, QUESTION.expand(len(held), -1)], dim=1)
    return logits_of(model.generate(input_ids=ids, **GREEDY, past_key_values=cache))


@pytest.mark.parametrize(
    ("rows", "budget", "method"),
    [(PROMPT, 0.2, None), (BATCH, 0.3, "evict"), (PROMPT, 0.3, "paper"), (PROMPT, 1.0, None)],
    ids=str,
)
def test_a_loaded_context_goes_on_as_the_original(
    model: Any, plan: Plan, tmp_path: Path, rows: list[list[int]], budget: float, method: str | None
) -> None:
    path = tmp_path / "context.safetensors"
    with flowmm.compress(model, plan, budget=budget, method=method) as run:
        model.generate(**tiny_inputs(rows), max_new_tokens=3)
        run.save(path)
        expected = ask(model, run.cache)
        other = tiny_inputs([[9, -4, 30]])
        model.generate(**other, max_new_tokens=2)
        loaded = run.load(path)
        found = ask(model, loaded)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert os.listdir(tmp_path) == [path.name]


def test_padding_of_a_whole_prompt_stays_unseen(model: Any, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "context.safetensors"
    inputs = tiny_inputs(BATCH)
    with flowmm.compress(model, plan, budget=1.0) as run:
        model(**inputs)
        run.save(path)
        cache = run.load(path)
        token = QUESTION[:, :1].expand(len(BATCH), -1)
        logits = model(input_ids=token, past_key_values=cache).logits
    again = model(
        input_ids=torch.cat([inputs["input_ids"], token], 1),
        attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1),
        mm_token_type_ids=torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(token)], 1),
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
    )
    torch.testing.assert_close(logits[0], again.logits[0, -1:], atol=1e-5, rtol=1e-5)


SCRIPT = """
import sys, torch, flowmm
sys.path.insert(0, sys.argv[2])
from test_runtime_saved import ask
from tiny import tiny_model
model = tiny_model()
with flowmm.compress(model, sys.argv[3], budget=0.2) as run:
    torch.save(ask(model, run.load(sys.argv[1])), sys.argv[1] + ".logits")
"""


def test_another_process_continues_it(model: Any, plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "context.safetensors"
    with flowmm.compress(model, plan, budget=0.2) as run:
        model.generate(**tiny_inputs(PROMPT), max_new_tokens=3)
        run.save(path)
        expected = ask(model, run.cache)
    plan.save(tmp_path / "plan.json")
    words = [sys.executable, "-c", SCRIPT, path, Path(__file__).parent, tmp_path / "plan.json"]
    subprocess.run(words, check=True)
    found = torch.load(f"{path}.logits", weights_only=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def saved(model: Any, plan: Plan, tmp_path: Path) -> Path:
    path = tmp_path / "context.safetensors"
    with flowmm.compress(model, plan, budget=0.2) as run:
        model.generate(**tiny_inputs(PROMPT), max_new_tokens=2)
        run.save(path)
    return path


def load(model: Any, plan: Plan, path: Path, method: str | None = None) -> Any:
    with flowmm.compress(model, plan, budget=0.2, method=method) as run:
        return run.load(path)


@pytest.mark.filterwarnings("ignore::flowmm.runtime.PlanFitWarning")
def test_other_models_plans_and_methods_are_refused(model: Any, plan: Plan, saved: Path) -> None:
    with pytest.raises(ContextMismatchError, match="another weights"):
        load(tiny_model(seed=1), plan, saved)
    other = tiny_model(head_dim=32)
    with pytest.raises(ContextMismatchError, match="another architecture"):
        load(other, uneven_plan(other), saved)
    with pytest.raises(ContextMismatchError, match="another method"):
        load(model, plan, saved, method="evict")
    with pytest.raises(ContextMismatchError, match="another plan"):
        load(model, uneven_plan(model, budget=0.3), saved)


def test_another_dtype_is_refused(plan: Plan, saved: Path) -> None:
    with pytest.raises(ContextMismatchError, match="float32"):
        load(tiny_model().to(torch.bfloat16), plan, saved)


@pytest.mark.parametrize("cut", [0, 5, 200, -1])
def test_truncated_files_are_refused(model: Any, plan: Plan, saved: Path, cut: int) -> None:
    saved.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(ContextFormatError, match="damaged or cut short"):
        load(model, plan, saved)


def test_a_flipped_bit_is_noticed(model: Any, plan: Plan, saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-100] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ContextFormatError, match="changed since it was saved"):
        load(model, plan, saved)


def rewritten(path: Path, metadata: dict[str, str | None] | None = None, drop: str = "") -> Path:
    """The file with some metadata replaced (None: removed) or a tensor dropped, and a digest that fits."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != drop}  # noqa: SIM118
        fields = file.metadata() | (metadata or {})
    fields |= {"sha256": _digest(tensors)}
    save_file(tensors, path, {name: text for name, text in fields.items() if text is not None})
    return path


@pytest.mark.parametrize(
    ("metadata", "drop", "message"),
    [
        ({"format": "other"}, "", "not one written by"),
        ({"version": "9"}, "", "version 9"),
        ({"plan": None}, "", "plan missing"),
        ({"seen": "-3"}, "", "expected a number"),
        ({"seen": "7"}, "", "token ids"),
        ({"model": "{"}, "", "metadata cannot be read"),
        ({}, "ids", "ids is missing"),
        ({}, "layers.3.keys", "found 3 layers"),
        ({}, "layers.2.values", "values is missing"),
    ],
    ids=str,
)
def test_damaged_files_are_refused(
    model: Any, plan: Plan, saved: Path, metadata: dict[str, str | None], drop: str, message: str
) -> None:
    with pytest.raises(ContextFormatError, match=message):
        load(model, plan, rewritten(saved, metadata, drop))


def test_what_is_no_file(model: Any, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load(model, plan, tmp_path / "absent")
    with flowmm.compress(model, plan) as run:
        with pytest.raises(InputError, match="nothing to save"):
            run.save(tmp_path / "x", run.new_cache())
        model.generate(**tiny_inputs(PROMPT), max_new_tokens=3, cache_implementation="static")
        with pytest.raises(InputError, match="static"):
            run.save(tmp_path / "x")
        model(**tiny_inputs(PROMPT))
        with pytest.raises(InputError, match="cannot be written"):
            run.save(tmp_path / "absent" / "x")


def test_metadata_is_readable_by_others(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        fields = file.metadata()
    assert fields["format"] == "flowmm.context"
    assert json.loads(fields["model"])["config_sha256"]
