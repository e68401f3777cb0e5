"""A recipe without the directories of the machine it ran on."""

import hashlib
from pathlib import Path
from typing import Any

import yaml

from karat_scale.recipe import RunRecipe


def portable_recipe(recipe: RunRecipe) -> str:
    """Return the resolved recipe as YAML. Absolute paths, and those with `~` or `..`, are cut to the last name."""
    tree = _portable(recipe.model_dump(mode="json", by_alias=True))
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)


def text_digest(text: str) -> str:
    """Return the SHA-256 as hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _portable(part) for key, part in value.items()}
    if isinstance(value, str) and (value.startswith(("/", "~")) or ".." in Path(value).parts):
        return Path(value).name
    return value
