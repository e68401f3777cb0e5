"""Versions of the libraries, the optional parts, and how to install what is missing."""

import importlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from karat_scale.doctor.finding import Finding, found
from karat_scale.native_build import FFCV_PACKAGES, PACKAGES, LoadError, find_compiler

DISTRIBUTION = "karat-scale"
OLDEST_PYTHON = (3, 10)
LIBRARIES = (
    *("torch", "torchvision", "timm", "deepspeed", "webdataset", "numpy", "pillow"),
    *("pydantic", "pyyaml", "psutil", "rich", "tensorboard"),
)


def examine_python() -> Iterator[Finding]:
    """Yield the finding about the Python interpreter."""
    text = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] < OLDEST_PYTHON:
        yield found("python", text, "use Python 3.10 or newer", wrong=True)
    else:
        yield found("python", text)


def examine_libraries() -> Iterator[Finding]:
    """Yield the required libraries and triton, against the versions that the package requires."""
    wanted = wanted_versions()
    for name in LIBRARIES:
        yield examine_library(name, wanted.get(name, ""))
    yield _examine_triton()


def wanted_versions() -> dict[str, str]:
    """Return the version range of each required distribution from the installed package; empty in a bare clone."""
    from packaging.requirements import Requirement

    try:
        needs = [Requirement(text) for text in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        return {}
    return {need.name: str(need.specifier) for need in needs if need.marker is None}


def examine_library(name: str, wanted: str) -> Finding:
    """Return the finding about one required distribution and its range `wanted`, such as ">=2.6,<3"."""
    from packaging.specifiers import SpecifierSet

    install = f"pip install '{name}{wanted}'"
    installed = installed_version(name)
    if installed is None:
        return found(name, "not installed", install, wrong=True, version=None)
    if not SpecifierSet(wanted).contains(installed, prereleases=True):
        return found(name, f"{installed}, but {wanted} is needed", install, wrong=True, version=installed)
    return found(name, installed, version=installed)


def installed_version(name: str) -> str | None:
    """Return the version of a distribution, or None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _examine_triton() -> Finding:
    installed = installed_version("triton")
    if installed is None:
        return found(
            "triton", "not installed", "only the GPU kernels need it: pip install 'triton>=3.3,<4'", version=None
        )
    return found("triton", installed, version=installed)


def examine_extras() -> Iterator[Finding]:
    """Yield the optional libraries, and the compiler that the native parts need."""
    yield _examine_extra(
        "ffcv",
        "ffcv",
        "ffcv",
        f"for data.backend=ffcv: apt-get install {FFCV_PACKAGES}, then in the clone pip install '.[ffcv]'",
    )
    yield _examine_extra(
        "dali", "nvidia.dali", dali_distribution(), "for data.backend=dali, in the clone: pip install '.[dali]'"
    )
    yield _examine_extra(
        "export", "onnxruntime", "onnxruntime", "for karat export --format onnx, in the clone: pip install '.[export]'"
    )
    yield _examine_extra(
        "detection", "pycocotools", "pycocotools", "for karat detect, in the clone: pip install '.[detection]'"
    )
    yield _examine_compiler()


def dali_distribution() -> str:
    """Return DALI's distribution, whose name has a CUDA version: the installed one, or the default."""
    names = [f"nvidia-dali-cuda{number}" for number in (130, 120, 110)]
    return next((name for name in names if installed_version(name)), names[0])


def _examine_extra(name: str, module: str, distribution: str, install: str) -> Finding:
    label = f"extra {name}"
    if not _is_there(module):
        return found(label, "not installed", install, present=False)
    try:
        importlib.import_module(module)
    except Exception as error:  # a missing system library can raise anything
        reason = f"installed, but cannot be imported: {type(error).__name__}: {error}"
        return found(label, " ".join(reason.split()), install, present=False)
    return found(label, installed_version(distribution) or "installed", present=True)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _examine_compiler() -> Finding:
    try:
        compiler = find_compiler()
    except LoadError as error:
        fix = f"the CPU attention kernel and the native JPEG decoder need it: apt-get install {PACKAGES}"
        return found("C++ compiler", str(error).partition(";")[0], fix, path=None)
    return found("C++ compiler", compiler, path=compiler)
