"""Argument parsing that all our commands share: one-line errors, numbers with bounds, overrides between options."""

import argparse
import difflib
import inspect
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from karat_scale.foundation.errors import ctrl_c_quits, did_you_mean, on_one_line
from karat_scale.foundation.files import is_written_in_place
from karat_scale.foundation.stores import is_url
from karat_scale.foundation.tables import TRACKERS, load

T = TypeVar("T")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line with exit code 2. A command's `overrides` may be between its options.

    Options are not abbreviated: `karat submit --gpus 8` would set --gpus-per-node.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **more})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse like argparse. Some versions leave positionals after an option unparsed; here they become overrides."""
        options, left = super().parse_known_args(args, namespace)
        takes_overrides = hasattr(options, "overrides")
        if strange := [text for text in left if text.startswith("-") or "=" not in text or not takes_overrides]:
            first = next((text for text in strange if text.startswith("-")), strange[0])
            if not first.startswith("-"):
                fix = "; overrides are key=value, without blanks" if takes_overrides else ""
                self.error(f"unexpected argument {first!r}{fix}")
            name = first.partition("=")[0]
            hint = load("karat_scale.recipe.loading:option_hint")(name) if takes_overrides else ""
            close = difflib.get_close_matches(name, self._option_string_actions, n=1, cutoff=0.8)
            hint = _OTHER_OPTIONS.get(name) or (f"did you mean {close[0]}?" if close else hint)
            self.error(f"unknown option {name}{'; ' if hint else ''}{hint}")
        if left:
            options.overrides = [*options.overrides, *left]
        return options, []

    def error(self, message: str) -> NoReturn:
        """Print `message` to standard error and exit. Of arguments that are missing, say what the first one is."""
        if message.startswith(_MISSING):
            name = message.removeprefix(_MISSING).partition(", ")[0]
            first = next(one for one in self._actions if name in (one.metavar, one.dest, "/".join(one.option_strings)))
            what = f"choose from {', '.join(first.choices)}" if first.choices else first.help
            message = f"{name} is missing" + (f": {what}" if what else "")
        self.exit(2, f"error: {on_one_line(message)} ({self.prog} --help lists the options)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check `choices` like argparse, and suggest the nearest one."""
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            choices = f"choose from {', '.join(names)}"
            if action.option_strings and action.nargs and value and os.path.exists(str(value)):  # noqa: PTH110  # any length
                raise argparse.ArgumentError(action, f"{value!r} is none of its values; name it before the option")
            is_command = action.dest == "command"
            hint = did_you_mean(str(value), names, choices, likeness=0.66 if is_command else 0.6)
            if is_command:
                is_recipe = "_" in str(value) or str(value).endswith((".yaml", ".yml"))
                hint = _OTHER_COMMANDS.get(str(value), f"did you mean karat train {value}?" if is_recipe else hint)
            raise argparse.ArgumentError(action, f"unknown value {value!r}; {hint}")


# The words of argparse about arguments that are missing.
_MISSING = "the following arguments are required: "

# What people type as a command, and the command that does it.
_OTHER_COMMANDS = {
    "download": "use karat prepare fetch",
    "evaluate": "use karat eval RUN",
    "finetune": "use karat train RECIPE init_from=WEIGHTS",
    "fit": "use karat train RECIPE",
    "infer": "use karat predict",
    "inference": "use karat predict",
    "list": "use karat recipes",
    "ls": "use karat recipes",
    "resume": "run the same karat train command again, and it resumes",
    "serve": "use karat demo",
    "test": "use karat eval RUN --on DIR",
    "validate": "use karat eval RUN",
    "version": "use karat --version",
}


# What people give to another command, and what does it.
_OTHER_OPTIONS = {
    "--dry-run": "use karat plan RECIPE --dry-run, or the option --print where there is one",
    "--gpus": "use karat launch --ranks N COMMAND ..., or --gpus-per-node N of karat submit",
    "--resume": _OTHER_COMMANDS["resume"],
}


def whole(least: int) -> Callable[[str], int]:
    """Return the type of an argument that is an integer of at least `least`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {least}")
        return number

    return read


count = whole(1)


_MOST = 10**9  # beyond it are typing errors


def positive(text: str) -> float:
    """Parse a number above 0 that is not absurd. Raises argparse.ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to {_MOST:,}")
    return number


