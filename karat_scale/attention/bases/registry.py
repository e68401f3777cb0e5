"""Bases by their names in the table, and other bases by their places: `package.module:Class`."""

import importlib
import inspect
from typing import Any

from karat_scale.attention.bases.base import Basis, ElementwiseBasis, FeatureBasis
from karat_scale.attention.bases.fourier import Fourier
from karat_scale.foundation import tables

BASES: dict[str, type[Basis]] = {name: tables.load(row.place) for name, row in tables.BASES.items()}

# Registered operations take strings, not objects.
_KNOWN: dict[str, Basis] = {Fourier.key: Fourier()}


def basis_class(name: str) -> type[Basis]:
    """Return the class of a name in the table, or the one at `package.module:Class`.

    Raises ValueError if there is none, or if it is not a basis that can be built.
    """
    if name in tables.BASES:
        listed: type[Basis] = tables.load(tables.BASES[name].place)
        return listed
    module_name, colon, class_name = name.partition(":")
    if not (colon and module_name and class_name):
        raise ValueError(f"basis = {name!r}: expected one of {', '.join(tables.BASES)}, or package.module:Class")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except AttributeError:
        raise ValueError(f"basis = {name!r}: module {module_name} has no {class_name}") from None
    except ModuleNotFoundError as error:
        raise ValueError(f"basis = {name!r}: {error}; put its directory on PYTHONPATH") from error
    except Exception as error:  # a module of others may raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"basis = {name!r}: {module_name} cannot be imported: {reason}") from error
    if not (inspect.isclass(found) and issubclass(found, (FeatureBasis, ElementwiseBasis))):
        raise ValueError(f"basis = {name!r}: expected a subclass of FeatureBasis or ElementwiseBasis")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ValueError(f"basis = {name!r}: the class lacks {missing}")
    return found


def make_basis(name: str, **settings: Any) -> Basis:
    """Return a basis by name, built with those of the settings that its constructor takes.

    Raises ValueError like `basis_class`, and if the constructor refuses the settings.
    """
    found = basis_class(name)
    taken = inspect.signature(found).parameters
    try:
        basis = found(**{key: value for key, value in settings.items() if key in taken})
    except TypeError as error:
        raise ValueError(f"basis = {name!r}: cannot be built from {', '.join(settings)}: {error}") from error
    key_of(basis)
    return basis


def key_of(basis: Basis) -> str:
    """Return the basis's name for registered operations; `basis_of` finds it under this name."""
    key = basis.key
    _KNOWN.setdefault(key, basis)
    return key


def basis_of(key: str) -> Basis:
    """Return the basis that `key_of` named."""
    return _KNOWN[key]
