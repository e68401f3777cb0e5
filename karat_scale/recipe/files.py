"""Recipe files: what the names of shipped recipes stand for, how files are read, and how they extend others.

A shipped recipe's name is BASE[_ATTENTION][_CHANGE]. BASE is a file in the folder of recipes, or DATA_MODEL. The words
are files in the folder `parts`: `cifar10_vit_tiny_g3b` is parts/model/vit_tiny, parts/attention/g3b and
parts/data/cifar10. A later one overrides an earlier one. Attention that is taken from another run is in parts/taught.

`extends: NAME`, or a list of names, includes all keys of those recipes. The file's own keys override them, and a
later name in a list overrides an earlier one. NAME is a shipped recipe, a part such as `parts/paper`, or a path
relative to the file.

It is YAML with plain values, each key once, and never more than a recipe can need.
"""

import functools
import itertools
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from karat_scale.foundation.errors import RecipeError, RunDirectoryError, did_you_mean, nearest
from karat_scale.foundation.files import read_text, trained_model
from karat_scale.recipe.base import as_written

_MOST_NODES = 10_000  # values in a recipe


def parse(text: str) -> Any:
    """Return what YAML text says. Raises YAMLError, with the line where there is one."""
    try:
        tree = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply; a recipe has sections and keys") from None
    _check_nodes(tree)
    return mapped(tree, lambda value: value)  # an alias becomes a copy, so an override of one section changes no other


class _Loader(yaml.SafeLoader):
    """A loader that refuses duplicate keys, of which PyYAML keeps the last one, and values that Python cannot hold."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):  # such as `!!set [a]`
            raise _error(f"a list or a text cannot be read as {_kind(node)}", node)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise _error("`<<` is not supported; write out the keys", key_node)
            key = self.construct_object(key_node, deep=True)
            key = str(key) if type(key) is int else key  # as below
            if not isinstance(key, Hashable):
                raise _error("a key should be a name, not a list or a map", key_node)
            if key in seen:
                raise _error(f"key {key!r} appears twice", key_node)
            seen.add(key)
        # The number of a block is a name, too.
        mapping = super().construct_mapping(node, deep)
        return {str(key) if type(key) is int else key: value for key, value in mapping.items()}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if str(node.tag).endswith((":int", ":float")) and re.fullmatch(r"[-+]?0[\d_]+|.*:.*", str(node.value)):
            raise _error(f"YAML reads {node.value} as another number; remove the leading 0 or the :, or quote it", node)
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
        for key in node if isinstance(node, dict) else ():
            if not isinstance(key, str):
                raise yaml.YAMLError(f"key {as_written(key)} should be a name")
        if seen > _MOST_NODES:
            raise yaml.YAMLError(f"more than {_MOST_NODES:,} values, aliases written out")
        left += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def mapped(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Return a copy of plain data with each of its values changed."""
    if isinstance(tree, Mapping):
        return {key: mapped(part, change) for key, part in tree.items()}
    return [mapped(part, change) for part in tree] if isinstance(tree, list | tuple) else change(tree)


RECIPES = Path(__file__).parent.parent / "recipes"
# The folder of each kind of recipe, and the command that trains it.
COMMANDS = {RECIPES: "train", RECIPES.parent / "training" / "tasks" / "detection" / "recipes": "detect"}
EXTENDS = "extends"
_LARGEST = 2**20  # bytes of a recipe


@dataclass(frozen=True)
class Shipped:
    """What the name of a shipped recipe stands for.

    Args:
        files: the files that it is made of. A later one overrides the keys of an earlier one.
        words: the words of the name. The files may use them in their values, as in `runs/imagenet_{model}{attention}`.
    """

    files: tuple[Path, ...]
    words: Mapping[str, str]


@functools.cache
def shipped_recipes(folder: Path = RECIPES) -> Mapping[str, Shipped]:
    """Return all shipped recipes of a kind by name, those that are one file first. Each kind has its own folder."""
    bases: dict[str, Shipped] = {}
    for path in sorted(folder.glob("*.yaml")):
        bases[path.stem] = Shipped((path,), {"base": path.stem})
    for (data, data_file), (model, model_file) in itertools.product(
        _parts(folder, "data").items(), _parts(folder, "model").items()
    ):
        bases[f"{data}_{model}"] = Shipped((model_file, data_file), {"base": f"{data}_{model}", "model": model})
    attentions = {**_parts(RECIPES, "attention"), **_parts(folder, "taught")}
    changes = {**_parts(RECIPES, "change"), **_parts(folder, "change")}
    shipped = {}
    for name, base in bases.items():
        others = {} if _is_named_after_attention(name) else attentions
        for attention, change in itertools.product(["", *others], ["", *changes]):
            words = [f"_{word}" if word else "" for word in (attention, change)]
            own = [others[attention]] if attention else []
            last = [changes[change]] if change else []
            files = (base.files[0], *own, *base.files[1:], *last)
            shipped["".join((name, *words))] = Shipped(files, {**base.words, "attention": words[0]})
    return shipped


