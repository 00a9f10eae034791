"""Decoding on a GPU with random weights of Qwen2.5-VL-7B's shape: batches, lengths, budgets, largest batch, a trace.

``python benchmarks/gpu.py`` writes ``benchmarks/results/gpu.json`` and ``gpu_trace.json`` (one decode step, for
chrome://tracing). The paper's full cache of 2.06 GiB is 38.6k tokens of this shape in bf16.
``python benchmarks/gpu.py --shape tiny --device cpu --dtype fp32 --tokens 200 --batch 1`` tries it anywhere.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import flowmm
from flowmm.models.random_weights import image_prompt, random_model
from flowmm.runtime import bench

RESULTS = Path(__file__).with_name("results")


def numbers(kind: Any) -> Any:
    """A comma-separated list of `kind`."""
    return lambda text: [kind(part) for part in text.split(",")]


def measured(model: Any, length: int, batch: int, arguments: argparse.Namespace, bandwidth: float) -> list[bench.Row]:
    """Rows of one prompt, none where even the compressed caches do not fit."""
    try:
        return bench.bench(
            model,
            image_prompt(model, length, batch),
            budgets=arguments.budgets,
            rounds=arguments.rounds,
            new_tokens=arguments.new_tokens,
            bandwidth=bandwidth,
        )
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return []


@torch.no_grad()
def largest_batch(model: Any, length: int, budget: float, limit: int) -> int:
    """The largest power of two of rows, up to `limit`, whose caches fit beside the weights after a prefill row by row.

    Rows are prefilled one at a time and their caches kept, as a server does that admits prompts one by one.
    """
    plan, caches = bench.fixed_plan(model), []
    inputs = image_prompt(model, length)
    with flowmm.compress(model, plan, budget=budget) as run:
        try:
            while len(caches) < limit:
                caches.append(run.new_cache())
                model(**inputs, past_key_values=caches[-1], logits_to_keep=1)
        except torch.OutOfMemoryError:
            caches.pop()
    fitting = len(caches)
    caches.clear()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return 1 << (fitting.bit_length() - 1) if fitting else 0


@torch.no_grad()
def trace(model: Any, length: int, budget: float, path: Path) -> None:
    """Profile one decode step on a compressed cache."""
    with flowmm.compress(model, bench.fixed_plan(model), budget=budget) as run:
        cache = run.new_cache()
        logits = model(**image_prompt(model, length), past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        for _ in range(bench.WARM_UP_TOKENS):
            token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        with torch.profiler.profile() as profile:
            model(input_ids=token, past_key_values=cache)
    profile.export_chrome_trace(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-vl-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--tokens", type=numbers(int), default=[8192, 38600, 65536, 131072])
    parser.add_argument("--batch", type=numbers(int), default=[1, 4, 8, 32])
    parser.add_argument("--budgets", type=numbers(float), default=[0.05, 0.2, 0.4, 0.6, 1.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--largest", type=int, default=64, help="stop looking for a larger batch there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    model = random_model(arguments.shape, device=arguments.device, dtype=arguments.dtype)
    bandwidth = bench.measured_bandwidth(model.device)
    rows: list[bench.Row] = []
    for length in arguments.tokens:
        for batch in arguments.batch:
            rows += measured(model, length, batch, arguments, bandwidth)
    result = bench.report(rows, model, bandwidth, arguments.note)
    result["largest_batch"] = [
        {"tokens": length, "budget": budget, "rows": largest_batch(model, length, budget, arguments.largest)}
        for length in arguments.tokens
        for budget in arguments.budgets
    ]
    arguments.out.mkdir(exist_ok=True)
    (arguments.out / "gpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    trace(model, arguments.tokens[0], arguments.budgets[0], arguments.out / "gpu_trace.json")
    print(bench.table(rows))


if __name__ == "__main__":
    main()
