"""flowmm beside other libraries on one random-weight model and one prompt, each library in its own environment.

``python benchmarks/peers/run.py`` measures what ``build.py`` made and writes ``benchmarks/results/peers_cpu.json``.
Prefills and decoding go round all libraries in turns. Ratios are to transformers' growing cache in the same
environment, because libraries need different versions of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from build import ENVIRONMENTS, REQUIREMENTS, python_of
from safetensors.torch import save_file

from flowmm.models import text_config
from flowmm.models.random_weights import image_prompt, random_model
from flowmm.runtime.measurements import Figure, environment
from flowmm.runtime.roofline import MIB, entry_bytes

RESULT = Path(__file__).parents[1] / "results" / "peers_cpu.json"
WORKER = Path(__file__).with_name("worker.py")


class Library:
    """A worker process."""

    def __init__(self, peer: str, python: Path, directory: Path, device: str, threads: int) -> None:
        self.peer = peer
        self._log = directory / f"{peer}.log"
        words = [python, WORKER, peer, directory, "--device", device, "--threads", threads]
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [str(word) for word in words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            SystemExit: the process has ended; with the end of what it wrote to stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.peer}: its process ended\n{self._log.read_text(encoding='utf-8')[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def libraries_at(directory: Path, named: Sequence[str]) -> dict[str, Path]:
    """Interpreters of flowmm and of the peers that are there.

    Raises:
        SystemExit: none is, or one that was asked for is not.
    """
    found = {peer: python_of(directory / peer) for peer in REQUIREMENTS}
    found = {peer: python for peer, python in found.items() if python.exists()}
    missing = set(named) - set(found)
    if missing or not found:
        raise SystemExit(f"{directory}: no environment for {', '.join(missing or REQUIREMENTS)}; make it with build.py")
    return {"flowmm": Path(sys.executable)} | {peer: found[peer] for peer in named or found}


def measure(
    libraries: Sequence[Library], budget: float, rounds: int, new_tokens: int
) -> tuple[dict[tuple[str, str], dict[str, Any]], list[dict[str, str]]]:
    """Times and bytes of every method that runs, and why others do not."""
    contestants = [(library, method) for library in libraries for method in library.ask()["methods"]]
    taken: dict[tuple[str, str], dict[str, Any]] = {}
    failed = []
    for library, method in contestants:
        answer = library.ask(method=method, budget=budget, new_tokens=new_tokens, memory=True)
        if "error" in answer:
            failed.append({"peer": library.peer, "method": method, "reason": answer["error"]})
        else:
            taken[library.peer, method] = answer | {"ttft": [], "token": []}
    for turn in range(rounds):
        first = turn % len(contestants)
        for library, method in contestants[first:] + contestants[:first]:
            times = taken.get((library.peer, method))
            if times is None:
                continue
            answer = library.ask(method=method, budget=budget, new_tokens=new_tokens, memory=False)
            if "error" in answer:
                failed.append({"peer": library.peer, "method": method, "reason": answer["error"]})
                del taken[library.peer, method]
                continue
            times["ttft"].append(answer["ttft_s"])
            times["token"].append(Figure.of(answer["token_s"]).median)
    return taken, failed


def rows_of(
    taken: dict[tuple[str, str], dict[str, Any]], tokens: int, batch: int, budget: float, layer_bytes: int, layers: int
) -> list[dict[str, Any]]:
    """One JSON object per method, under the names that ``flowmm bench`` uses."""
    rows = []
    for (peer, method), times in taken.items():
        plain = taken[peer, "plain"]
        share = 1.0 if method == "plain" else budget
        figures = {
            "ttft_s": Figure.of(times["ttft"]),
            "ttft_ratio": Figure.of([a / b for a, b in zip(times["ttft"], plain["ttft"], strict=True)]),
            "token_s": Figure.of(times["token"]),
            "token_ratio": Figure.of([a / b for a, b in zip(times["token"], plain["token"], strict=True)]),
        }
        rows.append(
            {"tokens": tokens, "batch": batch, "peer": peer, "method": method, "budget": share}
            | {name: asdict(figure) for name, figure in figures.items()}
            | {
                "prompt_bytes": times["cache_bytes"],
                "contract_bytes": int(share * tokens) * layer_bytes // tokens * layers,
                "peak_bytes": times["peak_bytes"],
                "peak_over_dynamic_layers": (times["peak_bytes"] - plain["peak_bytes"]) / layer_bytes,
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]], failed: Sequence[dict[str, str]]) -> str:
    """For a terminal."""
    lines = [("library", "method", "kept", "TTFT", "ratio", "token", "ratio", "KV MiB", "of asked", "peak, layers")]
    for row in rows:
        cells = (
            f"{row['budget']:.0%}",
            f"{row['ttft_s']['median'] * 1e3:.0f} ms",
            f"{row['ttft_ratio']['median']:.2f}",
            f"{row['token_s']['median'] * 1e3:.2f} ms",
            f"{row['token_ratio']['median']:.2f}",
            f"{row['prompt_bytes'] / MIB:.2f}",
            f"{row['prompt_bytes'] / row['contract_bytes']:.3f}",
            f"{row['peak_over_dynamic_layers']:+.2f}",
        )
        lines.append((row["peer"], row["method"], *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*shown, *(f"does not run: {fail['peer']} {fail['method']}: {fail['reason']}" for fail in failed)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=Path, default=ENVIRONMENTS, help="where build.py made environments")
    parser.add_argument("--peer", action="append", default=[], help="default: all that are there")
    parser.add_argument("--shape", default="small", help="of random weights: tiny, small, medium, ...")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--note", default="")
    arguments = parser.parse_args()
    interpreters = libraries_at(arguments.at, arguments.peer)
    torch.set_num_threads(arguments.threads)
    model = random_model(arguments.shape, dtype=arguments.dtype)
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        model.save_pretrained(directory)
        save_file(image_prompt(model, arguments.tokens, arguments.batch), directory / "inputs.safetensors")
        libraries = [
            Library(peer, python, directory, arguments.device, arguments.threads)
            for peer, python in interpreters.items()
        ]
        versions = {library.peer: library.ask()["versions"] for library in libraries}
        taken, failed = measure(libraries, arguments.budget, arguments.rounds, arguments.new_tokens)
        for library in libraries:
            library.close()
    layer_bytes = arguments.tokens * arguments.batch * entry_bytes(model)
    layers = text_config(model.config).num_hidden_layers
    rows = rows_of(taken, arguments.tokens, arguments.batch, arguments.budget, layer_bytes, layers)
    result = {
        "environment": environment(arguments.note),
        "versions": versions,
        "shape": arguments.shape,
        "rounds": arguments.rounds,
        "new_tokens": arguments.new_tokens,
        "not_measured": failed,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(rows, failed))


if __name__ == "__main__":
    main()
