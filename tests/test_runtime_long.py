"""A thousand prompts through one process: nothing grows, nothing is compiled twice, every answer is a fresh one's."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_runtime_oracle import uneven_plan
from tiny import tiny_inputs, tiny_model

import flowmm
from flowmm.runtime import compiled

PROMPTS = 1000
WARM_UP = 300
MIB = 2**20


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux' /proc")
def test_a_thousand_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model()
    plan, greedy = uneven_plan(model), {"max_new_tokens": 4, "do_sample": False}
    graph = torch.compile(compiled.merge_layer, fullgraph=True, dynamic=True, backend="eager")
    monkeypatch.setattr(compiled, "_compiled", lambda: graph)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    draw, sizes, graphs = random.Random(0), [], []
    with flowmm.compress(model, plan, budget=0.3, compile=True) as run:
        growing = run.new_cache()
        for turn in range(PROMPTS):
            rows = [[draw.randint(3, 20), -draw.choice([4, 9, 16, 25]), draw.randint(20, 120)]]
            inputs = tiny_inputs(rows, seed=turn)
            if turn % 2:
                answer = model.generate(**inputs, **greedy, cache_implementation="static")
            else:
                growing.reset()
                answer = model.generate(**inputs, **greedy, past_key_values=growing)
            if turn % 10 == 0:
                fresh = model.generate(**inputs, **greedy, past_key_values=run.new_cache())
                assert torch.equal(answer, fresh)
            if turn >= WARM_UP and turn % 100 == 99:
                gc.collect()
                sizes.append(resident())
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert max(sizes) - sizes[0] < 16 * MIB
    assert set(graphs) == {graphs[0]}
