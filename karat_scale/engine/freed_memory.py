"""Lets the C library keep the memory of freed tensors, for training on a CPU.

By default glibc gives large blocks back to the kernel. Each step then gets them again, page by page and filled with
zeros. docs/benchmarks.md has what that costs.
"""

import contextlib
import ctypes
import os

# Names of malloc.h: the free memory at the heap's end that is given back, what it grows by, and the size from which
# a block is mapped by itself and given back when it is freed. Older versions allow at most 32 MB for that.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = ((_TRIM_THRESHOLD, (2**31 - 1,)), (_TOP_PAD, (2**26,)), (_MMAP_THRESHOLD, (2**30, 2**25)))


def keep_freed_memory() -> bool:
    """Keep freed memory for the next step; return whether the C library does so.

    It changes nothing where the environment has settings of malloc, and on systems without glibc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all(any(mallopt(name, value) for value in values) for name, values in _SETTINGS)
    return False
