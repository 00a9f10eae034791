"""The bench measures what it says, prints it, and can be read by a machine. Nothing here asserts a time."""

from __future__ import annotations

import json
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
from flowmm.runtime import bench


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("tiny")


@pytest.fixture(scope="module")
def rows(model: Any) -> list[bench.Row]:
    return bench.bench(model, image_prompt(model, 200), budgets=(0.2, 1.0), rounds=1, new_tokens=2, bandwidth=1e9)


def test_every_cache_has_a_row(rows: list[bench.Row]) -> None:
    assert [row.cache for row in rows] == ["dynamic", "static", "flowmm 0.2", "flowmm 1"]
    assert all((row.tokens, row.batch) == (200, 1) for row in rows)
    assert rows[0].token_ratio.median == rows[0].prefill_ratio.median == 1
    assert all(0 < row.token_s.low <= row.token_s.median <= row.token_s.high for row in rows)


def test_bytes_are_the_contract(model: Any, rows: list[bench.Row]) -> None:
    text = text_config(model.config)
    per_entry = 2 * text.num_key_value_heads * 16 * 4
    full = text.num_hidden_layers * 200 * per_entry
    by_name = {row.cache: row for row in rows}
    assert by_name["dynamic"].prompt_bytes == by_name["static"].prompt_bytes == full
    assert by_name["flowmm 1"].prompt_bytes == by_name["flowmm 1"].contract_bytes == full
    assert by_name["flowmm 0.2"].contract_bytes == full // 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_is_at_most_a_hundredth_at_real_head_dimensions(dtype: torch.dtype) -> None:
    model = tiny_model(layers=1, heads=2, kv_heads=1, head_dim=64).to(dtype)
    prompt = image_prompt(model, 120)
    rows = bench.bench(model, prompt, budgets=(0.2,), rounds=1, new_tokens=1, bandwidth=1e9)
    contract = 24 * 2 * 64 * dtype.itemsize
    assert rows[2].contract_bytes == contract
    assert contract < rows[2].prompt_bytes <= 1.01 * contract


def test_the_roofline_counts_weights_and_cache(model: Any, rows: list[bench.Row]) -> None:
    weights = sum(weight.nbytes for weight in model.get_decoder().parameters())
    assert bench.bytes_per_token(model) == weights, "the output head is the input embedding here"
    for row in rows:
        assert row.roofline_s == pytest.approx((weights + row.prompt_bytes) / 1e9)
        assert row.roofline_ratio == pytest.approx(row.token_s.median / row.roofline_s)


def test_peak_memory_sees_what_was_taken() -> None:
    with bench._PeakMemory(torch.device("cpu")) as peak:
        torch.ones(64 * bench.MIB // 4)
    assert peak.extra is None or 56 * bench.MIB < peak.extra < 80 * bench.MIB


def test_shapes_are_what_they_are_called() -> None:
    text = text_config(SHAPES["qwen2.5-vl-7b"]())
    with torch.device("meta"):
        real = random_model("qwen2.5-vl-7b", device="meta", dtype="bf16")
    assert sum(weight.numel() for weight in real.parameters()) == 8_292_166_656
    per_token = text.num_hidden_layers * 2 * text.num_key_value_heads * 128 * 2
    assert round(2.06 * 2**30 / per_token, -2) == 38_600, "the paper's full cache"
    assert fingerprint_model(random_model("tiny")).num_layers == 2


def test_prompts_have_the_length_asked_for(model: Any) -> None:
    inputs = image_prompt(model, 700, batch=3)
    assert inputs["input_ids"].shape == (3, 700)
    assert int(inputs["mm_token_type_ids"].sum()) == 3 * 256
    with pytest.raises(InputError, match="too short"):
        image_prompt(model, 40)
    with pytest.raises(InputError, match="expected one of the shapes"):
        random_model("huge")


def test_command_prints_and_writes(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "bench.json"
    words = [
        "bench",
        "--shape",
        "tiny",
        "--tokens",
        "120,200",
        "--budgets",
        "0.2",
        "--rounds",
        "1",
        "--new-tokens",
        "1",
    ]
    assert cli.main([*words, "--device", "cpu", "--out", str(out), "--note", "a test"]) == 0
    shown = capsys.readouterr().out
    assert "flowmm 0.2" in shown
    assert "/ roofline" in shown
    result = json.loads(out.read_text())
    assert [row["tokens"] for row in result["rows"]] == [120, 120, 120, 200, 200, 200]
    assert result["environment"]["note"] == "a test"
    assert result["model"]["layers"] == 2
    assert cli.main(["bench", "--tokens", "few"]) == 2


def test_the_gpu_script_runs_on_a_tiny_shape(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    words = ["--shape", "tiny", "--device", "cpu", "--dtype", "fp32", "--tokens", "120", "--batch", "1,2"]
    words += ["--budgets", "0.2", "--rounds", "1", "--new-tokens", "1", "--largest", "3", "--out", str(tmp_path)]
    subprocess.run([sys.executable, script, *words], check=True, capture_output=True)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["batch"] for row in result["rows"]] == [1, 1, 1, 2, 2, 2]
    assert result["largest_batch"] == [{"tokens": 120, "budget": 0.2, "rows": 2}]
    assert (tmp_path / "gpu_trace.json").stat().st_size > 0
