"""Recipe files: where they are, how they are read, and how they extend other files.

`extends: NAME`, or a list of names, includes all keys of those recipes. The file's own keys override them, and a
later name in a list overrides an earlier one. NAME is a shipped recipe or part, such as `parts/cifar10`, or a path
relative to the file.

It is YAML with plain values, each key once, and never more than a recipe can need.
"""

import difflib
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from karat_scale.foundation.errors import RecipeError, RunDirectoryError, nearest
from karat_scale.foundation.files import read_text

_MOST_NODES = 10_000  # values in a recipe


def parse(text: str) -> Any:
    """Return what YAML text says. Raises YAMLError, with the line where there is one."""
    try:
        tree = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply; a recipe has sections and keys") from None
    _check_nodes(tree)
    return tree


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate keys, of which PyYAML keeps the last one, and values that Python cannot hold."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):  # such as `!!set [a]`
            raise _error(f"a list or a text cannot be read as {_kind(node)}", node)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise _error("a key is a list or a map", key_node)
            if key in seen:
                raise _error(f"key {key!r} appears twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, ArithmeticError):
            # PyYAML's own constructors: the 30th of February, `!!int x`, a number of 5,000 digits.
            said = str(node.value)[:40]
            raise _error(f"{said!r} cannot be read as {_kind(node)}; put a text in quotes", node) from None


def _kind(node: yaml.Node) -> str:
    return str(node.tag).rpartition(":")[2]


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _check_nodes(tree: object) -> None:
    """Refuse keys that are no names, and what grows beyond all bounds with its aliases. Raises YAMLError."""
    left, seen = [tree], 0
    while left:
        node = left.pop()
        seen += 1
        others = [key for key in node if not isinstance(key, str)] if isinstance(node, dict) else []
        if others:
            raise yaml.YAMLError(f"key {str(others[0])[:100]} should be a name")
        if seen > _MOST_NODES:
            raise yaml.YAMLError(f"more than {_MOST_NODES:,} values, aliases written out")
        left += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


RECIPES = Path(__file__).parent.parent / "recipes"
# The folder of each kind of recipe, and the command that trains it.
COMMANDS = {RECIPES: "train", RECIPES.parent / "training" / "tasks" / "detection" / "recipes": "detect"}
EXTENDS = "extends"
_LARGEST = 2**20  # bytes of a recipe


def shipped_recipes(folder: Path = RECIPES) -> dict[str, Path]:
    """Return the recipes in the package, by name. Each kind has its own folder."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(source: str, folder: Path = RECIPES) -> Path:
    """Return the file of a recipe that is shipped in `folder`, or given by its path. Raises RecipeError."""
    shipped = shipped_recipes(folder)
    if source in shipped:
        return shipped[source]
    path = Path(source)
    try:
        if path.is_file():
            return path
    except OSError as error:
        raise RecipeError(f"recipe {source[:100]!r}: {error.strerror}; name a recipe's YAML file") from None
    raise RecipeError(f"recipe {source!r}: {_why_missing(source, folder)}")


def recipe_of_run(run: Path) -> Path:
    """Return the recipe in a run's directory. Raises RunDirectoryError if it is not one."""
    path = run.expanduser() / "recipe.yaml"
    if not path.exists():
        raise RunDirectoryError(f"{run}: not a run directory (it has no recipe.yaml)")
    return path


def _why_missing(source: str, folder: Path) -> str:
    path = Path(source)
    if path.is_dir():
        own = path / "recipe.yaml"
        return f"a run's directory; name its {own}" if own.is_file() else "a directory; name a YAML file in it"
    if path.suffix in (".yaml", ".yml") or "/" in source:
        close = nearest(path.name, [file.name for file in path.parent.glob("*.y*ml")])
        return f"no such file; did you mean {path.parent / close[0]}?" if close else "no such file"
    for other, command in COMMANDS.items():
        if source in shipped_recipes(other):
            return f"not a recipe of this command; train it with: karat {command} {source}"
    shipped = shipped_recipes(folder)
    if near := nearest(source, shipped, likeness=0.8):
        return f"neither a file nor a shipped recipe; did you mean {near[0]}?"
    few = difflib.get_close_matches(source, shipped, n=3, cutoff=0.0)
    return f"neither a file nor a shipped recipe; some are {', '.join(few)}; all: ls {folder}"


def read_recipe_file(path: Path, folder: Path = RECIPES, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file with all that it extends, in `folder` or beside it. Raises RecipeError with one line."""
    if path.resolve() in extended_by:
        circle = " -> ".join(file.stem for file in (*extended_by, path))
        raise RecipeError(f"{path}: extends goes in a circle: {circle}")
    own = _read_yaml(path)
    names = own.pop(EXTENDS, [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(f"{path}: extends = {names!r}: should be a recipe's name or a list of names")
    tree: dict[str, Any] = {}
    for name in names:
        extended = _find_extended(path, name, folder)
        _lay_over(tree, read_recipe_file(extended, folder, (*extended_by, path.resolve())))
    _lay_over(tree, own)
    return tree


def read_run_recipe(path: Path) -> dict[str, Any]:
    """Read the recipe of a run, which may be somebody else's. So it may name no other file. Raises RecipeError."""
    tree = _read_yaml(path)
    if EXTENDS in tree:
        raise RecipeError(f"{path}: extends: the recipe of a run is whole; put back the one that training wrote")
    return tree


def _find_extended(path: Path, name: str, folder: Path) -> Path:
    shipped = {str(file.relative_to(folder).with_suffix("")): file for file in sorted(folder.rglob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    if (path.parent / name).is_file():
        return path.parent / name
    close = difflib.get_close_matches(name, shipped, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise RecipeError(f"{path}: extends = {name!r}: neither a shipped recipe nor a file beside this one{hint}")


def _lay_over(tree: dict[str, Any], upper: Mapping[str, Any]) -> None:
    """Merge a file's keys over another's, section by section. Lists and values are replaced as a whole."""
    for key, value in upper.items():
        below = tree.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            _lay_over(below, value)
        else:
            tree[key] = value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = parse(read_text(path, _LARGEST))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; name a recipe's YAML file") from None
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{where}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a text file in YAML: {str(error).splitlines()[0]}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        raise RecipeError(f"{path}: should be sections such as `model:` and `data:`, not a {kind}")
    # `data:` without anything below it is an empty section.
    return {key: {} if value is None else value for key, value in tree.items()}
