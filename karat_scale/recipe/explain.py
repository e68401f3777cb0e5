"""`karat explain KEY`: what a key of a recipe means, its type, its default and what it may change."""

from collections.abc import Sequence

from karat_scale.console import print_table
from karat_scale.errors import RecipeError
from karat_scale.recipe import RunRecipe
from karat_scale.recipe.base import NEVER_ALLOWED, Effect
from karat_scale.recipe.keys import Key, KeySection, sections_of, type_in_words
from karat_scale.recipe.loading import keys_like
from karat_scale.recipe.synonyms import elsewhere, keys_called

_ON_RESUME = {
    Effect.NOTHING: "A run may resume with another value.",
    Effect.SPEED: "A run may resume with another value.",
    Effect.ROUNDING: "A run may resume with another value, and notes it.",
    Effect.MODEL: "A run resumes with another value only if resume.allow names the key.",
    Effect.SHAPES: "A run cannot resume with another value.",
}


def explain(names: Sequence[str], schema: type[RunRecipe]) -> int:
    """Print what each key or section means, or all sections if there is no name; returns the exit code.

    Raises:
        RecipeError: there is no such key.
    """
    sections = sections_of(schema)
    if not names:
        _print_sections(sections)
    for name in names:
        _explain(name, sections, schema)
    return 0


def _explain(name: str, sections: Sequence[KeySection], schema: type[RunRecipe]) -> None:
    keys = {key.name: key for section in sections for key in section.keys}
    by_name = {section.name: section for section in sections if section.name}
    known = [*keys, *by_name]
    leaves = [key for key in known if key.rpartition(".")[2] == name]
    found = [name] if name in known else leaves or keys_called(name, known)
    if not found and (said := elsewhere(name)):
        raise RecipeError(f"karat explain {name}: no such key; {said}")
    if not found:
        close = keys_like(name, schema)
        hint = f"did you mean {close[0]}?" if close else "`karat explain` lists the sections"
        raise RecipeError(f"karat explain {name}: no such key; {hint}")
    if name not in found:
        print(f"{name} is {' or '.join(found)} here.")
    for one in found:
        if one in by_name:
            _print_section(by_name[one])
        else:
            _print_key(keys[one])


def _print_key(key: Key) -> None:
    default = "required" if key.default is None else f"default {key.default}"
    print(f"\n{key.name}: {type_in_words(key.schema)} ({default})")
    print(f"  {key.meaning}")
    effect = Effect.SHAPES if key.name in NEVER_ALLOWED else key.effect
    print(f"  Another value may change {key.effect.value}. {_ON_RESUME[effect]}")


def _print_section(section: KeySection) -> None:
    rows = [[key.name, "required" if key.default is None else key.default, key.meaning] for key in section.keys]
    print_table(f"{section.name}: {' '.join(section.meaning.split())}", ["key", "default", "meaning"], rows, (0, 1, 2))


def _print_sections(sections: Sequence[KeySection]) -> None:
    rows = [[section.name or "(top)", " ".join(section.meaning.split())] for section in sections if section.keys]
    print_table("Sections of a recipe. `karat explain SECTION` lists its keys.", ["section", "meaning"], rows, (0, 1))
