"""Versions of the libraries, the optional parts, and how to install what is missing."""

import importlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from karat_scale.commands.doctor.report import Finding, found
from karat_scale.foundation.native_build import PACKAGES, LoadError, find_compiler
from karat_scale.foundation.tables import EXTRAS, how_to_install, is_installed

DISTRIBUTION = "karat-scale"
OLDEST_PYTHON = (3, 10)
# In a bare clone, whose needs are not recorded.
LIBRARIES = ("torch", "torchvision", "timm", "deepspeed", "numpy", "pillow", "pydantic", "pyyaml", "webdataset")


def examine_python() -> Iterator[Finding]:
    """Yield the finding about the Python interpreter."""
    old = sys.version_info[:2] < OLDEST_PYTHON
    fix = "use Python 3.10 or newer" if old else ""
    yield found("python", f"{platform.python_version()} ({sys.executable})", fix, wrong=old)


def examine_libraries() -> Iterator[Finding]:
    """Yield the required libraries and triton, against the versions that the package requires."""
    for name, wanted in (wanted_versions() or dict.fromkeys(LIBRARIES, "")).items():
        yield examine_library(name, wanted)
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
        fix = "only the GPU kernels need it: pip install 'triton>=3.3,<4'"
        return found("triton", "not installed", fix, version=None)
    return found("triton", installed, version=installed)


def examine_extras() -> Iterator[Finding]:
    """Yield the optional libraries, and the compiler that the native parts need."""
    for name, extra in EXTRAS.items():
        distribution = next(filter(installed_version, extra.distributions), extra.distributions[0])
        hint = f"for {extra.needed_for}: {how_to_install(name)}"
        yield _examine_extra(name, extra.module, distribution, hint)
    yield _examine_compiler()


def _examine_extra(name: str, module: str, distribution: str, install: str) -> Finding:
    label = f"extra {name}"
    if not is_installed(module):
        return found(label, "not installed", install, present=False)
    try:
        importlib.import_module(module)
    except Exception as error:  # a missing system library can raise anything
        reason = f"installed, but cannot be imported: {type(error).__name__}: {error}"
        return found(label, " ".join(reason.split()), install, present=False)
    return found(label, installed_version(distribution) or "installed", present=True)


def _examine_compiler() -> Finding:
    try:
        compiler = find_compiler()
    except LoadError as error:
        fix = f"the CPU attention kernel and the native JPEG decoder need it: apt-get install {PACKAGES}"
        return found("C++ compiler", str(error).partition(";")[0], fix, path=None)
    return found("C++ compiler", compiler, path=compiler)