@functools.cache
def _parts(folder: Path, kind: str) -> Mapping[str, Path]:
    return {path.stem: path for path in sorted((folder / "parts" / kind).glob("*.yaml"))}


def part_names(kind: str) -> list[str]:
    """Return the words of one kind, a folder in `parts`, that the name of a recipe of `karat train` may have."""
    return [word for word in _parts(RECIPES, kind) if not _is_named_after_attention(word)]


def _is_named_after_attention(name: str) -> bool:
    """True for a base that already has an attention, such as the model `swin_tiny_g3b`, which sets more than that."""
    return name.endswith(tuple(f"_{attention}" for attention in _parts(RECIPES, "attention")))


def read_recipe(source: str, folder: Path = RECIPES) -> tuple[str, dict[str, Any]]:
    """Return the name and the keys of a recipe that is shipped in `folder`, or a file given by its path.

    Raises:
        RecipeError: one line.
    """
    if source in shipped_recipes(folder):
        return source, _read_shipped(source, folder, ())
    path = Path(source)
    try:
        if path.is_file():
            return path.stem, _read_recipe_file(path, folder, ())
    except OSError as error:
        raise RecipeError(f"recipe {source[:100]!r}: {error.strerror}; name a recipe's YAML file") from None
    raise RecipeError(f"recipe {source!r}: {_why_missing(source, folder)}")


def recipe_of_run(run: Path) -> Path:
    """Return the recipe in a run's directory. Raises RunDirectoryError if it is not one."""
    path = run.expanduser() / "recipe.yaml"
    if path.with_name("config.json").is_file() and path.with_name("model.safetensors").is_file():
        raise RunDirectoryError(f"{run}: an exported folder, not a run; name its run, or use karat predict")
    if not path.exists():
        around = run.parents[:2] if "checkpoints" in run.parts[-2:] else []
        inside = [file.parent for depth in ("*", "*/*") for file in sorted(run.glob(f"{depth}/recipe.yaml"))]
        close = nearest(run.name, [beside.parent.name for beside in run.parent.glob("*/recipe.yaml")], likeness=0.8)
        meant = [*(folder for folder in around if (folder / "recipe.yaml").exists()), *inside]
        meant += [run.parent / name for name in close]
        hint = f"; did you mean {meant[0]}?" if meant else ""
        if len(inside) > 1:
            more = f" or {len(inside) - 3} more" if len(inside) > 3 else ""
            hint = f"; it holds runs: name one of {', '.join(map(str, inside[:3]))}{more}"
        exists = run.expanduser().exists()
        why = "not a run directory (it has no recipe.yaml)" if exists else "there is no such directory"
        fix = hint or "; name that of a run, such as runs/NAME"
        raise RunDirectoryError(f"{run}: {why}{fix}")
    return path


TIMM = "timm:"


def locate(source: str) -> tuple[Path, str]:
    """Return a run's directory and one of its checkpoints, or a file and "", for a source that is not timm:NAME.

    Raises:
        RecipeError: there is no such source.
    """
    path = trained_model(source)
    exported = path / "model.safetensors"
    if exported.exists() and (path / "config.json").exists():  # as a hub has it, perhaps with a recipe
        return exported, ""
    if (path / "recipe.yaml").exists():
        return path, "best"
    if path.parent.name == "checkpoints" and (path.is_dir() or path.name in ("best", "latest")):
        return path.parent.parent, path.name
    if path.is_file():
        return path, ""
    raise RecipeError(f"neither a run's directory, a checkpoint in one, a file nor timm:NAME; {name_one(path)}")


def name_one(path: Path) -> str:
    """Return what to do about the path of a run or of a checkpoint that is not there."""
    folder = path if path.name == "checkpoints" else path.parent
    there = sorted(own.name for own in folder.glob("step-*")) if folder.name == "checkpoints" else []
    return f"name one of {', '.join(there)} in {folder}" if there else "name one"


def _why_missing(source: str, folder: Path) -> str:
    path = Path(source)
    if "=" in source and not path.suffix.startswith(".y"):
        return "an override; name the recipe before it"
    if path.is_dir():
        own = path / "recipe.yaml"
        return f"a run's directory; name its {own}" if own.is_file() else "a directory; name a YAML file in it"
    if path.exists() or path.is_symlink():
        return "not a regular file, or a link to nothing; name a YAML file"
    if path.suffix.startswith(".y") or "/" in source:
        if source.endswith(".yaml") and path.stem in shipped_recipes(folder):
            return f"no such file; the shipped recipe is {path.stem}, without .yaml"
        close = nearest(path.name, [file.name for file in path.parent.glob("*.y*ml")])
        return f"no such file; did you mean {path.parent / close[0]}?" if close else "no such file; correct the path"
    for other, command in COMMANDS.items():
        if source in shipped_recipes(other):
            return f"only `karat {command}` takes this recipe: karat {command} {source}"
    if source.startswith(TIMM) or re.search(r"_(patch|window)\d", source):
        key = "init_from" if source.startswith(TIMM) else "model.name"
        models = [part for part in part_names("model") if source.removeprefix(TIMM).startswith(part)]
        example = f"imagenet_{[*models, 'vit_tiny'][0]} {key}={source}"
        return f"a model of timm, not a recipe; name a recipe before it, as in {example}"
    shipped = shipped_recipes(folder)
    hint = "recipes train vision transformers (ViT, DeiT, Swin, ConViT); `karat recipes` lists them"
    if any(source in name for name in shipped):
        hint = f"`karat recipes {source}` lists those with this in their name"
    return f"neither a file nor a shipped recipe; {did_you_mean(source, shipped, hint, likeness=0.8)}"


