"""How long compiled code takes to start: in the first process that uses it, and in the next, which finds it on disk.

``python benchmarks/second_process.py`` writes ``benchmarks/results/second_process.json``. Each process compresses a
prompt on a random-weight model twice; what the first time takes beyond the second is what starting takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import flowmm
from flowmm.models import fingerprint_model
from flowmm.models.random_weights import image_prompt, random_model
from flowmm.plans import unprofiled_plan
from flowmm.runtime.measurements import environment

RESULT = Path(__file__).with_name("results") / "second_process.json"
# What is compiled, and tokens to generate: the first one comes from the prefill.
PARTS = {"merging": 1, "decoding": 4}


def start(part: str, shape: str, length: int) -> dict[str, float]:
    """Seconds the first prompt takes beyond the second: wall time, and processor time without g++; does it compile?"""
    model: Any = random_model(shape)
    inputs = image_prompt(model, length)
    plan = unprofiled_plan(fingerprint_model(model), flowmm_version=flowmm.__version__)
    tokens, clocks = PARTS[part], []
    merging, decoding = part == "merging", part == "decoding"
    with flowmm.compress(model, plan, budget=0.2, compile=merging, compile_decoding=decoding):
        for _ in range(2):
            before = time.perf_counter(), time.process_time()
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            clocks.append((time.perf_counter() - before[0], time.process_time() - before[1]))
    return {
        "seconds": round(clocks[0][0] - clocks[1][0], 1),
        "processor_seconds": round(clocks[0][1] - clocks[1][1], 1),
        "compiles": bool(torch._dynamo.utils.counters["inductor"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", help="of random weights")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="other processes were running on the machine")
    parser.add_argument("--start", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.start:
        print(json.dumps(start(arguments.start, arguments.shape, arguments.length)))
        return
    result: dict[str, Any] = {"environment": environment(arguments.note)}
    result |= {"shape": arguments.shape, "length": arguments.length}
    for part in PARTS:
        with tempfile.TemporaryDirectory() as folder:
            variables = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
            words = [sys.executable, *sys.argv, "--start", part]
            lines = [subprocess.run(words, env=variables, check=True, stdout=subprocess.PIPE).stdout for _ in range(2)]
        result[part] = dict(zip(("first_process", "second_process"), map(json.loads, lines), strict=True))
        print(json.dumps({part: result[part]}), flush=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
