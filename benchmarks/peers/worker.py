"""One library under measurement, in its own environment: answers requests on stdin with results on stdout, JSON lines.

``run.py`` starts it. Only torch, transformers and the library itself are imported here.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

WARM_UP_TOKENS = 3


def peak_memory() -> Any:
    """flowmm's meter, a file that needs torch alone."""
    path = Path(__file__).parents[2] / "runtime" / "peak_memory.py"
    spec = importlib.util.spec_from_file_location("peak_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PeakMemory


@contextmanager
def plain(model: Any, _budget: float) -> Generator[Any]:
    """transformers' own growing cache."""
    yield DynamicCache(config=model.config.get_text_config(decoder=True))


@contextmanager
def flowmm_robust(model: Any, budget: float) -> Generator[Any]:
    """flowmm with the layers' modes decided beforehand."""
    from flowmm import compress
    from flowmm.runtime.bench import fixed_plan

    with compress(model, fixed_plan(model), budget=budget) as run:
        yield run.new_cache()


def kvpress_press(make: Callable[[Any, float], Any]) -> Any:
    """A press of kvpress, which takes the share that is removed."""

    @contextmanager
    def pressed(model: Any, budget: float) -> Generator[Any]:
        library = importlib.import_module("kvpress")
        with plain(model, budget) as cache, make(library, 1 - budget)(model):
            yield cache

    return pressed


def mllm_method(name: str) -> Any:
    """A method of mllm-kvcompress, which takes the share that is removed."""

    @contextmanager
    def compressed(model: Any, budget: float) -> Generator[Any]:
        library = importlib.import_module("mllm_kvcompress")
        method = library.create_method(name, ratio=1 - budget)
        with plain(model, budget) as cache, library.compress(model, method):
            yield cache

    return compressed


# Presses end with the prefill, as their own pipeline has it; the others stay for decoding.
METHODS: dict[str, dict[str, Any]] = {
    "flowmm": {"plain": plain, "robust": flowmm_robust},
    "kvpress": {
        "plain": plain,
        "knorm": kvpress_press(lambda library, removed: library.KnormPress(removed)),
        "merging": kvpress_press(lambda library, removed: library.MergingPress(library.KnormPress(removed))),
    },
    "mllm-kvcompress": {
        "plain": plain,
        "look_m": mllm_method("look_m"),
        "meda": mllm_method("meda"),
        "mixkv": mllm_method("mixkv"),
    },
}
LEAVES_AFTER_PREFILL = ("kvpress",)


class Worker:
    """The model, its prompt and one library."""

    def __init__(self, peer: str, directory: Path, device: str) -> None:
        self.peer = peer
        self.model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, attn_implementation="sdpa")
        self.model.eval().to(device)
        known = inspect.signature(self.model.forward).parameters
        inputs = load_file(directory / "inputs.safetensors", device=device)
        self.inputs = {name: tensor for name, tensor in inputs.items() if name in known}

    def describe(self) -> dict[str, Any]:
        """Methods and versions."""
        found = {}
        for package in (self.peer, "torch", "transformers"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "unknown"
        return {"methods": list(METHODS[self.peer]), "versions": found}

    @torch.no_grad()
    def measure(self, method: str, budget: float, new_tokens: int, memory: bool) -> dict[str, Any]:
        """Seconds to the first token and per later token, bytes of the prompt's cache; `memory`: its peak instead."""
        with ExitStack() as stack:
            cache = stack.enter_context(METHODS[self.peer][method](self.model, budget))
            if memory:
                with peak_memory()(self.model.device) as peak:
                    self._prefill(cache)
                return {"peak_bytes": peak.extra, "cache_bytes": _bytes_of(cache)}
            self._wait()
            start = time.perf_counter()
            token = self._prefill(cache)
            first = time.perf_counter() - start
            held = _bytes_of(cache)
            if self.peer in LEAVES_AFTER_PREFILL:
                stack.close()
            return {"ttft_s": first, "token_s": self._decode(cache, token, new_tokens), "cache_bytes": held}

    def _prefill(self, cache: Any) -> torch.Tensor:
        logits = self.model(**self.inputs, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        token.tolist()
        return token

    def _decode(self, cache: Any, token: torch.Tensor, count: int) -> list[float]:
        batch, length = self.inputs["input_ids"].shape
        # Positions go on behind the prompt, however many entries are left of it.
        start = (length + self.model.model.rope_deltas).expand(3, batch, 1)
        times = []
        for step in range(WARM_UP_TOKENS + count):
            self._wait()
            began = time.perf_counter()
            logits = self.model(input_ids=token, position_ids=start + step, past_key_values=cache).logits
            token = logits[:, -1:].argmax(-1)
            self._wait()
            times.append(time.perf_counter() - began)
        return times[WARM_UP_TOKENS:]

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)


def _bytes_of(cache: Any) -> int:
    held = getattr(cache, "nbytes", None)
    if held is not None:
        return held
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=list(METHODS))
    parser.add_argument("directory", type=Path, help="a checkpoint with inputs.safetensors beside it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Libraries print as they like; the answers go where nothing else is written.
    answers, sys.stdout = sys.stdout, sys.stderr
    worker = Worker(arguments.peer, arguments.directory, arguments.device)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = worker.measure(**request) if request else worker.describe()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
