"""Recognise a failed allocation, on the CPU and on a GPU. Needs only torch."""

import torch

# Beside the exceptions' own classes: torch's CPU allocator, CUDA's driver, cuBLAS, C++.
_SIGNS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """True if an exception says that there was not enough memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
