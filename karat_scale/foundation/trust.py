"""Code that a recipe names as `module:Class`, and commands in it, run only if the user asked for it.

The recipe on the command line is the user's. A run's directory, a file of weights or a hub's folder may come from
somebody else, and a module of that name may lie beside it.
"""

import os
from collections.abc import Mapping

from karat_scale.foundation.errors import UserError

VARIABLE = "KARAT_TRUST"


class UntrustedError(UserError):
    """A recipe that may be somebody else's names a class."""


def require_trust(values: Mapping[str, str], source: object) -> None:
    """Refuse the place of a class, unless the environment has KARAT_TRUST=1, which `--trust` sets.

    Args:
        values: of keys that may name a class, in a recipe that was not on the command line.
        source: where they were found.

    Raises:
        UntrustedError: with the class and where it is named.
    """
    for key, value in values.items():
        module = value.partition(":")[0]
        if module != value:
            refuse_untrusted(f"{source}: {key} = {value} runs the code of the module {module}")


def refuse_untrusted(what: str) -> None:
    """Raise UntrustedError with what runs and where it is named, unless the user trusts it."""
    if os.environ.get(VARIABLE) != "1":
        raise UntrustedError(f"{what}; if you trust it, add --trust or set {VARIABLE}=1")
