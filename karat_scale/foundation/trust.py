"""Code that a recipe names as `module:Class`, and commands in it, run only if the user asked for it.

The recipe on the command line is the user's. A run's directory, a file of weights or a hub's folder may come from
somebody else, and a module of that name may lie beside it.
"""

import os

from karat_scale.foundation.errors import UserError

VARIABLE = "KARAT_TRUST"


class UntrustedError(UserError):
    """A recipe that may be somebody else's names a class."""


def require_trust(basis: str, source: object) -> None:
    """Refuse a basis that is a class, unless the environment has KARAT_TRUST=1, which `--trust` sets.

    Args:
        basis: `attention.basis` of a recipe that was not on the command line.
        source: where it was found.

    Raises:
        UntrustedError: with the class and where it is named.
    """
    require_trust_in("attention.basis", basis, source)


def require_trust_in(key: str, value: str, source: object) -> None:
    """The same for the value of another key, which may be the place of a class."""
    module = value.partition(":")[0]
    if module != value:
        refuse_untrusted(f"{source}: {key} = {value} runs the code of the module {module}")


def refuse_untrusted(what: str) -> None:
    """Raise UntrustedError with what runs and where it is named, unless the user trusts it."""
    if os.environ.get(VARIABLE) != "1":
        raise UntrustedError(f"{what}; if you trust it, add --trust or set {VARIABLE}=1")
