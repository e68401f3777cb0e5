"""Every key of a recipe with its type, default, effect and meaning, read from the schema.

`karat explain KEY` prints it.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from karat_scale.foundation.console import print_table, wrapped
from karat_scale.foundation.errors import RecipeError
from karat_scale.recipe import RunRecipe
from karat_scale.recipe.base import NEVER_ALLOWED, Effect
from karat_scale.recipe.loading import effects, key_hint
from karat_scale.recipe.synonyms import keys_called

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Key:
    """A key that holds a value. `schema` is its JSON schema, `default` is JSON, or None if the key is required."""

    name: str
    schema: Mapping[str, Any]
    default: str | None
    effect: Effect
    meaning: str


@dataclass(frozen=True)
class KeySection:
    """A section of a recipe, such as `train.recompute`; the recipe itself has no name."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


def sections_of(schema: type[RunRecipe]) -> list[KeySection]:
    """Return all sections of a recipe in the order of the schema."""
    whole = schema.model_json_schema(by_alias=True)
    return list(_sections(whole, whole, "", effects(schema)))


def _sections(
    whole: Mapping[str, Any], section: Mapping[str, Any], name: str, effect_of: Mapping[str, Effect]
) -> Iterator[KeySection]:
    inside = {f"{name}.{key}" if name else key: value for key, value in section["properties"].items()}
    below = {key: value for key, value in inside.items() if "$ref" in value}
    required = section.get("required", ())
    keys = [
        Key(
            key,
            value,
            None if key.rpartition(".")[2] in required else json.dumps(value["default"]),
            effect_of[key],
            " ".join(value["description"].split()),
        )
        for key, value in inside.items()
        if key not in below
    ]
    yield KeySection(name, section.get("description", ""), tuple(keys))
    for key, value in below.items():
        yield from _sections(whole, whole["$defs"][value["$ref"].rpartition("/")[2]], key, effect_of)


def type_in_words(schema: Mapping[str, Any], quote: Callable[[str], str] = str) -> str:
    """Return a type of JSON Schema in words; `quote` marks the values that a person may write."""
    if "anyOf" in schema:
        return " or ".join(type_in_words(one, quote) for one in schema["anyOf"])
    if ("const" in schema or "enum" in schema) and (choices := choices_of(schema)):
        return ", ".join(map(quote, choices))
    if schema["type"] == "array":
        if parts := schema.get("prefixItems"):
            return f"[{', '.join(type_in_words(part, quote) for part in parts)}]"
        return f"list of {type_in_words(schema['items'], quote)}"
    bounds = [f"{sign} {schema[bound]:,.10g}" for bound, sign in _BOUNDS.items() if bound in schema]
    return " ".join([schema["type"], ", ".join(bounds)]).strip()


def choices_of(schema: Mapping[str, Any]) -> list[str]:
    """Return the values that a type of JSON Schema is limited to, as a person writes them; none if it has no list."""
    if "anyOf" in schema:
        return [choice for one in schema["anyOf"] for choice in choices_of(one)]
    if schema.get("type") == "boolean":
        return ["true", "false"]
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return [choice if isinstance(choice, str) else json.dumps(choice) for choice in choices]


_ON_RESUME = {
    Effect.NOTHING: "A run may resume with another value.",
    Effect.SPEED: "A run may resume with another value.",
    Effect.ROUNDING: "A run may resume with another value, and its log says so.",
    Effect.MODEL: "A run resumes with another value only if resume.allow names the key.",
    Effect.SHAPES: "A run cannot resume with another value.",
}
# Of keys to which neither line applies as it stands.
_SAID_OF = {
    "data.path": (
        "Another path changes nothing that is learned, if the same data are there. A run may resume with it. With "
        "other training images or classes it resumes only if resume.allow names the key."
    ),
    "run.dir": (
        "Another directory is another run, which starts from the beginning, unless this run was moved there or "
        "checkpoint.url has its copy."
    ),
    "run.name": "Without run.dir, another name is another directory, so another run. With run.dir, a run may resume.",
    "resume.from": "Another value starts from other weights. It is used at the first start only.",
    "train.max_steps": "Another value trains for more or fewer steps. A run may resume with another value.",
    "train.epochs": (
        "Another value may change the model that is learned. A finished run resumes with a larger value. In any other "
        "case, a run resumes with another value only if resume.allow names the key."
    ),
}


def explain(names: Sequence[str], schema: type[RunRecipe]) -> int:
    """Print what each key or section means, or all sections if there is no name; returns the exit code.

    Raises:
        RecipeError: there are no such keys; a line for each.
    """
    top, *sections = sections_of(schema)
    if not names:
        shown: list[Key | KeySection] = [*top.keys, *(section for section in sections if section.keys)]
        title = "Sections of a recipe, and the key outside them. `karat explain SECTION` lists a section's keys."
        print_table(title, ["section", "meaning"], [[one.name, " ".join(one.meaning.split())] for one in shown], (0, 1))
    mistakes: list[str] = []
    for name in names:
        try:
            _explain(name, [top, *sections], schema)
        except RecipeError as error:
            mistakes += error.mistakes
    if mistakes:
        raise RecipeError(*mistakes)
    return 0


def _explain(name: str, sections: Sequence[KeySection], schema: type[RunRecipe]) -> None:
    keys = {key.name: key for section in sections for key in section.keys}
    by_name = {section.name: section for section in sections if section.name}
    known = [*keys, *by_name]
    lower = name.lower()  # as all keys are
    leaves = [key for key in known if key.rpartition(".")[2] == lower]
    found = [lower] if lower in known else leaves or keys_called(name, known)
    if not found:
        raise RecipeError(f"karat explain {name}: no such key; {key_hint(name, schema)}")
    if name not in found:
        print(f"{name} is {' or '.join(found)} here.")
    for one in found:
        if section := by_name.get(one):
            rows = [[key.name, "required" if key.default is None else key.default, key.meaning] for key in section.keys]
            below = [inner for inner in sections if inner.name.startswith(f"{one}.")]
            rows += [[inner.name, "a section", " ".join(inner.meaning.split())] for inner in below]
            title = f"{section.name}: {' '.join(section.meaning.split())}"
            print_table(title, ["key", "default", "meaning"], rows, (0, 1, 2))
        else:
            _print_key(keys[one])


def _print_key(key: Key) -> None:
    default = "required" if key.default is None else f"default {key.default}"
    effect = Effect.SHAPES if key.name in NEVER_ALLOWED else key.effect
    changes = "changes" if key.effect is Effect.NOTHING else "may change"
    said = _SAID_OF.get(key.name, f"Another value {changes} {key.effect.value}. {_ON_RESUME[effect]}")
    lines = [
        f"{key.name}: {type_in_words(key.schema)} ({default})",
        f"  {key.meaning}",
        f"  {said}",
    ]
    print("", *(wrapped(line, "  ") for line in lines), sep="\n")
