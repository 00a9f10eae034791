"""Decoding on a GPU with random weights of Qwen2.5-VL-7B's shape: batches, lengths, budgets, largest batch, a trace.

``python benchmarks/gpu.py`` writes ``benchmarks/results/gpu.json`` and, of one decode step on the full and on a
compressed cache, ``gpu_trace_*.json`` (for chrome://tracing) and ``gpu_trace_*.txt`` (where the time goes). The paper's
full cache (table 2) of 2.06 GiB is 38.6k tokens of this shape in bf16.
``python benchmarks/gpu.py --shape tiny --device cpu --dtype fp32 --tokens 200 --batch 1`` tries it anywhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import flowmm
from flowmm.models import text_config
from flowmm.models.random_weights import image_prompt, random_model
from flowmm.runtime import bench
from flowmm.runtime.bench_grid import Limits, cells, run_grid, table
from flowmm.runtime.measurements import CACHE_KINDS

RESULTS = Path(__file__).with_name("results")
PAPER_TOKENS = 38600


def numbers(kind: Any) -> Any:
    """A comma-separated list of `kind`."""
    return lambda text: [kind(part) for part in text.split(",")]


def cache_gib(model: Any, tokens: int, budget: float) -> float:
    """Table 2 of the paper by arithmetic: GiB of one prompt's cache."""
    return tokens * budget * bench.entry_bytes(model) * text_config(model.config).num_hidden_layers / 2**30


@torch.no_grad()
def largest_batch(model: Any, length: int, budget: float, limit: int) -> int:
    """How many prompts, up to `limit`, have room for their caches beside the weights.

    Prompts are prefilled one at a time and their caches kept, as a server does that admits them one by one. All
    prompts are alike, so where one cache and one prefill are small against the memory, the number is found by dividing:
    the second prefill tells what a cache takes, a last one beside stand-ins of that size shows that it is true.
    """
    plan, inputs = bench.fixed_plan(model), image_prompt(model, length)
    caches: list[Any] = []
    with flowmm.compress(model, plan, budget=budget) as run:

        def admit() -> None:
            caches.append(run.new_cache())
            model(**inputs, past_key_values=caches[-1], logits_to_keep=1)

        try:
            admit()
            if model.device.type == "cuda":
                _stand_ins(model, caches, limit, admit)
            while len(caches) < limit:
                admit()
        except torch.OutOfMemoryError:
            caches.pop()
    fitting = len(caches)
    caches.clear()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return fitting


def _stand_ins(model: Any, caches: list[Any], limit: int, admit: Any) -> None:
    """Fill `caches` with tensors of a cache's size while another prefill surely fits behind them."""
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    admit()
    held = torch.cuda.memory_allocated(model.device) - before
    prefill = torch.cuda.max_memory_allocated(model.device) - before
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(model.device)
    # What is left open is filled by real prefills, the last of which may fail.
    for _ in range(min(limit - len(caches) - 1, int((free - prefill) / held) - 4)):
        caches.append(torch.empty(held, dtype=torch.uint8, device=model.device))


@torch.no_grad()
def trace(model: Any, length: int, budget: float, out: Path) -> None:
    """Profile one decode step on a cache: a timeline, and a table of its operators."""
    device = model.device.type
    with flowmm.compress(model, bench.fixed_plan(model), budget=budget) as run:
        cache = run.new_cache()
        logits = model(**image_prompt(model, length), past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        for _ in range(bench.WARM_UP_TOKENS):
            token = model(input_ids=token, past_key_values=cache).logits[:, -1:].argmax(-1)
        with torch.profiler.profile() as profile:
            model(input_ids=token, past_key_values=cache)
            if device == "cuda":
                torch.cuda.synchronize(model.device)
    name = f"gpu_trace_{length}_{budget:g}"
    profile.export_chrome_trace(str(out / f"{name}.json"))
    shown = profile.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=25)
    (out / f"{name}.txt").write_text(shown, encoding="utf-8")


def summary(model: Any, lengths: Sequence[int], budgets: Sequence[float], limit: int) -> dict[str, Any]:
    """The paper's table 2, and how many prompts fit, with the caches beside the weights."""
    return {
        "table_2": [
            {"tokens": PAPER_TOKENS, "budget": budget, "cache_gib": round(cache_gib(model, PAPER_TOKENS, budget), 3)}
            for budget in sorted({*budgets, 1.0})
        ],
        "largest_batch": [
            {"tokens": length, "budget": budget, "rows": largest_batch(model, length, budget, limit)}
            for length in lengths
            for budget in budgets
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-vl-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--tokens", type=numbers(int), default=[8192, PAPER_TOKENS, 65536, 131072])
    parser.add_argument("--batch", type=numbers(int), default=[1, 4, 8, 16, 32])
    parser.add_argument("--budgets", type=numbers(float), default=[0.05, 0.2, 0.4, 0.6, 1.0])
    parser.add_argument("--caches", type=numbers(str), default=list(CACHE_KINDS))
    parser.add_argument("--eager", action="store_true", help="no compiled merging, no CUDA graphs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--largest", type=int, default=512, help="stop looking for a larger batch there")
    parser.add_argument("--minutes", type=float, help="begin no prompt that would not end within so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true", help="keep the prompts that gpu.json already holds")
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    model = random_model(arguments.shape, device=arguments.device, dtype=arguments.dtype)
    caches, budgets = tuple(arguments.caches), tuple(arguments.budgets)
    settings = bench.Settings(
        caches, budgets, rounds=arguments.rounds, new_tokens=arguments.new_tokens, compiled=not arguments.eager
    )
    # What takes little time comes first, so that a run that is cut short has it.
    described = summary(model, arguments.tokens, budgets, arguments.largest)
    for budget in sorted({min(budgets), 1.0}):
        trace(model, arguments.tokens[0], budget, arguments.out)
    path = arguments.out / "gpu.json"
    result = run_grid(
        model,
        cells(arguments.tokens, arguments.batch),
        settings,
        limits=Limits(arguments.minutes, _free_gib(model)),
        out=path,
        resume=arguments.resume,
        note=arguments.note,
        progress=print,
    )
    path.write_text(json.dumps(result | described, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def _free_gib(model: Any) -> float | None:
    return torch.cuda.mem_get_info(model.device)[0] / 2**30 if model.device.type == "cuda" else None


if __name__ == "__main__":
    main()
