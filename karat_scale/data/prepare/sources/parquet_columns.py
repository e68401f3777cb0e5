"""Which columns of Parquet files hold images and labels, and the names of the classes."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from karat_scale.data.prepare.sources.base import SourceOptions
from karat_scale.foundation.errors import DataError


@dataclass(frozen=True)
class Columns:
    """Columns of images and labels.

    image_bytes, image_path: the columns inside of `image`; without paths, image_path is None. classes: the names that
    the labels number; empty if the files do not say.
    """

    image: str
    image_bytes: str
    image_path: str | None
    label: str
    classes: list[str]


def find_columns(src: Path, schemas: list[Any], options: SourceOptions) -> Columns:
    """Return the columns of files with these Arrow schemas. Raises DataError if they are not clear, or differ."""
    import pyarrow.types as types

    schema = schemas[0]
    features = _features(schema)
    images = [field.name for field in schema if _holds_images(field.type)]
    named = [name for name, feature in features.items() if isinstance(feature.get("names"), list)]
    plain = [
        field.name
        for field in schema
        if any(fits(field.type) for fits in (types.is_integer, types.is_string, types.is_large_string))
    ]
    image = _choose(src, "image", options.image_column, images, images, schema.names)
    label = _choose(src, "label", options.label_column, named or plain, plain, schema.names)
    found = features.get(label, {}).get("names") or []
    for other in schemas[1:]:
        if set(other.names) != set(schema.names) or (_features(other).get(label, {}).get("names") or []) != found:
            raise DataError(f"{src}: its Parquet files have different columns or classes; give one data set as --src")
    kind = schema.field(image).type
    if not types.is_struct(kind):
        return Columns(image, image, None, label, _distinct(found))
    has_path = any(part.name == "path" for part in kind)
    return Columns(image, f"{image}.bytes", f"{image}.path" if has_path else None, label, _distinct(found))


def _features(schema: Any) -> dict[str, Any]:
    """Return what the hub's metadata says about each column."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _holds_images(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return any(part.name == "bytes" and _holds_images(part.type) for part in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _choose(src: Path, what: str, asked: str | None, likely: list[str], fit: list[str], names: list[str]) -> str:
    if asked is not None:
        if asked not in fit:
            raise DataError(f"--{what}-column {asked}: {src} has no such column of {what}s; it has {', '.join(names)}")
        return asked
    if what in likely:
        return what
    if len(likely) != 1:
        raise DataError(f"{src}: which column holds the {what}s? Use --{what}-column with one of {', '.join(names)}")
    return likely[0]


def _distinct(names: list[str]) -> list[str]:
    """Number the names that several classes share, such as ImageNet's crane."""
    often = Counter(names)
    return [f"{name} ({number})" if often[name] > 1 else name for number, name in enumerate(names)]
