"""How many entries each layer keeps: exact integers from a ratio or a token count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from flowmm.errors import BudgetError

Budget = float | int
Entries = Callable[[int], Sequence[int]]
"""From a prompt's length to the entries that each layer keeps."""


def validate_budget(budget: Budget) -> Budget:
    """Accept a ratio (``float`` in (0, 1]) or entries per layer (``int`` >= 1).

    Raises:
        BudgetError: anything else; the message says which of the two readings was tried.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise BudgetError(f"budget {budget!r}: expected a ratio such as 0.2 or a whole number of entries such as 512")
    if isinstance(budget, int):
        if budget < 1:
            raise BudgetError(f"budget {budget}: a layer keeps at least 1 entry")
    elif not 0 < budget <= 1:
        raise BudgetError(f"budget {budget}: a ratio lies in (0, 1]; for a number of entries pass an int")
    return budget


def entry_budget(length: int, budget: Budget, min_kept: int = 1) -> int:
    """Entries kept of `length`: ``max(floor(ratio * length), min_kept)``, never more than `length`.

    The epsilon keeps products such as 0.29 * 100 from losing an entry to binary rounding.
    """
    asked = budget if isinstance(budget, int) else math.floor(budget * length + 1e-9)
    return min(max(asked, min_kept), length)


def layer_entries(shares: Sequence[float], length: int, budget: Budget) -> list[int]:
    """Entries per layer whose sum is exactly ``num_layers * entry_budget(length, budget)``.

    Args:
        shares: relative weight of each layer (any positive scale; equal shares give a uniform budget).
        length: the prompt's entries.
        budget: ratio of `length`, or entries per layer on average.

    Returns:
        One integer per layer in [1, length], by largest remainder; what a cap takes away is given to the others.
    """
    total = len(shares) * entry_budget(length, budget)
    counts = [1] * len(shares)
    open_layers = set(range(len(shares)))
    while True:
        spare = total - sum(length if layer not in open_layers else 0 for layer in range(len(shares)))
        weight = sum(shares[layer] for layer in open_layers)
        exact = {layer: spare * shares[layer] / weight for layer in open_layers}
        capped = {layer for layer in open_layers if exact[layer] >= length}
        if not capped:
            break
        open_layers -= capped
        if not open_layers:
            return [length] * len(shares)
    for layer in range(len(shares)):
        counts[layer] = max(1, math.floor(exact[layer] + 1e-9)) if layer in open_layers else length
    return _spend_remainder(counts, exact, total, length)


def _spend_remainder(counts: list[int], exact: dict[int, float], total: int, length: int) -> list[int]:
    """Adjust floored counts one entry at a time, largest remainder first, until they sum to `total`."""
    remainder = {layer: exact.get(layer, counts[layer]) - counts[layer] for layer in range(len(counts))}
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        movable = [layer for layer in range(len(counts)) if 1 <= counts[layer] + step <= length]
        # Where every open layer is down to its one entry, a capped layer gives.
        open_ones = [layer for layer in movable if layer in exact] or movable
        layer = max(open_ones, key=lambda candidate: (step * remainder[candidate], -candidate))
        counts[layer] += step
        remainder[layer] -= step
    return counts


def planned_entries(layer_ratios: Callable[[float], Sequence[float]], budget: Budget) -> Entries:
    """Entries per layer for an overall budget, split as `layer_ratios` says for the ratio that the budget comes to."""

    def entries(length: int) -> list[int]:
        ratio = budget if isinstance(budget, float) else min(1.0, budget / length)
        return layer_entries(layer_ratios(ratio), length, budget)

    return entries


def all_entries(layers: int) -> Entries:
    """Every layer keeps everything."""
    return lambda length: [length] * layers
