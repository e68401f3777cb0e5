"""Whether Triton can launch kernels on this machine.

A GPU is not enough. At its first launch Triton compiles a C extension of Python: its driver's functions and, in older
versions, a launcher for each kernel's signature. It needs CC, gcc or clang, Python's headers, a cache directory that it
can write, and libcuda where `ldconfig -p` or LD_LIBRARY_PATH shows it. A slim image often lacks the first two, and the
launch would fail in the first training step.
"""

import functools
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from karat_scale.foundation.native_build import home

COMPILERS = ("gcc", "clang")
COMPILER_SECONDS = 60
_EXTENSION = "#include <Python.h>\n#include <dlfcn.h>\n"


def launch_problem() -> str | None:
    """Return why Triton cannot launch a kernel here and what to do about it, or None; found out once per process.

    Triton's interpreter compiles nothing, so there it is None. Without a GPU the driver is not checked, so that kernels
    can be traced and compiled for one.
    """
    return _launch_problem()


# The same as torch.compiler.assume_constant_result, without the second that importing the compiler takes.
launch_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _launch_problem() -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    problem = _cache_problem() or _compiler_problem()
    if not torch.cuda.is_available():
        return problem
    try:
        functions = _driver_functions()
    except Exception as error:  # of any kind: an assertion, a compiler's exit code, a library that is missing
        return problem or f"Triton's driver does not start: {_first_line(error)}"
    # Newer versions launch all kernels with this function; others still build a launcher for each signature.
    return None if hasattr(functions, "launch") else problem


def _compiler_problem() -> str | None:
    """Return why no C extension can be built as Triton builds its own, or None; builds an empty one to find out."""
    compiler = os.environ.get("CC", next(filter(None, map(shutil.which, COMPILERS)), None))
    if compiler is None:
        return f"Triton needs a C compiler, and none of {', '.join(COMPILERS)} is on PATH; install gcc or set CC"
    scheme = sysconfig.get_default_scheme()
    # Debian's own scheme names a directory without headers; Triton does the same.
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    try:
        with tempfile.TemporaryDirectory() as directory:
            command = [compiler, "-x", "c", "-", "-shared", "-fPIC", f"-I{include}", "-o", f"{directory}/empty.so"]
            done = subprocess.run(
                command, input=_EXTENSION, capture_output=True, text=True, errors="replace", timeout=COMPILER_SECONDS
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Triton needs a C compiler, and {compiler} does not run: {_first_line(error)}; install gcc or set CC"
    if done.returncode == 0:
        return None
    if not (Path(include) / "Python.h").is_file():
        return f"Triton needs Python's headers, and there is no {include}/Python.h; install python3-dev"
    return f"Triton needs a C compiler, and {compiler} builds no extension of Python: {_first_line(done.stderr)}"


def _cache_problem() -> str | None:
    if os.environ.get("TRITON_CACHE_MANAGER"):
        return None
    base = os.environ.get("TRITON_HOME") or home()
    directory = Path(os.environ.get("TRITON_CACHE_DIR") or Path(base) / ".triton" / "cache")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return f"Triton's cache {directory} cannot be written ({_first_line(error)}); set TRITON_CACHE_DIR"


def _driver_functions() -> Any:
    """Triton's functions of the CUDA driver, built now if its cache has none; raises what a launch would."""
    import triton

    return triton.runtime.driver.active.utils


def _first_line(text: object) -> str:
    return next(iter(str(text).split("\n")), "").strip() or type(text).__name__
