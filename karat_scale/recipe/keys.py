"""Every key of a recipe with its type, default, effect and meaning, read from the schema."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from karat_scale.recipe import RunRecipe
from karat_scale.recipe.base import Effect
from karat_scale.recipe.loading import effects

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
        parts = schema.get("prefixItems")
        if parts:
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
