"""The versions of the libraries that decide what a run computes."""

import os
from importlib.metadata import PackageNotFoundError, version

from karat_scale import __version__

_LIBRARIES = ("torch", "timm", "deepspeed")


def library_versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries, without importing these."""
    return {"karat_scale": __version__, **{name: _version(name) for name in _LIBRARIES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        os.close(os.open(os.devnull, os.O_RDONLY))  # raises where no descriptor is left to read a package's record
        raise
