"""The bench measures what it says, prints it, and can be read by a machine. Nothing here asserts a time."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from flowmm import cli
from flowmm.errors import InputError
from flowmm.models import fingerprint_model, text_config
from flowmm.models.random_weights import SHAPES, image_prompt, random_model
from flowmm.runtime import bench_grid
from flowmm.runtime.bench import Settings, bench
from flowmm.runtime.measurements import CACHE_KINDS, Figure, Row
from flowmm.runtime.peak_memory import PeakMemory
from flowmm.runtime.roofline import MIB, Bandwidth, bytes_per_token, entry_bytes, linear_layers


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("tiny")


@pytest.fixture(scope="module")
def rows(model: Any) -> list[Row]:
    meter = Bandwidth(torch.device("cpu"), size_mib=8)
    settings = Settings(CACHE_KINDS, rounds=2, new_tokens=2)
    return bench(model, image_prompt(model, 200, batch=2), settings, bandwidth=meter)


def test_every_cache_has_a_row(rows: list[Row]) -> None:
    assert [(row.cache, row.budget) for row in rows] == [
        ("dynamic", 1.0),
        ("static", 1.0),
        ("flowmm", 0.2),
        ("flowmm", 1.0),
        ("flowmm-static", 0.2),
        ("flowmm-static", 1.0),
    ]
    assert all((row.tokens, row.batch) == (200, 2) for row in rows)
    dynamic = rows[0]
    assert dynamic.token_ratio == dynamic.prefill_ratio == dynamic.ttft_ratio == Figure.of([1.0])
    for row in rows:
        assert 0 < row.token_s.least <= row.token_s.low <= row.token_s.median <= row.token_s.high
        assert row.tokens_per_s == pytest.approx(2 / row.token_s.median)
        assert 0 < row.prefill_s.median < row.ttft_s.median, "images and the first token's choice come on top"
        assert row.compile_prefill_s is None is row.compile_token_s


def test_figures_say_how_far_measurements_are_apart() -> None:
    assert Figure.of([5, 1, 2, 4, 3]) == Figure(median=3, low=2, high=4, least=1, greatest=5)


def test_bytes_are_the_contract(model: Any, rows: list[Row]) -> None:
    per_entry = 2 * text_config(model.config).num_key_value_heads * 16 * 4
    assert entry_bytes(model) == per_entry
    full = 2 * text_config(model.config).num_hidden_layers * 200 * per_entry
    contracts = [row.contract_bytes for row in rows]
    assert contracts == [full, full, full // 5, full, full // 5, full]
    assert [row.prompt_bytes for row in rows if row.cache in ("dynamic", "static")] == [full, full]
    assert next(row for row in rows if row.cache == "flowmm" and row.budget == 1).prompt_bytes == full


@pytest.mark.parametrize("kind", ["flowmm", "flowmm-static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_is_at_most_a_hundredth_at_real_head_dimensions(dtype: torch.dtype, kind: Any) -> None:
    model = tiny_model(layers=1, heads=2, kv_heads=1, head_dim=64).to(dtype)
    settings = Settings((kind,), budgets=(0.2,), rounds=1, new_tokens=1)
    row = bench(model, image_prompt(model, 120), settings, bandwidth=Bandwidth(model.device, 8))[1]
    contract = 24 * 2 * 64 * dtype.itemsize
    assert row.contract_bytes == contract
    assert contract < row.prompt_bytes <= 1.01 * contract


def test_the_roofline_counts_weights_and_cache(model: Any, rows: list[Row]) -> None:
    weights = sum(weight.nbytes for weight in model.get_decoder().parameters())
    assert bytes_per_token(model) == weights, "the output head is the input embedding here"
    best = (weights + rows[0].prompt_bytes) / rows[0].roofline_s
    for row in rows:
        assert row.roofline_s == pytest.approx((weights + row.prompt_bytes) / best)
        assert row.roofline_ratio == pytest.approx(row.token_s.median / row.roofline_s)


def test_linear_layers_alone_are_timed_against_their_bytes(model: Any) -> None:
    meter = Bandwidth(model.device, 8)
    alone = linear_layers(model, meter, repeats=2)
    head = model.get_output_embeddings().weight.nbytes
    weights = sum(weight.nbytes for name, weight in model.get_decoder().named_parameters() if "proj.weight" in name)
    assert alone["roofline_ratio"] == pytest.approx(alone["token_s"] * meter.best / (weights + head))


def test_bandwidth_is_the_best_of_several_reads() -> None:
    meter = Bandwidth(torch.device("cpu"), size_mib=8)
    best = meter.best
    assert len(meter.times) == 9
    assert best == 8 * MIB / min(meter.times)
    meter.times.append(min(meter.times) / 2)
    assert meter.best == pytest.approx(2 * best)


def test_peak_memory_sees_what_was_taken() -> None:
    with PeakMemory(torch.device("cpu")) as peak:
        first = torch.ones(3 * MIB)
        del first
        second = torch.ones(2 * MIB)
        # Inside of one operator, too.
        (second.reshape(1024, -1) @ second.reshape(-1, 1024)).softmax(-1)
    assert peak.extra == 16 * MIB
    with PeakMemory(torch.device("cpu")) as peak:
        del second
    assert peak.extra == 0


@pytest.mark.slow
def test_compiled_rows_say_what_compiling_took(model: Any) -> None:
    settings = Settings(("static", "flowmm-static"), budgets=(0.2,), rounds=1, new_tokens=2, compiled=True)
    rows = bench(model, image_prompt(model, 120), settings, bandwidth=Bandwidth(model.device, 8))
    assert [row.compiled for row in rows] == [False, True, True]
    assert [row.compile_token_s is None for row in rows] == [True, False, False]
    assert [row.compile_prefill_s is None for row in rows] == [True, True, False]


def test_shapes_are_what_they_are_called() -> None:
    text = text_config(SHAPES["qwen2.5-vl-7b"]())
    with torch.device("meta"):
        real = random_model("qwen2.5-vl-7b", device="meta", dtype="bf16")
    assert sum(weight.numel() for weight in real.parameters()) == 8_292_166_656
    per_token = text.num_hidden_layers * 2 * text.num_key_value_heads * 128 * 2
    assert round(2.06 * 2**30 / per_token, -2) == 38_600, "the paper's full cache"
    assert fingerprint_model(random_model("tiny")).num_layers == 2
    medium = random_model("medium", device="meta")
    assert 100e6 < sum(weight.numel() for weight in medium.parameters()) < 500e6


def test_prompts_have_the_length_asked_for(model: Any) -> None:
    inputs = image_prompt(model, 700, batch=3)
    assert inputs["input_ids"].shape == (3, 700)
    assert int(inputs["mm_token_type_ids"].sum()) == 3 * 256
    with pytest.raises(InputError, match="too short"):
        image_prompt(model, 40)
    with pytest.raises(InputError, match="expected one of the shapes"):
        random_model("huge")


WORDS = ["bench", "--shape", "tiny", "--device", "cpu", "--budgets", "0.2", "--rounds", "1", "--new-tokens", "1"]


def test_command_prints_and_writes(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "bench.json"
    words = [*WORDS, "--methods", "robust,evict", "--caches", "flowmm"]
    assert cli.main([*words, "--tokens", "200,120", "--out", str(out), "--note", "a test"]) == 0
    captured = capsys.readouterr()
    assert "flowmm evict 0.2" in captured.out
    assert "/ roofline" in captured.out
    assert "120 tokens x 1: " in captured.err
    result = json.loads(out.read_text())
    assert [row["tokens"] for row in result["rows"]] == [120, 120, 120, 200, 200, 200]
    assert [row["method"] for row in result["rows"]] == [None, "robust", "evict"] * 2
    assert result["environment"]["note"] == "a test"
    assert result["model"]["layers"] == 2
    assert result["bandwidth"]["passes"] >= 9
    assert not result["not_measured"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "few"], "whole numbers"),
        (["--caches", "sliding"], "expected caches among"),
        (["--methods", "best"], "expected one of"),
        (["--resume"], "needs --out"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], message: str, capsys: Any) -> None:
    assert cli.main([*WORDS, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_grid_goes_on_where_it_stopped(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "bench.json"
    words = [*WORDS, "--caches", "dynamic", "--out", str(out)]
    assert cli.main([*words, "--tokens", "120,200,400", "--memory", "0.0003"]) == 0
    assert "not measured: 400 tokens x 1: its caches need 0.0" in capsys.readouterr().out
    first = json.loads(out.read_text())
    assert [cell["tokens"] for cell in first["cells"]] == [120, 200]
    assert cli.main([*words, "--tokens", "120,200,400", "--resume", "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["rows"][: len(first["rows"])] == first["rows"]
    assert [cell["tokens"] for cell in second["cells"]] == [120, 200, 400]
    assert not second["not_measured"]
    assert cli.main([*words, "--resume", "--new-tokens", "2"]) == 2
    assert "measured with another settings" in capsys.readouterr().err
    out.write_text("[]")
    assert cli.main([*words, "--resume"]) == 2


def test_a_grid_stops_in_time_and_says_so(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 30))
    monkeypatch.setattr(bench_grid.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(bench_grid, "bench", lambda *_, **__: [])
    result = bench_grid.run_grid(
        model, bench_grid.cells([100, 1000], [2, 1]), Settings(), limits=bench_grid.Limits(minutes=2)
    )
    assert [(cell["tokens"], cell["batch"]) for cell in result["cells"]] == [(100, 1)]
    assert [cell["batch"] for cell in result["not_measured"]] == [2, 1, 2]
    assert "within the 2 minutes" in result["not_measured"][0]["reason"]


def test_a_prompt_that_does_not_fit_is_named(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes")

    monkeypatch.setattr(bench_grid, "bench", fail)
    result = bench_grid.run_grid(model, [(120, 1)], Settings())
    assert result["not_measured"] == [{"tokens": 120, "batch": 1, "reason": "out of memory"}]
    monkeypatch.setattr(bench_grid, "bench", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench_grid.run_grid(model, [(120, 1)], Settings())


def test_the_gpu_script_runs_on_a_tiny_shape(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    words = ["--shape", "tiny", "--device", "cpu", "--dtype", "fp32", "--tokens", "120", "--batch", "1,2", "--eager"]
    words += ["--budgets", "0.2", "--rounds", "1", "--new-tokens", "1", "--largest", "3", "--out", str(tmp_path)]
    subprocess.run([sys.executable, script, *words], check=True, capture_output=True)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["batch"] for row in result["rows"]] == [1] * 4 + [2] * 4
    assert result["largest_batch"] == [{"tokens": 120, "budget": 0.2, "rows": 3}]
    assert [row["cache_gib"] for row in result["table_2"]] == [0.004, 0.018]
    assert sorted(path.suffix for path in tmp_path.glob("gpu_trace_120_*")) == [".json", ".json", ".txt", ".txt"]


def test_the_gpu_script_states_the_papers_table() -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "gpu.py"))
    with torch.device("meta"):
        model = random_model("qwen2.5-vl-7b", device="meta", dtype="bf16")
    assert round(script["cache_gib"](model, script["PAPER_TOKENS"], 1.0), 2) == 2.06


def test_the_cpu_script_measures_its_parts_and_shows_them_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "runtime_cpu.py"))
    assert set(script["PARTS"]) >= {"budgets", "long", "batch", "compiled"}
    small = Settings(("flowmm",), (0.2,), rounds=1, new_tokens=1)
    script["PARTS"].clear()
    script["PARTS"]["few"] = script["Part"](((120, 1), (120, 2)), small)
    words = ["runtime_cpu.py", "--shape", "tiny", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    script["main"]()
    measured = capsys.readouterr().out
    assert measured.count("flowmm 0.2") == 2
    assert json.loads((tmp_path / "runtime_cpu_few.json").read_text())["settings"]["budgets"] == [0.2]
    monkeypatch.setattr(sys, "argv", [*words, "--print"])
    script["main"]()
    assert capsys.readouterr().out == measured
