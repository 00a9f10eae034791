"""``flowmm check``: injected drifts are caught or tolerated as ``docs/drift.md`` says, and chance raises no alarm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_checkpoint import write_checkpoint

from flowmm import cli
from flowmm.errors import InputError, PlanMismatchError
from flowmm.models import LoadedModel, load_model
from flowmm.plans import Plan, PlanDiff, diff
from flowmm.profiler import CalibrationSample, load_calibration, profile
from flowmm.profiler.drift import Rule, as_planned, check, planned_prompts
from flowmm.profiler.prompt_rho import PromptRho, paired_changes, redrawn

PROMPTS = 6
RECORDS = "pocket.records.parquet"


@pytest.fixture(scope="module")
def samples() -> list[CalibrationSample]:
    return load_calibration("pocket", limit=PROMPTS)


@pytest.fixture(scope="module")
def folder(samples: list[CalibrationSample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pocket.json`` and its records, as ``flowmm profile`` leaves them."""
    directory = tmp_path_factory.mktemp("plans")
    plan = profile(load_model("pocket"), samples, source="pocket", records=directory / RECORDS)
    plan.save(directory / "pocket.json")
    return directory


@pytest.fixture(scope="module")
def plan(folder: Path) -> Plan:
    return Plan.load(folder / "pocket.json")


@pytest.fixture
def model() -> LoadedModel:
    return load_model("pocket")


@pytest.fixture
def checked(folder: Path, plan: Plan, samples: list[CalibrationSample]) -> Callable[..., PlanDiff]:
    def run(model: LoadedModel, prompts: list[CalibrationSample] | None = None, **rule: Any) -> PlanDiff:
        old_rho = PromptRho.of_plan(folder / RECORDS, plan)
        return check(model, plan, prompts or samples, source="pocket", rule=Rule(**rule), old_rho=old_rho)

    return run


def decoder(model: LoadedModel) -> Any:
    return model.model.model.language_model.layers


def drifted_layers(difference: PlanDiff) -> set[int]:
    return {change.layer for change in difference.drift if change.kind == "rho" and change.layer is not None}


def test_same_model_and_prompts_are_no_change(checked: Callable[..., PlanDiff], model: LoadedModel) -> None:
    difference = checked(model)
    assert not difference.drifted
    assert difference.paired
    assert difference.max_abs_rho == pytest.approx(0, abs=1e-4)


def rho_of(plan: Plan) -> list[float]:
    return [layer.rho.mean for layer in plan.layers if layer.rho is not None]


def test_one_perturbed_layer_is_found_without_the_fingerprint(
    checked: Callable[..., PlanDiff], model: LoadedModel, plan: Plan
) -> None:
    """Without queries a layer attends uniformly: that is drift where its rho was far from chance."""
    lifts = [layer.rho.lift_mean or 1.0 for layer in plan.layers if layer.rho is not None]
    distances = [abs(rho - rho / lift) for rho, lift in zip(rho_of(plan), lifts, strict=True)]
    broken = distances.index(max(distances))
    with torch.no_grad():
        for parameter in decoder(model)[broken].self_attn.q_proj.parameters():
            parameter.zero_()
    found = drifted_layers(checked(model, fail_on={"rho"}))
    assert broken in found
    assert min(found) == broken, "layers before it see the same"


def test_swapped_layers_are_found_without_the_fingerprint(
    checked: Callable[..., PlanDiff], model: LoadedModel, plan: Plan
) -> None:
    layers, rho = decoder(model), rho_of(plan)
    first = max(range(len(rho) - 1), key=lambda layer: abs(rho[layer + 1] - rho[layer]))
    states = [{name: t.clone() for name, t in layers[first + i].state_dict().items()} for i in (0, 1)]
    for layer, state in zip((first + 1, first), states, strict=True):
        layers[layer].load_state_dict(state)
    found = drifted_layers(checked(model, fail_on={"rho"}))
    assert found
    assert min(found) in (first, first + 1)


def test_a_fine_tune_is_model_drift_even_if_rho_stays(checked: Callable[..., PlanDiff], model: LoadedModel) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter *= 1 + 0.004 * torch.randn_like(parameter)
    difference = checked(model)
    assert {change.path for change in difference.drift} == {("model", "weights_sha256")}
    assert difference.max_abs_rho
    assert 0 < difference.max_abs_rho < 0.02


