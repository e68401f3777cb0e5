"""`karat recipes`: what each shipped recipe trains, from its files, and its results, from the tables in `paper/`."""

import functools
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from karat_scale.foundation.console import plural, print_table, terminal, wrapped, write_json
from karat_scale.foundation.errors import RecipeError, nearest
from karat_scale.foundation.files import shipped_directory
from karat_scale.recipe.files import COMMANDS, RECIPES, Shipped, part_names, read_recipe, shipped_recipes

_NOT_RUN = "not yet run"
# Swin's layers differ in tokens and heads, so they share no functions. Attention is transferred between plain ViTs.
_CANNOT_TRAIN = r"\w+_swin_\w+u(_\w+)?|\w+_(swin|convit)_\w+_transfer(_\w+)?"
_DATA = {
    "train": "shards made by karat prepare webdataset",
    "detect": "train2017/, val2017/ and annotations/ as COCO has them",
}


@dataclass(frozen=True)
class Entry:
    """A shipped recipe: its command, what it trains, the paper's result, ours, and the headers of its files.

    about: on what we got our result. is_base: no word of an attention or a change was added to its name.
    """

    name: str
    command: str
    trains: str
    paper: str
    result: str
    about: str
    header: str
    is_base: bool


def catalog() -> list[Entry]:
    """Return all shipped recipes that can be trained, those of `karat train` first."""
    return [
        _entry(name, shipped, command)
        for folder, command in COMMANDS.items()
        for name, shipped in shipped_recipes(folder).items()
        if not re.fullmatch(_CANNOT_TRAIN, name)
    ]


def list_recipes(words: Sequence[str], json_file: str | None) -> int:
    """Print recipes, and return the exit code.

    One that is named is shown whole. Otherwise it is those with all words in their name, as whole words if there are
    any, or if there are none, as whole words in their command or header. Of these, those with an attention or a change
    but no result, of the paper or ours, are shown only if no other is.

    Raises:
        RecipeError: no recipe has these words.
    """
    entries = catalog()
    if named := [entry for entry in entries if [entry.name] == list(words)]:
        write_json(json_file, [asdict(entry) for entry in named])
        _show(named[0])
        return 0
    wanted = [word.lower() for word in words]
    by_word = [entry for entry in entries if all(f"_{word}_" in f"_{entry.name}_" for word in wanted)]
    by_name = [entry for entry in entries if all(word in entry.name for word in wanted)]
    texts = {entry.name: f"{entry.command} {entry.name} {entry.trains}".lower() for entry in entries}
    whole = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)") for word in wanted]
    by_header = [entry for entry in entries if all(word.search(texts[entry.name]) for word in whole)]
    having = by_word or by_name or by_header
    if not having:
        unknown = next((one for one in wanted if not any(one in entry.name for entry in entries)), wanted[0])
        parts = [part for parts in _parts().values() for part in parts]
        close = nearest(unknown, [*parts, *(entry.name for entry in entries if entry.paper)], count=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`karat recipes` lists all"
        raise RecipeError(f"karat recipes {' '.join(words)}: no shipped recipe has these words; {hint}")
    found = [entry for entry in having if entry.paper or entry.result != _NOT_RUN or entry.is_base] or having
    write_json(json_file, [asdict(entry) for entry in found])
    print_table(
        f"{plural(len(found), 'recipe')}. `karat recipes NAME` shows what one trains and how to start it.",
        ["recipe", "paper's result", "our result"],
        [[entry.name, entry.paper, entry.result] for entry in found],
        (0, 1, 2),
    )
    print("\nA name is DATA_MODEL. _ATTENTION replaces the model's own, and _CHANGE comes last.")
    print("Every combination can be trained, except u with swin, and transfer with a model other than vit:")
    for title, parts in _parts().items():
        print(f"  {title:<9}  {'  '.join(parts)}")
    print("g3b is Fourier-KArAt with grid 3 and functions of its own for each block; u shares them between all.")
    if left := len(having) - len(found):
        print(f"Not listed: {plural(left, 'recipe')} with an _ATTENTION or a _CHANGE and without a result.")
    return 0


def _parts() -> dict[str, list[str]]:
    """Return the words that names are made of, by what they say."""
    kinds = {kind: part_names(kind) for kind in ("data", "model", "attention", "change")}
    kinds["attention"] += part_names("taught")
    return kinds


def _show(entry: Entry) -> None:
    start = f"karat {entry.command} {entry.name} data.path=DIR"
    ours = textwrap.fill(f"our result: {entry.result}{f': {entry.about}' if entry.about else ''}", 118)
    text = f"{entry.name}\n\n{entry.header}\n\npaper's result: {entry.paper or 'none'}\n\n{ours}\n"
    if terminal() is not None:
        lines = re.sub(r"(?<!\n)\n *(?=[^\s-])", " ", text).split("\n")  # paragraphs, and items of a list
        text = "\n".join(wrapped(line, "    " if line.startswith("  - ") else "") for line in lines)
    print(text)
    folder = next(folder for folder, command in COMMANDS.items() if command == entry.command)
    _, tree = read_recipe(entry.name, folder)
    for run in (tree.get("init_from"), tree["attention"].get("transfer_from")):
        if run and (earlier := Path(run).name) in shipped_recipes(RECIPES):
            print(f"{f'karat train {earlier} data.path=DIR':<{len(start)}}    first, the run that it starts from")
    print(f"{start}    DIR: {_DATA[entry.command]}")


def _entry(name: str, shipped: Shipped, command: str) -> Entry:
    headers = [_header(path) for path in shipped.files]
    trains = " ".join(re.split(r"(?<=[.:])\s", header, maxsplit=1)[0] for header in headers)
    paper, ours = _paper_results().get(name, ""), _table("ours.yaml").get(name, {"result": _NOT_RUN, "about": ""})
    is_base = name == shipped.words["base"]
    return Entry(name, command, trains, paper, ours["result"], ours["about"], "\n\n".join(headers), is_base)


@functools.cache
def _header(path: Path) -> str:
    """Return the comment at the beginning of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


@functools.cache
def _paper_results() -> Mapping[str, str]:
    """Return the accuracy or precision that the paper reports for each recipe as it is."""
    tables = [table for group in _table("paper.yaml") for table in group["tables"] if table.get("measure") != "memory"]
    results: dict[str, str] = {}
    for table in tables:
        for row in table["rows"]:
            if not row.get("overrides") and not table.get("overrides"):
                results.setdefault(row["recipe"], _paper_result(row))
    return results


def _paper_result(row: Mapping[str, Any]) -> str:
    if "box" in row:
        return f"{row['box'][0]:.2f} box AP, {row['mask'][0]:.2f} mask AP"
    if "top5" in row:
        return f"{row['top1']:.2f} / {row['top5']:.2f} % top-1 / top-5"
    return f"{row['top1']:.2f} % top-1"


@functools.cache
def _table(name: str) -> Any:
    return yaml.safe_load((shipped_directory("paper") / name).read_text(encoding="utf-8"))
