"""Load a recipe from a file and dotted overrides, and write it back. Errors are a line for each mistake.

A portable recipe is without the directories of the machine it ran on.
"""

import difflib
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import TypeVar

from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import Recipe, RunRecipe
from karat_scale.recipe.base import LONGEST, Effect, as_written, key_of, setting_text, wanted_by
from karat_scale.recipe.files import lay_over, mapped, parse, read_recipe, read_run_recipe
from karat_scale.recipe.synonyms import elsewhere, keys_called


def portable_recipe(recipe: RunRecipe) -> str:
    """Return the resolved recipe as YAML. Absolute paths, and those with `~` or `..`, are cut to the last name."""
    tree = mapped(recipe.model_dump(mode="json", by_alias=True), _portable)
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)


def text_digest(text: str) -> str:
    """Return the SHA-256 as hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def _portable(value: Any) -> Any:
    if isinstance(value, str) and (value.startswith(("/", "~")) or ".." in Path(value).parts):
        return Path(value).name
    return value


R = TypeVar("R", bound=RunRecipe, default=Recipe)
S = TypeVar("S", bound=BaseModel)
MOST_MISTAKES = 10  # that are said; of the others their number


def load_recipe(source: str | Path, overrides: Sequence[str] = (), schema: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """Read and validate a recipe.

    Args:
        source: a shipped recipe's name or the path of a YAML file.
        overrides: `key=value` strings; keys are dotted paths, values are YAML.
        schema: the kind of recipe.

    Raises:
        RecipeError: a line for each mistake, which names the field, the value and the fix.
    """
    name, tree = read_recipe(str(source), schema.shipped)
    return _whole(tree, name, str(source), overrides, schema)


def load_run_recipe(path: Path, overrides: Sequence[str], schema: type[R]) -> R:
    """Read and validate the recipe of a run, which may be somebody else's: its sections say so by `found_in`.

    Args:
        path: the run's recipe.yaml.
        overrides: of the user, as of `load_recipe`.

    Raises:
        RecipeError: it is damaged, or an override does not fit it.
    """
    recipe = _whole(read_run_recipe(path), path.stem, str(path), overrides, schema)
    return recipe.changed(data=recipe.data.of(path), deepspeed=recipe.deepspeed.of(path))


def _whole(tree: dict[str, Any], name: str, source: str, overrides: Sequence[str], schema: type[R]) -> R:
    for override in overrides:
        _apply_override(tree, override, schema)
    for key, value in leaves(tree):
        if isinstance(value, str) and (left := re.search(r"\{(base|model|attention)\}", value)):
            raise RecipeError(
                f"{source}: {key} = {value[:LONGEST]!r}: only a shipped recipe's name fills in {left[0]}; set {key}"
            )
    run = tree.setdefault("run", {})
    if isinstance(run, dict):
        run["name"] = run.get("name") or name
        run["dir"] = run.get("dir") or f"runs/{run['name']}"
    return validate_recipe(tree, source, schema, [override.partition("=")[0] for override in overrides])


def validate_recipe(
    tree: Mapping[str, Any],
    source: str,
    schema: type[R] = Recipe,  # type: ignore[assignment]
    overridden: Collection[str] = (),
) -> R:
    """Validate a mapping as a recipe.

    Raises:
        RecipeError: a line for each mistake. It begins with `source` unless it is about one of the keys `overridden`.
    """
    try:
        recipe = schema.model_validate(tree)
    except ValidationError as error:
        if schema is not Recipe:
            with suppress(ValidationError):
                Recipe.model_validate(tree)
                raise RecipeError(f"{source}: a recipe of `karat train`: karat train {source}") from None
        own = tuple(overridden)

        def is_own(line: str) -> bool:
            return line.startswith(own) or any(key.startswith(f"{line.partition(':')[0]}.") for key in own)

        lines = _mistakes(error, schema)
        raise RecipeError(*(line if is_own(line) else f"{source}: {line}" for line in lines)) from None
    if unknown := [key for key in recipe.resume.allow if key not in schema_keys(schema)]:
        hint = f"write several as a list, [{unknown[0]}]" if "," in unknown[0] else key_hint(unknown[0], schema)
        said = f"resume.allow = {unknown[0]}: no such key; {hint}"
        raise RecipeError(said if "resume.allow" in overridden else f"{source}: {said}")
    return recipe


def section_of(section: type[S], settings: Mapping[str, Any]) -> S:
    """Return a section of a recipe with these settings. Raises RecipeError."""
    try:
        return section(**settings)
    except ValidationError as error:
        raise RecipeError(*_mistakes(error, section)) from None


def dump_recipe(recipe: RunRecipe) -> str:
    """Return the resolved recipe as YAML, in schema order."""
    tree = recipe.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)


def flatten(recipe: RunRecipe) -> dict[str, Any]:
    """Return every leaf of a recipe by its dotted key."""
    return dict(leaves(recipe.model_dump(mode="json", by_alias=True), whole=effects(type(recipe))))


def differing_keys(old: RunRecipe, new: RunRecipe, allowed: Sequence[str] = ()) -> list[str]:
    """Return the dotted keys whose values differ and affect what is learned, except those in `allowed`.

    A section's name stands for all its keys.
    """
    changed = _changed(old, new, Effect.MODEL, Effect.SHAPES)
    return [key for key in changed if not any(key == a or key.startswith(f"{a}.") for a in allowed)]


def rounding_keys(old: RunRecipe, new: RunRecipe) -> list[str]:
    """Dotted keys whose values differ and may change rounding or pixels, but not the model that is meant."""
    return _changed(old, new, Effect.ROUNDING)


def effects(schema: type[RunRecipe] = Recipe) -> dict[str, Effect]:
    """What each leaf of a recipe may change, by dotted key."""
    return {key: effect for key, field, effect in _fields(schema) if not _is_section(field.annotation)}


def schema_keys(schema: type[BaseModel] = Recipe) -> Iterator[str]:
    """Yield every valid dotted key: sections and leaves."""
    return (key for key, *_ in _fields(schema))


def _fields(
    model: type[BaseModel], prefix: str = "", inherited: Effect = Effect.MODEL
) -> Iterator[tuple[str, FieldInfo, Effect]]:
    """Yield sections and leaves, each after the section that it is in, and what they may change."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        effect = next((mark for mark in field.metadata if isinstance(mark, Effect)), inherited)
        yield key, field, effect
        if _is_section(field.annotation):
            yield from _fields(field.annotation, f"{key}.", effect)


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _changed(old: RunRecipe, new: RunRecipe, *kinds: Effect) -> list[str]:
    before, after, known = flatten(old), flatten(new), effects(type(new))
    return [key for key in after if before.get(key) != after[key] and known[key] in kinds]


