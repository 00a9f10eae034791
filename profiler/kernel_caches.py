"""Prompts of ever new lengths, and the kernels the CPU libraries would keep for each."""

from __future__ import annotations

import os

# oneDNN, and torch's layer above it, keep up to 1024 compiled kernels each: several MiB per prompt length.
KERNELS_KEPT = "16"
CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def bound_kernel_caches() -> None:
    """Keep memory flat over prompts of many lengths; works before the process's first matrix product.

    Sets environment variables of this process, and leaves those alone that the user has set.
    """
    for name in CAPACITIES:
        os.environ.setdefault(name, KERNELS_KEPT)
