"""What the runtime costs and saves on a CPU: every committed ``results/runtime_cpu_*.json``, one part after another.

``python benchmarks/runtime_cpu.py`` takes about half an hour on two idle cores; ``--part NAME`` measures one of
the parts, ``--print`` shows what is committed. Nothing else should run on the machine.
Freed memory stays with the process, because pages that come and go blur prefills by more than what is compared.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from flowmm.models.random_weights import random_model
from flowmm.runtime.allocator import keep_freed_memory
from flowmm.runtime.bench import Settings
from flowmm.runtime.bench_grid import Cell, Limits, run_grid, table

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Part:
    """Prompts that are measured alike."""

    cells: tuple[Cell, ...]
    settings: Settings


OURS = ("dynamic", "flowmm")
PARTS = {
    "budgets": Part(
        ((1024, 1), (2048, 1), (4096, 1)),
        Settings(("dynamic", "static", "flowmm"), (0.05, 0.2, 0.6, 1.0), rounds=5, new_tokens=48),
    ),
    "long": Part(((8192, 1),), Settings(OURS, (0.2, 1.0), rounds=3, new_tokens=48)),
    # Of prefills alone more rounds, because they scatter by more than what is compared; 1.0 is the control.
    "prefill": Part(((4096, 1), (8192, 1)), Settings(OURS, (0.2, 1.0), rounds=15, new_tokens=4)),
    "batch": Part(((1024, 4), (1024, 16), (4096, 4)), Settings(OURS, (0.2,), rounds=2, new_tokens=24)),
    "compiled": Part(
        ((4096, 1), (8192, 1)),
        Settings(("static", "flowmm-static"), (0.2,), rounds=3, new_tokens=48, compiled=True),
    ),
    "methods": Part(((4096, 1),), Settings(OURS, (0.2,), ("paper", "robust", "evict"), rounds=3, new_tokens=24)),
    "longest": Part(((16384, 1), (32768, 1)), Settings(OURS, (0.2,), rounds=1, new_tokens=24)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default: all, in this order")
    parser.add_argument("--shape", default="small", help="of random weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="per part; begin no prompt that would not end within so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--note", default="")
    parser.add_argument("--print", action="store_true", help="measure nothing; show what OUT holds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    kept = "freed memory kept" if keep_freed_memory() else ""
    note = "; ".join(filter(None, (arguments.note, kept)))
    model = None if arguments.print else random_model(arguments.shape)
    for name in arguments.part or PARTS:
        path, part = arguments.out / f"runtime_cpu_{name}.json", PARTS[name]
        if model is None:
            result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        else:
            limits = Limits(arguments.minutes, gib=12)
            result = run_grid(model, part.cells, part.settings, limits=limits, out=path, note=note)
        print(f"== {name}\n{table(result) if result else f'{path} is not there'}\n", flush=True)


if __name__ == "__main__":
    main()
