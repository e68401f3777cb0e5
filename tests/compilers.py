"""What tests can compile on this machine. Without a compiler they are skipped."""

import shutil

import pytest

from karat_scale.foundation.native_build import LoadError, _available_instruction_sets, find_compiler


def has_compiler() -> bool:
    """Return whether there is a C++ compiler."""
    try:
        find_compiler()
    except LoadError:
        return False
    return True


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets for which our kernels can be built here, and run; the best comes first."""
    return _available_instruction_sets() if has_compiler() else ()


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
needs_kernels = pytest.mark.skipif(not instruction_sets(), reason="no C++ compiler, or no AVX2")
needs_c_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
