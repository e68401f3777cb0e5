"""Running out of memory, on the CPU or a GPU, as one line that says what to change."""

import contextlib
from collections.abc import Callable, Iterator

from karat_scale.errors import UserError, one_line
from karat_scale.memory_errors import is_out_of_memory


@contextlib.contextmanager
def one_line_out_of_memory(fix: Callable[[], str]) -> Iterator[None]:
    """Turn an allocation that fails within into a UserError that ends with `fix()`; other exceptions pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory: {_what_failed(error)}; {fix()}") from error


def _what_failed(error: BaseException) -> str:
    # torch's CPU allocator begins with its source line; CUDA's continues with all that it has allocated.
    text = one_line(error).rpartition("DefaultCPUAllocator: ")[2].partition(" GPU ")[0]
    return text.rstrip(". ")
