"""Completion of `karat` in a shell, by argcomplete: commands, options, shipped recipes, keys and their values."""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from argcomplete import autocomplete
from argcomplete.completers import FilesCompleter
from argcomplete.shell_integration import shellcode


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell's question about the command line so far, and exit."""
    _give_completers(parser, "")
    autocomplete(parser)


def print_shell_code(shell: str) -> int:
    """Print the lines that make a shell complete `karat`; returns the exit code."""
    print(shellcode(["karat"], shell=shell))
    return 0


def _give_completers(parser: argparse.ArgumentParser, command: str) -> None:
    completers: dict[str, Any] = {"recipe": _recipes, "words": _recipes, "overrides": _overrides, "keys": _keys}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                _give_completers(below, command or name)
        elif action.dest in completers:
            given: Any = action
            given.completer = partial(completers[action.dest], command)


def _recipes(command: str, prefix: str, **_: Any) -> Iterator[str]:
    """Complete shipped recipes of a command, and files."""
    from karat_scale.recipe.files import COMMANDS, shipped_recipes

    kind = command if command in COMMANDS.values() else "train"
    for folder, trained_by in COMMANDS.items():
        if trained_by == kind or command == "recipes":
            yield from shipped_recipes(folder)
    if command != "recipes":
        yield from FilesCompleter(("yaml", "yml"))(prefix)


def _keys(_command: str, **_: Any) -> Iterator[str]:
    from karat_scale.recipe.loading import schema_keys

    return schema_keys()


def _overrides(command: str, prefix: str, **_: Any) -> list[str]:
    """Complete `key=`, and the value of a key that has choices."""
    from karat_scale.foundation.tables import SCHEMAS, load
    from karat_scale.recipe.keys import choices_of, sections_of

    schema = load(SCHEMAS.get(command, SCHEMAS["train"]))
    keys = {key.name: key for section in sections_of(schema) for key in section.keys}
    name, equals, _value = prefix.partition("=")
    if not equals:
        return [f"{name}=" for name in keys]
    return [f"{name}={choice}" for choice in choices_of(keys[name].schema)] if name in keys else []
