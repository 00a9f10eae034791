"""Profiles that are killed, shared by several processes, stopped by their intervals, or only forecast."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from operator import length_hint
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny_checkpoint import write_checkpoint

from flowmm.cli import main
from flowmm.errors import InputError
from flowmm.models import LoadedModel, load_model
from flowmm.plans import FlowKind, MethodParameters, Plan
from flowmm.profiler import open_calibration, profile
from flowmm.profiler.forecast import forecast
from flowmm.profiler.profiling import FIRST_CHECK
from flowmm.profiler.progress import shown_progress
from flowmm.profiler.ranks import Ranks, rank_device, refuse_shared_stdin

PROMPTS = 40
KILLS = 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return load_model(str(checkpoint))


def timeless(plan: Path) -> dict[str, Any]:
    """The plan's values; equal ones have equal canonical texts but for the time."""
    return json.loads(plan.read_text()) | {"created_at": None}


def arguments(checkpoint: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--limit", str(PROMPTS), "--sensitivity-prompts", "2"]
    return ["profile", "--model", str(checkpoint), *sizes, "--out", str(out), *more]


def half_width(plan: Plan) -> float:
    intervals = [layer.rho.ci95 for layer in plan.layers if layer.rho is not None and layer.rho.ci95 is not None]
    assert len(intervals) == len(plan.layers)
    return max(high - low for low, high in intervals) / 2


def test_a_wide_enough_interval_stops_at_the_first_look(model: LoadedModel) -> None:
    prompts = open_calibration(["pocket"], limit=PROMPTS)
    whole = profile(model, prompts, source="pocket")
    width = half_width(whole)
    stopped = profile(model, prompts, source="pocket", until_ci=10 * width)
    assert stopped.calibration is not None
    assert stopped.calibration.n_samples == FIRST_CHECK
    assert half_width(stopped) <= 10 * width
    unreachable = profile(model, prompts, source="pocket", until_ci=width / 100)
    assert timeless_text(unreachable) == timeless_text(whole)


def timeless_text(plan: Plan) -> str:
    return plan.model_copy(update={"created_at": "2000-01-01T00:00:00Z"}).dumps()


@pytest.mark.parametrize("kind", ["lift", "nosink"])
def test_the_interval_that_counts_is_that_of_the_deciding_estimate(model: LoadedModel, kind: FlowKind) -> None:
    method = MethodParameters(rho_kind=kind)
    prompts = open_calibration(["pocket"], limit=FIRST_CHECK + 2)
    plan = profile(model, prompts, source="pocket", method=method, until_ci=1.0)
    assert plan.calibration is not None
    assert plan.calibration.n_samples == FIRST_CHECK
    assert plan.method.rho_kind == kind


def test_forecast_says_what_to_expect_and_writes_nothing(
    checkpoint: Path, model: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = forecast(model, open_calibration(["pocket"], limit=20))
    assert (expected.samples, expected.layers) == (20, 4)
    assert expected.tokens == round(20 * expected.tokens_per_sample) > 0
    assert expected.seconds == pytest.approx(20 * expected.seconds_per_sample)
    assert main(arguments(checkpoint, tmp_path / "plan.json", "--dry-run", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == PROMPTS
    assert not any(tmp_path.iterdir())


def test_forecast_of_a_stream_has_no_total(model: LoadedModel) -> None:
    samples = list(open_calibration(["pocket"], limit=2))
    expected = forecast(model, (sample for sample in samples))
    assert (expected.samples, expected.tokens, expected.seconds) == (None, None, None)
    assert "unknown number" in str(expected)


def test_command_line_decides_by_lift(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = ["--limit", "4", "--decide", "lift", "--sample-rows", "8", "--layer-budgets", "uniform", "-q", "--json"]
    assert main([*arguments(checkpoint, out), *options]) == 0
    plan = Plan.load(out)
    assert plan.method.rho_kind == "lift"
    for layer in plan.layers:
        assert layer.rho is not None
        assert (layer.mode == "cross") == ((layer.rho.lift_mean or 0) > 1)
    assert pq.read_table(tmp_path / "plan.records.parquet")["sampled_rho"].null_count == 0
    assert main([*arguments(checkpoint, out, "--overwrite"), "--decide", "lift", "--rho-kind", "raw"]) == 2


def test_progress_lines_have_a_rate_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 20.0, 40.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with shown_progress() as progress:
        assert progress is not None
        for finished in (1, 5, 9):
            progress(finished, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("1 of 100 prompts")
    assert lines[-1].endswith("9 of 100 prompts, 0.2 per second, 7 min 35 s left")


def test_one_process_is_rank_0_and_exchanges_nothing() -> None:
    assert Ranks().gather("x") == ["x"]
    assert [index for index in range(6) if Ranks(1, 3).takes(index)] == [1, 4]


def test_ranks_share_neither_stdin_nor_a_gpu_by_accident(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_shared_stdin(["-"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="stdin"):
        refuse_shared_stdin(["pocket", "-"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert rank_device("auto") == "cuda:1"
    assert rank_device("cpu") == "cpu"


# Imports the command once and forks a process per line of arguments: a start costs milliseconds, a kill is a kill.
LAUNCHER = """
import json, os, sys
import torch
from flowmm.cli import main
import flowmm.profiler.calibration, flowmm.profiler.decisions, flowmm.profiler.profiling, flowmm.models.loading
import flowmm.pocket.tasks, transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Launcher:
    """Runs the command in children of a process that has everything imported."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def run(self, arguments: list[str], kill_after: float | None = None) -> int:
        """Exit code of the command; -9 if it was killed before it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(arguments), file=self._process.stdin, flush=True)
        child = int(self._process.stdout.readline())
        if kill_after is not None:
            moment = time.monotonic() + kill_after
            # The launcher reaps a child that ends before its moment, which ends the wait.
            with contextlib.suppress(ProcessLookupError):
                while time.monotonic() < moment:
                    time.sleep(0.01)
                    os.kill(child, 0)
                os.kill(child, signal.SIGKILL)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """Wait for its end."""
        self._process.communicate()


def phase(out: Path) -> str:
    """How far a killed profile had come, from what it left on disk."""
    records = out.with_suffix(".records.parquet")
    if records.exists():
        return "measuring layers"
    return "measuring prompts" if list(records.with_name(records.name + ".parts").glob("*.parquet")) else "starting"


@pytest.mark.slow
def test_killed_twenty_times_in_a_row_it_ends_with_the_same_plan(checkpoint: Path, tmp_path: Path) -> None:
    """Each kill falls at a random moment of what a run of its own would still have to do."""
    moments = random.Random(0)
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    options = ["--limit", "8", "--sensitivity-prompts", "1", "--protocol", "aware", "--json"]
    launcher = Launcher()
    try:
        start = time.monotonic()
        assert launcher.run(arguments(checkpoint, whole, *options)) == 0
        length = time.monotonic() - start
        phases: list[str] = []
        while len(phases) < KILLS:
            code = launcher.run(arguments(checkpoint, cut, *options), moments.uniform(0, length))
            if code == -signal.SIGKILL:
                phases.append(phase(cut))
            else:
                # It ended first: what it made must be right, and the next one starts anew.
                assert code == 0
                assert timeless(cut) == timeless(whole)
                for left in tmp_path.glob("cut*"):
                    left.unlink()
        assert launcher.run(arguments(checkpoint, cut, *options)) == 0
    finally:
        launcher.close()
    fell = {name: phases.count(name) for name in sorted(set(phases))}
    print(f"kills while {fell}")
    assert len(fell) >= 2, f"all kills fell while {phases[0]}"
    assert timeless(cut) == timeless(whole)
    assert cut.with_suffix(".records.parquet").read_bytes() == whole.with_suffix(".records.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("cut*")) == ["cut.json", "cut.records.parquet"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--until-ci", "0.3"]], ids=["all", "until-ci"])
def test_any_number_of_ranks_makes_the_same_plan(checkpoint: Path, tmp_path: Path, more: list[str]) -> None:
    outs = [tmp_path / f"ranks{ranks}.json" for ranks in (1, 2, 3)]
    assert main(arguments(checkpoint, outs[0], "-q", "--json", *more)) == 0
    for ranks, out in enumerate(outs[1:], start=2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launcher, "-m", "flowmm.cli", *arguments(checkpoint, out, "-q", "--json", *more)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        assert timeless(out) == timeless(outs[0])
        records = [path.with_suffix(".records.parquet").read_bytes() for path in (out, outs[0])]
        assert records[0] == records[1]
    calibration = Plan.load(outs[0]).calibration
    assert calibration is not None
    assert calibration.n_samples == (FIRST_CHECK if more else PROMPTS)


def test_a_generator_can_be_profiled(model: LoadedModel) -> None:
    samples = list(open_calibration(["pocket"], limit=3))
    stream = (sample for sample in samples)
    assert length_hint(stream, -1) == -1
    assert timeless_text(profile(model, stream, source="pocket")) == timeless_text(
        profile(model, samples, source="pocket")
    )
