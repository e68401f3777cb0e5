"""`karat recipes`: the shipped recipes, what each trains, needs and gave, from the headers of their files."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import RecipeError, nearest
from karat_scale.recipe.files import COMMANDS, shipped_recipes

_NOT_RUN = "not yet run"


@dataclass(frozen=True)
class Entry:
    """A shipped recipe, from its header: the command that trains it, what it trains, the paper's result and ours."""

    name: str
    command: str
    trains: str
    paper: str
    result: str
    header: str


def catalog() -> list[Entry]:
    """Return all shipped recipes, those of `karat train` first."""
    return [_entry(path, command) for folder, command in COMMANDS.items() for path in shipped_recipes(folder).values()]


def list_recipes(words: Sequence[str], json_file: str | None) -> int:
    """Print the recipes whose name or header has all words; the whole header if one is named. Returns the exit code.

    Raises:
        RecipeError: no recipe has these words.
    """
    entries = catalog()
    named = [entry for entry in entries if [entry.name] == list(words)]
    found = named or [entry for entry in entries if all(_has(entry, word) for word in words)]
    if not found:
        close = nearest(words[0], [entry.name for entry in entries])
        hint = f"did you mean {close[0]}?" if close else "`karat recipes` lists all"
        raise RecipeError(f"karat recipes {' '.join(words)}: no shipped recipe has these words; {hint}")
    write_json(json_file, [asdict(entry) for entry in found])
    if named:
        print(f"{named[0].name}\n\n{named[0].header}")
        return 0
    rows = [[entry.name, entry.paper, entry.result, entry.trains] for entry in found]
    print_table(
        f"{len(found)} recipes. `karat recipes NAME` shows how to start one.",
        ["recipe", "paper's result", "our result", "what it trains"],
        rows,
        (0, 1, 2, 3),
    )
    return 0


def _has(entry: Entry, word: str) -> bool:
    return word.lower() in f"{entry.name} {entry.header}".lower()


def _entry(path: Path, command: str) -> Entry:
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("#").removeprefix(" ") for line in _leading_comments(lines)]
    prose = " ".join(line for line in comment if not line.startswith("  "))
    trains = re.split(r" Recipe: | Results?\b.*?: ", prose)[0]
    paper = re.search(r"The paper (?:\(.*?\) )?reports (.+?)\.(?: |$)", prose)
    result = re.search(r"Results?\b[^:]*: (.+?)\.?(?: For |$)", prose)
    ours = result[1] if result else ""
    return Entry(path.stem, command, trains, paper[1] if paper else "", ours or _NOT_RUN, "\n".join(comment))


def _leading_comments(lines: Sequence[str]) -> list[str]:
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return list(lines[:end])