def _read_recipe_file(path: Path, folder: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
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
        lay_over(tree, _read_extended(path, name, folder, (*extended_by, path.resolve())))
    lay_over(tree, own)
    return tree


def _read_extended(path: Path, name: str, folder: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    if name in shipped_recipes(folder):
        return _read_shipped(name, folder, extended_by)
    parts = {str(file.relative_to(folder).with_suffix("")): file for file in sorted((folder / "parts").rglob("*.yaml"))}
    if name in parts:
        return _read_recipe_file(parts[name], folder, extended_by)
    if (path.parent / name).is_file():
        return _read_recipe_file(path.parent / name, folder, extended_by)
    for other, command in COMMANDS.items():
        if name in shipped_recipes(other):
            raise RecipeError(f"{path} extends {name}, a recipe of `karat {command}`: karat {command} {path}")
    beside = [file.name for file in path.parent.glob("*.y*ml") if file != path]
    hint = did_you_mean(name, [*beside, *shipped_recipes(folder), *parts], "`karat recipes` lists the shipped ones")
    raise RecipeError(f"{path}: extends = {name!r}: neither a shipped recipe nor a file beside this one; {hint}")


def _read_shipped(name: str, folder: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    shipped, tree = shipped_recipes(folder)[name], dict[str, Any]()
    for file in shipped.files:
        lay_over(tree, _read_recipe_file(file, folder, extended_by))

    def fill(value: Any) -> Any:
        return value.format(**shipped.words) if isinstance(value, str) and "{" in value else value

    filled: dict[str, Any] = mapped(tree, fill)
    return filled


def read_run_recipe(path: Path) -> dict[str, Any]:
    """Read the recipe of a run, which may be somebody else's. So it may name no other file. Raises RecipeError."""
    tree, fix = _read_yaml(path), "a run's recipe must be complete; restore the one that training wrote"
    if EXTENDS in tree:
        raise RecipeError(f"{path}: extends: {fix}")
    if not tree:
        raise RecipeError(f"{path}: empty; {fix}, or remove the file and run the same karat train again")
    return tree


def lay_over(tree: dict[str, Any], upper: Mapping[str, Any]) -> None:
    """Merge a tree's keys over another's, section by section. Lists and values are replaced as a whole."""
    for key, value in upper.items():
        below = tree.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            lay_over(below, value)
        else:
            tree[key] = value


# PyYAML's words for a mistake, the first that fit, and ours.
_SYNTAX = {
    r"\\t": "a tab; indent by spaces",
    "constructor for the tag": "a tag, which is a word after !; remove it, or quote the value if it is a text",
    "cannot start any token|undefined alias": "a value with a special character; quote it",
    "unknown escape": "a backslash in double quotes; use single quotes",
    "values are not allowed": "an unexpected `: `; check the line's blanks and quotes, and the line before it",
    "<block end>.*'[]}]'": "a bracket without its beginning; remove it",
    "<block end>.*'<scalar>'": "a text after a value; quote all of it",
    "<block end>": "wrong blanks at the line's start; align it with the keys of its section",
    "expected ',' or|stream end|end of stream": "a bracket or a quote without its end; close it",
    "expected ':'": "a key without its value; write it as key: value",
    "another document": "a second recipe; remove the ---",
}


def _syntax(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong with a text that is not YAML, and its line."""
    problem = str(error.problem)
    said = next((words for pattern, words in _SYNTAX.items() if re.search(pattern, problem)), problem)
    mark = (said.startswith(("a bracket or", "a key")) and error.context_mark) or error.problem_mark
    return f"{f', line {mark.line + 1}' if mark else ''}: not valid YAML: {said}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = parse(read_text(path, _LARGEST))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; name a recipe's YAML file") from None
    except yaml.MarkedYAMLError as error:
        raise RecipeError(f"{path}{_syntax(error)}") from None
    except (UnicodeDecodeError, yaml.reader.ReaderError):
        raise RecipeError(f"{path}: not a recipe in YAML: it holds bytes that are no text; name another file") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not a recipe in YAML: {str(error).splitlines()[0]}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: {as_written(tree)}: should be sections such as `model:` and `data:`")
    # `data:` without anything below it is an empty section.
    return {key: {} if value is None else value for key, value in tree.items()}
