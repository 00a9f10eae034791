"""What a token costs at least: the bytes it must read over the bandwidth at which this machine reads memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowmm.models import text_config

MIB = 2**20
# Larger than the last-level cache of common machines, so that a pass comes from memory.
READ_MIB = 192


class Bandwidth:
    """Bytes per second at which this machine reads memory, with as many threads as the model runs on.

    One matrix is read in two ways, as a sum and as a product with a vector; both read every byte once and write next to
    nothing, and the faster one counts.

    Attributes:
        times: seconds of every pass so far.
    """

    def __init__(self, device: torch.device, size_mib: int = READ_MIB) -> None:
        matrix, vector = torch.ones(size_mib * MIB // (4 * 1024), 1024, device=device), torch.ones(1024, device=device)
        self._matrix = matrix
        self._ways = (lambda: torch.mv(matrix, vector), matrix.sum)
        self.times: list[float] = []
        # The first pass pays for pages that nobody has touched.
        for way in self._ways:
            way()

    def read(self) -> float:
        """Time one pass."""
        self.times.append(min(map(self._timed, self._ways)))
        return self.nbytes / self.times[-1]

    def _timed(self, way: Callable[[], Tensor]) -> float:
        wait_for(self._matrix.device)
        start = time.perf_counter()
        way()
        wait_for(self._matrix.device)
        return time.perf_counter() - start

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes

    @property
    def best(self) -> float:
        """The fastest pass of at least nine."""
        while len(self.times) < 9:
            self.read()
        return self.nbytes / min(self.times)

    def describe(self) -> dict[str, Any]:
        """JSON values."""
        best = self.best
        return {
            "gb_s": round(best / 1e9, 2),
            "median_gb_s": round(self.nbytes / statistics.median(self.times) / 1e9, 2),
            "passes": len(self.times),
            "mib": self.nbytes // MIB,
        }


def bytes_per_token(model: Any) -> int:
    """Bytes of the weights that every decoded token reads: text layers and output head, not the input embedding."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    decoder = model.get_decoder()
    layers = sum(weight.nbytes for weight in decoder.parameters() if weight is not embedding)
    return layers + head.nbytes


@torch.no_grad()
def linear_layers(model: Any, bandwidth: Bandwidth, repeats: int = 9) -> dict[str, float]:
    """The linear layers of text and output head alone, on one row, as the library's kernels run them uncompiled.

    Returns:
        ``token_s``, the median, and ``roofline_ratio``, over reading their weights at the best bandwidth.
    """
    modules = [*model.get_decoder().modules(), model.get_output_embeddings()]
    layers = [module for module in modules if isinstance(module, torch.nn.Linear)]
    inputs = [layer.weight.new_ones(1, 1, layer.in_features) for layer in layers]
    times = []
    for _ in range(repeats):
        bandwidth.read()
        start = time.perf_counter()
        for layer, row in zip(layers, inputs, strict=True):
            layer(row)
        wait_for(model.device)
        times.append(time.perf_counter() - start)
    token = statistics.median(times)
    return {"token_s": token, "roofline_ratio": token * bandwidth.best / sum(layer.weight.nbytes for layer in layers)}


def entry_bytes(model: Any) -> int:
    """Bytes of one entry of one layer: a key and a value per KV head."""
    text = text_config(model.config)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_key_value_heads * dim * model.dtype.itemsize


def wait_for(device: torch.device) -> None:
    """Return when the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
