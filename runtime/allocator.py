"""What the C library does with freed memory, which times of CPU code depend on."""

from __future__ import annotations

import ctypes

# Of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc to hand freed memory out again instead of giving it back; False: it is another allocator's.

    The pages that it asks back for make up 3 to 20 % of a prefill, by what the prefills before it left behind: more
    than differences that are worth measuring.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(set_option(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))
