"""The versions of the libraries that decide what a run computes."""

from importlib.metadata import version

from karat_scale import __version__

_LIBRARIES = ("torch", "timm", "deepspeed")


def library_versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries, without importing these."""
    return {"karat_scale": __version__, **{name: version(name) for name in _LIBRARIES}}
