"""The rules of our command lines: overrides may stand anywhere, a mistake is one line, numbers are checked as read."""

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A mistake is one line and exit code 2; of a command that has `overrides`, they may stand between its options."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """argparse's, which leaves over the positionals behind an option (some versions all); here none is left."""
        options, left = super().parse_known_args(args, namespace)
        takes_overrides = hasattr(options, "overrides")
        strange = [text for text in left if text.startswith("-") or "=" not in text or not takes_overrides]
        if strange:
            self.error(_why_strange(strange, takes_overrides))
        if left:
            options.overrides = [*options.overrides, *left]
        return options, []

    def error(self, message: str) -> NoReturn:
        """End with `message` on standard error."""
        self.exit(2, f"error: {' '.join(message.split())} ({self.prog} --help lists the options)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's check of `choices`, with the nearest of them."""
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            close = difflib.get_close_matches(str(value), names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}"
            raise argparse.ArgumentError(action, f"there is no {value!r}; {hint}")


def _why_strange(strange: Sequence[str], takes_overrides: bool) -> str:
    first = next((text for text in strange if text.startswith("-")), strange[0])
    if first.startswith("-"):
        return f"there is no option {first.partition('=')[0]}"
    return f"{first!r} is one too many" + ("; overrides are key=value" if takes_overrides else "")


def whole(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `least`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return number

    return read


count = whole(1)


def positive(text: str) -> float:
    """An argument that is a finite number above 0. Raises argparse.ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def new_file(text: str) -> str:
    """The path of a file that can be written, checked before the work whose result it is to hold.

    Raises:
        argparse.ArgumentTypeError: its directory is not there or not ours to write.
    """
    path = Path(text).absolute()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: no such directory; name a file in a directory that is there")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: no right to write in that directory; name a file elsewhere")
    return text


def time_limit(text: str) -> str:
    """A time as sbatch takes it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises argparse.ArgumentTypeError."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}|infinite|unlimited", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is no time of sbatch's: minutes, H:M:S, D-H or D-H:M:S")
    return text


def virtual_environment(text: str) -> str:
    """The absolute path of a virtual environment, which nodes are to see as well. Raises argparse.ArgumentTypeError."""
    path = Path(text).absolute()
    if not (path / "bin" / "activate").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no virtual environment: it has no bin/activate")
    return str(path)