def test_another_image_size_is_found(
    checked: Callable[..., PlanDiff], model: LoadedModel, samples: list[CalibrationSample]
) -> None:
    def enlarged(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": part["image"].resize((96, 96))} if part["type"] == "image" else part

    larger = [
        replace(s, messages=[{**m, "content": [enlarged(part) for part in m["content"]]} for m in s.messages])
        for s in samples[:4]
    ]
    difference = checked(model, larger)
    assert not difference.paired
    assert len(drifted_layers(difference)) > 1


def test_another_chat_template_is_found_where_it_moves_rho(
    checked: Callable[..., PlanDiff], model: LoadedModel
) -> None:
    template = str(model.chat_template or model.tokenizer.chat_template)
    wordy = "Look at every picture with care before you say anything at all about any of them. " * 2
    assert len(drifted_layers(checked(replace(model, chat_template=wordy + template)))) > 1
    spaced = checked(replace(model, chat_template=template + " "))
    assert not spaced.drifted
    assert ("calibration", "chat_template_sha256") in {change.path for change in spaced.changes}
    assert diff(spaced.old, spaced.new, fail_on={"data"}).drifted


def test_another_dtype_is_told_and_tolerated(checked: Callable[..., PlanDiff]) -> None:
    difference = checked(load_model("pocket", dtype="fp32"))
    assert not difference.drifted
    assert ("model", "dtype") in {change.path for change in difference.changes}


def test_another_architecture_is_refused(
    checked: Callable[..., PlanDiff], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(write_checkpoint(tmp_path / "tiny"))
    with pytest.raises(PlanMismatchError, match="num_layers"):
        checked(load_model(other))
    assert cli.main(["check", "--plan", str(folder / "pocket.json"), "--model", other, "-q"]) == 3
    assert "made for pocket" in capsys.readouterr().err


def test_what_is_not_measured_stays_the_plans(plan: Plan) -> None:
    values = plan.as_json()
    values["layers"][0].update(budget=0.3, mode="intra", forced=True)
    values["layers"][1].update(budget=0.1, mode="online")
    flipped = "intra" if values["layers"][2]["mode"] == "cross" else "cross"
    values["layers"][2].update(mode=flipped, choice={"mode": flipped, "merge": "evict", "cost": [0.5, 0.1]})
    person = Plan.loads(json.dumps(values))
    assert diff(person, as_planned(plan, person)).changes == ()
    chosen = [change for change in diff(plan, person).changes if change.path == ("layers", 2, "choice")]
    assert [(change.kind, change.new) for change in chosen] == [("method", f"{flipped}, merge evict")]


def test_the_plan_names_its_prompts(plan: Plan, folder: Path) -> None:
    prompts, source, seed = planned_prompts(plan)
    assert (len(list(prompts)), source, seed) == (PROMPTS, "pocket", 0)
    assert plan.calibration is not None
    foreign = plan.model_copy(update={"calibration": plan.calibration.model_copy(update={"source": "mine.jsonl"})})
    with pytest.raises(InputError, match=r"measured on 'mine\.jsonl'.*--data"):
        planned_prompts(foreign)
    with pytest.raises(InputError, match="never measured"):
        planned_prompts(Plan.load(Path(__file__).parent.parent / "plans" / "qwen25vl.json"))


def test_records_of_another_plan_are_refused_or_left_alone(plan: Plan, folder: Path) -> None:
    values = plan.as_json()
    values["layers"][0]["rho"]["mean"] = 0.5
    other = Plan.loads(json.dumps(values))
    with pytest.raises(InputError, match="other measurements"):
        PromptRho.of_plan(folder / RECORDS, other)
    notes: list[str] = []
    assert paired_changes(plan, other, folder / RECORDS, folder / RECORDS, notes.append) is None
    assert "Comparing the plans' means" in notes[0]
    damaged = folder / "damaged.parquet"
    damaged.write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"damaged\.parquet"):
        PromptRho.of_plan(damaged, plan)


def test_prompts_pair_in_any_order() -> None:
    noise = np.random.default_rng(0)
    rho = noise.random((5, 2))
    old, order = PromptRho(tuple("abcde"), rho), [3, 0, 4, 1, 2]
    new = PromptRho(tuple("abcde"[i] for i in order), rho[order] + 0.1)
    changes = old.changes_to(new)
    assert changes is not None
    assert [(round(c.mean, 9), round(c.std, 9), c.n) for c in changes] == [(0.1, 0.0, 5)] * 2
    assert old.changes_to(PromptRho(tuple("abcdf"), rho)) is None


def test_check_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["check", "--plan", "pocket.json", "-q"]) == 0
    assert "paired" in (text := capsys.readouterr().out) or "no change" in text
    moved = Plan.load("pocket.json").as_json()
    # Further from theta, so that the mode stays.
    shifted = moved["layers"][4]["rho"]["mean"] + (0.2 if moved["layers"][4]["mode"] == "cross" else -0.2)
    moved["layers"][4]["rho"]["mean"] = shifted = round(min(max(shifted, 0.0), 1.0), 3)
    Plan.loads(json.dumps(moved)).save("moved.json")
    monkeypatch.setenv("GITHUB_OUTPUT", str(folder / "outputs"))
    assert cli.main(["check", "--plan", "moved.json", "--format", "github", "-q"]) == 1
    output = capsys.readouterr()
    line = next(n for n, row in enumerate(Path("moved.json").read_text().splitlines(), 1) if '"index": 4' in row)
    assert output.out.startswith(
        f"::error file=moved.json,line={line},title=flowmm drift::layer 4 rho {shifted:g} → 0."
    )
    assert output.err.startswith("flowmm: drift: 1 of")
    assert Path("outputs").read_text().startswith("drift=true\nmax_abs_rho=0.")