def new_file(text: str) -> str:
    """Return the path of a file after checking that it can be written, so that a long run does not fail at its end.

    Raises:
        argparse.ArgumentTypeError: its directory does not exist or is not writable.
    """
    path = Path(text).absolute()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; name a file in it")
    if is_written_in_place(path):
        return text
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: its directory does not exist; create it or name another file")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: its directory is not writable; name a file elsewhere")
    return text


def new_directory(text: str) -> str:
    """Refuse a file where a directory is wanted. Raises argparse.ArgumentTypeError."""
    if os.path.isfile(text):  # noqa: PTH113  # any length
        raise argparse.ArgumentTypeError(f"{text!r} is a file; choose another directory")
    return text


def run_directory(text: str) -> str:
    """Refuse the URL of a run's copy where a directory is wanted. Raises argparse.ArgumentTypeError."""
    if is_url(text):
        raise argparse.ArgumentTypeError("it is a URL; `karat fetch URL DIR` makes a directory of the run there")
    return text


def time_limit(text: str) -> str:
    """Check a time limit of sbatch: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises argparse.ArgumentTypeError."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}|infinite|unlimited", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time limit of sbatch; use minutes, H:M:S, D-H or D-H:M:S")
    return text


def tracker(text: str) -> str:
    """Check the name of a tracker, or the place of a class. Raises argparse.ArgumentTypeError."""
    if text not in TRACKERS and ":" not in text:
        choices = f"choose from {', '.join(TRACKERS)} or package.module:Class"
        hint = did_you_mean(text, TRACKERS, choices)
        raise argparse.ArgumentTypeError(f"unknown tracker {text!r}; {hint}")
    return text


def virtual_environment(text: str) -> str:
    """Return the absolute path of a virtual environment. Raises argparse.ArgumentTypeError if it is not one."""
    path = Path(text).absolute()
    if not (path / "bin" / "activate").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not a virtual environment: bin/activate is missing")
    return str(path)


def call(function: Callable[..., T], options: argparse.Namespace) -> T:
    """Call a function with the options that have its parameters' names.

    A parameter that is no option keeps its default. Without a default, it is a dataclass, made in the same way.
    """
    given = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if hasattr(options, name):
            given[name] = getattr(options, name)
        elif parameter.default is parameter.empty:
            given[name] = call(parameter.annotation, options)
    return function(**given)


def command(place: str, check: Callable[[argparse.Namespace], None] | None = None) -> Callable[[Any], int]:
    """Return the function that runs the command at `module:function`, which is imported only then.

    check: called before the import, so that its errors come at once and not after seconds of imports.
    """

    def run(options: argparse.Namespace) -> int:
        if check is not None:
            check(options)
        with ctrl_c_quits():
            function = load(place)
        return int(call(function, options))

    return run


def add_number(
    parser: argparse.ArgumentParser, name: str, default: float, what: str = "", kind: Any = count, **more: Any
) -> None:
    """Add an option that is a number; its help has the default."""
    parser.add_argument(name, type=kind, default=default, help=f"{what} (default: %(default)g)".lstrip(), **more)


def add_recipe(parser: argparse.ArgumentParser, such_as: str, what: str = "", nargs: str | None = None) -> None:
    """Add RECIPE and the overrides."""
    what = what or "a shipped recipe's name or a YAML file"
    parser.add_argument("recipe", metavar="RECIPE", nargs=nargs, help=what)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=f"such as {such_as}")


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add RUN."""
    parser.add_argument("run_dir", metavar="RUN", type=run_directory, help="the run's directory")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a checkpoint."""
    parser.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a checkpoint's weights."""
    which = "raw, their moving average (ema), or what the run's recipe evaluates (auto, the default)"
    parser.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto", help=which)


def add_json(parser: argparse.ArgumentParser, what: str = "write all figures to this file") -> None:
    """Add `--json`."""
    parser.add_argument("--json", dest="json_file", type=new_file, metavar="FILE", help=f"also {what}")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the option `--trust` of the commands that may read what others wrote."""
    parser.add_argument(
        "--trust", action="store_true", help="allow code that a run or a file of weights names; or set KARAT_TRUST=1"
    )