def _apply_override(tree: dict[str, Any], override: str, schema: type[RunRecipe]) -> None:
    key, equals, text = override.partition("=")
    if not equals or key.split() != [key]:
        raise RecipeError(f"override {override[:LONGEST]!r}: should be key=value without blanks, such as optim.lr=1e-3")
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        why = "the value is not valid YAML; quote it, or close its brackets"
        if isinstance(error, yaml.constructor.ConstructorError) and "for the tag" not in str(error.problem):
            why = str(error.problem)
        raise RecipeError(f"override {override[:LONGEST]!r}: {why}") from None
    if re.search(r"(^|\s)#", text) and "#" not in str(value):
        raise RecipeError(f"override {override[:LONGEST]!r}: `#` begins a comment in YAML; quote the value")
    node = tree
    *parents, leaf = key.split(".")
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise RecipeError(f"override {override[:LONGEST]!r}: {name} is not a section; {key_hint(key, schema)}")
        node = child
    if value:
        lay_over(node, {leaf: value})
    else:  # also an empty section
        node[leaf] = value


def leaves(tree: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield the values of a tree by their dotted keys; a mapping whose key is among `whole` is one value."""
    for key, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in whole:
            yield from leaves(value, f"{prefix}{key}.", whole)
        else:
            yield f"{prefix}{key}", value


def _mistakes(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    errors = sorted(error.errors(), key=lambda one: one["type"] == "missing")  # misspelt keys are why
    by_key: dict[str, list[Any]] = {}
    for one in errors:
        by_key.setdefault(key_of(one), []).append(one)
    lines = [*dict.fromkeys(line for key, own in by_key.items() for line in _descriptions(key, own, schema))]
    left = len(lines) - MOST_MISTAKES
    return lines if left <= 0 else [*lines[:MOST_MISTAKES], plural(left, "more mistake")]


# What these keys want, where the type of their value does not say it.
_SHAPES = {
    **dict.fromkeys(("augment.mean", "augment.std"), "should be three numbers, of red, green and blue"),
    "attention.blocks": "should be a section for each range of blocks, such as {8-11: {kind: karat}}",
    "checkpoint.every": "should be auto; for a number, set checkpoint.every_minutes or checkpoint.every_steps",
    "schedule.image_sizes": "should be pairs of epoch and size, such as [[0, 128], [34, 224]]",
}


def _descriptions(key: str, errors: Sequence[Any], schema: type[BaseModel]) -> list[str]:
    """Return a line for each error of a key; one, if the value has none of the types that the key may have."""
    lines = [_describe(key, one, schema) for one in errors]
    wanted = [wanted_by(one) for one in errors]
    if len({*wanted}) < 2 or not all(text.startswith("should be ") for text in wanted):
        return lines
    first, *others = wanted
    either = " or ".join([first.replace(" or ", ", "), *(text.removeprefix("should be ") for text in others)])
    return [f"{key} = {as_written(errors[0]['input'])}: {either}{_default_of(key, schema)}"]


def _describe(key: str, error: Any, schema: type[BaseModel]) -> str:
    shape = _SHAPES.get(key.partition("[")[0])
    given = as_written(error["input"])
    if error["type"] == "extra_forbidden":
        if key in schema_keys(schema):  # so a part of it was written with a dot
            nested = f"{key.replace('.', ': {')}: {given}{'}' * key.count('.')}"
            return f"{key}: a key with a dot works on the command line only; write {nested}"
        return f"{key}: unknown key; {key_hint(key, schema)}"
    if error["type"] == "missing":
        if isinstance(error["loc"][-1], int):
            return f"{key.rpartition('[')[0]} = {given}: {shape or 'too few values'}{_default_of(key, schema)}"
        return f"{key}: missing; every recipe needs it, or begins with `extends: RECIPE`"
    if error["type"] == "too_long":
        return f"{key} = {given}: {shape or 'too many values'}{_default_of(key, schema)}"
    if error["type"] == "model_type":
        keys = [own.rpartition(".")[2] for own in schema_keys(schema) if own.rpartition(".")[0] == key]
        return f"{key} = {given}: should be a section with the keys {', '.join(keys)}"
    if error["type"] == "value_error" and not isinstance(error["input"], (str, int, float, bool, list)):
        named: str = error["msg"].removeprefix("Value error, ")
        return named  # a validator of several fields names them itself
    takes_shape = error["type"] in ("tuple_type", "dict_type", "literal_error")
    wanted, separator, hint = (shape if shape and takes_shape else wanted_by(error)).partition(";")
    if error["type"] == "dict_type" and key.startswith("attention.blocks."):
        wanted += ", such as {kind: karat}"
    field = _field_of(key, schema)
    if field and type(None) in get_args(field.annotation) and wanted.startswith("should be "):
        wanted += ", or null" if "," in wanted else " or null"
    return f"{key} = {given}: {wanted}{separator}{hint}{_default_of(key, schema)}"


def key_hint(key: str, schema: type[BaseModel]) -> str:
    """Return what to do about an unknown key: the keys that it most likely means, or what lists all keys."""
    if said := elsewhere(key):
        return said
    if near := keys_like(key, schema):
        return f"did you mean {' or '.join(near)}?"
    if not issubclass(schema, RunRecipe):
        return f"the keys are {', '.join(schema_keys(schema))}"
    command = "karat explain" if issubclass(schema, Recipe) else "karat explain --detection"
    section = key.rpartition(".")[0]
    is_section = any(known.startswith(f"{section}.") for known in schema_keys(schema))
    return f"`{command} {section}` lists its keys" if is_section else f"`{command}` lists the sections"


def option_hint(option: str) -> str:
    """Return how to set what was given as an option to a command that takes overrides."""
    name = option.strip("-").replace("-", "_")
    keys = [key for key in schema_keys() if key.endswith(f".{name}")] or keys_called(name, schema_keys())
    written = " or ".join(f"{key}=VALUE" for key in keys if "." in key)
    otherwise = "a recipe's key is written key=value, and `karat explain` lists the sections"
    return elsewhere(name) or (f"write {written}" if written else otherwise)


def keys_like(key: str, schema: type[BaseModel] = Recipe) -> list[str]:
    """Return the valid keys that an unknown key most likely means: by another tool's name, or by its spelling."""
    keys, key = list(schema_keys(schema)), key.lower()  # as all keys are
    if called := keys_called(key, keys):
        return called
    section, _, leaf = key.rpartition(".")
    beside = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == section] if section else []
    if near := difflib.get_close_matches(leaf, beside, n=1, cutoff=0.7):
        return [f"{section}.{near[0]}"]
    same_leaf = [k for k in keys if k.rpartition(".")[2] == leaf]
    if len(same_leaf) == 1:
        return same_leaf
    # Within a section that exists, its name would make any two keys alike.
    close = [] if beside else difflib.get_close_matches(key, keys, n=1, cutoff=0.7)
    close = close or ([] if section else same_leaf[:1])
    if not close and key == leaf:
        alike = difflib.get_close_matches(key, [k.rpartition(".")[2] for k in keys], n=1, cutoff=0.7)
        close = [k for k in keys if k.rpartition(".")[2] in alike][:1]
    longer = [k for k in keys if k.rpartition(".")[2].startswith(f"{leaf}_")]
    return close or longer[:1] or ([] if beside else difflib.get_close_matches(key, keys, n=1, cutoff=0.6))


def _field_of(key: str, schema: type[BaseModel]) -> FieldInfo | None:
    return next((field for known, field, _ in _fields(schema) if known == key), None)


def _default_of(key: str, schema: type[BaseModel]) -> str:
    field = _field_of(key.partition("[")[0], schema)
    if field is None or field.is_required() or field.default in (None, ""):
        return ""
    return f" (default: {setting_text(field.default)})"