@pytest.mark.parametrize("arguments", [["--fail-on", "colour"], ["--tol", "2"], ["--alpha", "0"], ["--seed", "-1"]])
def test_wrong_options_stop_before_a_model_is_loaded(
    arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowmm.runtime.generation.load_planned_model", lambda *_, **__: pytest.fail("loaded"))
    assert cli.main(["check", "--plan", str(folder / "pocket.json"), *arguments]) == 2


def test_a_check_runs_in_one_process(
    checked: Callable[..., PlanDiff], model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        checked(model)


def test_diff_pairs_by_records(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, records = str(folder / "pocket.json"), str(folder / RECORDS)
    noted = tmp_path / "noted.json"
    noted.write_text(Path(plan).read_text().replace('"seed": 0', '"seed": 1'), encoding="utf-8")
    assert cli.main(["diff", plan, str(noted), "--records", records, records, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == "paired"
    assert cli.main(["diff", plan, str(noted), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["test"] == "welch"
    assert cli.main(["diff", plan, str(noted), "--records", records, plan]) == 2


def test_comparing_records_loads_no_torch(folder: Path) -> None:
    plan, records = str(folder / "pocket.json"), str(folder / RECORDS)
    command = ["diff", plan, plan, "--records", records, records]
    code = (
        f"import sys; from flowmm.cli import main; code = main({command!r}); "
        "print(code, {'torch', 'scipy', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 set()"


def normal(noise: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return noise.normal(size=size)


def skewed(noise: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    return noise.exponential(size=size) - 1


@pytest.mark.parametrize("draw", [normal, skewed])
@pytest.mark.parametrize("n", [8, 64])
def test_chance_alone_raises_an_alarm_in_at_most_one_of_a_hundred(draw: Callable[..., np.ndarray], n: int) -> None:
    """At tolerance 0, so that the statistics stand alone; layer 2 lies on theta, where its mode is a coin's."""
    plan = Plan.load(Path(__file__).with_name("test_plans_sample.json"))
    centre, noise = np.array([0.18, 0.21, plan.method.theta, 0.28, 0.41, 0.3]), np.random.default_rng(n)
    runs, alarms, unsettled = 1000, 0, 0
    for _ in range(runs):
        # Layers see the same prompts, so they move together.
        shared = [draw(noise, (n, 1)) for _ in range(2)]
        old, new = (redrawn(plan, centre + 0.02 * (common + draw(noise, (n, 6)))) for common in shared)
        difference = diff(old, new, tol=0)
        alarms += difference.drifted
        unsettled += bool(difference.unsettled)
    assert alarms / runs <= 0.02
    assert unsettled > 300


def test_a_move_of_two_tolerances_is_found() -> None:
    plan, noise = Plan.load(Path(__file__).with_name("test_plans_sample.json")), np.random.default_rng(0)
    centre = np.array([0.18, 0.21, 0.25, 0.28, 0.41, 0.3])
    found = 0
    for _ in range(200):
        old, new = (centre + noise.normal(0, 0.03, (64, 6)) for _ in range(2))
        new[:, 4] += 0.04
        found += diff(redrawn(plan, old), redrawn(plan, new)).drifted
    assert found >= 195


@pytest.mark.slow
def test_a_fresh_profile_of_the_shipped_plan_passes(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = str(Path(__file__).parent.parent / "plans" / "pocket.json")
    assert cli.main(["check", "--plan", shipped, "--seed", "11", "-q"]) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_clean_profiles_pass_95_times_of_100_or_better(model: LoadedModel, tmp_path: Path) -> None:
    """Draws of 32 from 256 fresh prompts, against the shipped plan and against each other."""
    shipped = Plan.load(Path(__file__).parent.parent / "plans" / "pocket.json")
    samples = load_calibration("pocket", limit=256, seed=77)
    fresh = profile(model, samples, source="pocket", seed=77, method=shipped.method, records=tmp_path / RECORDS)
    rho = PromptRho.of_plan(tmp_path / RECORDS, fresh).rho
    noise, against_shipped, against_each_other = np.random.default_rng(0), 0, 0
    for _ in range(100):
        first, second = np.split(noise.permutation(len(rho))[:64], 2)
        one, other = as_planned(redrawn(fresh, rho[first]), shipped), redrawn(fresh, rho[second])
        against_shipped += not diff(shipped, one).drifted
        against_each_other += not diff(redrawn(fresh, rho[first]), other).drifted
    assert against_shipped >= 95
    assert against_each_other >= 95
