"""Parquet files as the Hugging Face hub ships image sets, as a source.

train-00000-of-00294.parquet    in `src` or `src`/data; the file's name says the split
0000.parquet                    in `src`/train, `src`/validation, ...; the folder's name says it

One column holds images, as bytes or as a struct of `bytes` and `path`. Another holds labels: names, or numbers. The
schema's metadata may name the numbers. Rows are stored in groups, which can only be read whole. So the samples of a few
groups are shuffled together, and the groups are drawn from all files.
"""

import json
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from karat_scale.data.indexing import split_named_in
from karat_scale.data.prepare.sources import base
from karat_scale.data.prepare.sources.imagefolder import LIKE_SPLITS
from karat_scale.data.prepare.sources.small import renumbered
from karat_scale.data.shards.shard_format import MOST_CLASSES, SPLIT_FOLDERS
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.tables import how_to_install


@dataclass(frozen=True)
class Columns:
    """Columns of images and labels.

    image_bytes, image_path: the columns inside of `image`; without paths, image_path is None. classes: the names that
    the labels number; empty if the files have none.
    """

    image: str
    image_bytes: str
    image_path: str | None
    label: str
    classes: list[str]


def find_columns(src: Path, schemas: list[Any], options: base.SourceOptions) -> Columns:
    """Return the columns of files with these Arrow schemas. Raises DataError if they are unclear or if files differ."""
    schema = schemas[0]
    features = _features(schema)
    images = [field.name for field in schema if "bytes" in _content(field.type)]
    named = [name for name, feature in features.items() if isinstance(feature.get("names"), list)]
    plain = [field.name for field in schema if _content(field.type) <= {"text", "integers"}]
    image = _choose(src, "image", options.image_column, images, images, schema.names)
    label = _choose(src, "label", options.label_column, named or plain, plain, schema.names)
    found = features.get(label, {}).get("names") or []
    for other in schemas[1:]:
        if (
            set(other.names) != set(schema.names)
            or (_features(other).get(label, {}).get("names") or []) != found
            or any(_content(other.field(name).type) != _content(schema.field(name).type) for name in (image, label))
        ):
            raise DataError(f"{src}: its Parquet files have different columns or classes; give one data set as --src")
    content = _content(schema.field(image).type)
    if "struct" not in content:
        return Columns(image, image, None, label, _distinct(found))
    image_path = f"{image}.path" if "path" in content else None
    return Columns(image, f"{image}.bytes", image_path, label, _distinct(found))


def _features(schema: Any) -> dict[str, Any]:
    """Return what the hub's metadata says about each column."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _content(kind: Any) -> set[str]:
    """Return what a column of this type holds, which must be the same in all files: bytes, text, integers, or others.

    A struct has the `bytes` of an image and perhaps its path. True and false are integers. A column of what pandas
    calls categories holds its values if these may be labels; categories of bytes are no images.
    """
    import pyarrow.types as types

    if types.is_dictionary(kind) and (values := _content(kind.value_type)) <= {"text", "integers"}:
        return values
    if types.is_struct(kind):
        has_bytes = any(part.name == "bytes" and _content(part.type) == {"bytes"} for part in kind)
        return {"struct"} | ({part.name for part in kind} & {"path"}) | ({"bytes"} if has_bytes else set())
    if types.is_binary(kind) or types.is_large_binary(kind):
        return {"bytes"}
    if types.is_string(kind) or types.is_large_string(kind):
        return {"text"}
    return {"integers" if types.is_integer(kind) or types.is_boolean(kind) else str(kind).removeprefix("large_")}


def _choose(src: Path, what: str, asked: str | None, likely: list[str], fit: list[str], names: list[str]) -> str:
    if asked is not None:
        if asked not in fit:
            raise DataError(
                f"--{what}-column {asked}: {src} has no such column of {what}s; it has {', '.join(names)}, of which "
                f"{', '.join(fit) or 'none'} may hold {what}s"
            )
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


# The most bytes of images that a process holds, unless a single group has more.
WINDOW_BYTES = 128_000_000
# Some have the data set's name before the split's.
_NAME = re.compile(
    r"(?P<before>(?P<prefix>[\w.-]+-)?(?P<split>\w+)-)(?P<number>\d+)-of-(?P<count>\d+)(-[0-9a-f]+)?\.parquet"
)


def parquet_files(src: Path) -> list[Path]:
    """Return the Parquet files of a source, sorted; empty if it has none."""
    if src.is_file():
        return [src] if src.suffix == ".parquet" else []
    return sorted(
        path
        for place in (".", "data", *SPLIT_FOLDERS)
        for path in (src / place).glob("*.parquet")
        if path.name[0] != "."
    )


def parquet_splits(
    src: Path, files: list[Path], split: str | None, options: base.SourceOptions
) -> tuple[base.Openers, list[str]]:
    """Return the splits of Parquet files, and their classes. Raises DataError."""
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path, src) or split or "train", []).append(path)
    wanted = base.labelling_splits(src, by_split, split)  # the others may have no labels, or be only partly there
    missing = [name for origin in by_split if origin in wanted for name in _missing(src, by_split[origin])]
    if missing and not options.any_hash:
        raise DataError(
            f"{src} has no {missing[0]}, and lacks {len(missing)} files in all; fetch them, or go without by --any-hash"
        )
    files = [path for origin in by_split if origin in wanted for path in by_split[origin]]
    schemas: list[Any] = []
    for path in files:
        with _opened(path) as file:
            schemas.append(file.schema_arrow)
    columns = find_columns(src, schemas, options)
    labels = {path: _column(path, columns.label) for path in files}
    for path, found in labels.items():
        if None in found:
            raise DataError(f"{path}: row {found.index(None)} has no {columns.label}; label it, or remove the row")
    own = columns.classes
    if not own:  # the sorted names, or the numbers up to the largest
        values = {label for found in labels.values() for label in found}
        named = all(isinstance(value, str) for value in values)
        if not named and max(values) >= MOST_CLASSES:
            raise DataError(
                f"{src}: column {columns.label} has the number {max(values)}, so it holds no classes; name the column "
                "that does by --label-column"
            )
        own = sorted(values) if named else [str(number) for number in range(max(values) + 1)]
    facts = {"image_column": columns.image, "label_column": columns.label, "not_as_published": missing}
    return {
        name: partial(ParquetSource, paths, [labels.get(path, []) for path in paths], columns, own, facts)
        for name, paths in by_split.items()
    }, own


class ParquetSource(base.ListedSource):
    """The rows of some Parquet files, in order. See Source. Raises DataError for a label that is no class.

    own: the source's classes, which the labels number. classes: the shards' classes, maybe in another order.
    """

    exact_sizes = False  # they would take reading all images

    def __init__(
        self,
        files: list[Path],
        labels: list[list[Any]],
        columns: Columns,
        own: list[str],
        facts: dict[str, Any],
        classes: list[str],
    ) -> None:
        self._columns = columns
        self._groups: list[tuple[Path, int]] = []
        counts, sizes, weights, paths, numbers = [], [], [], [], []
        named = {name: number for number, name in enumerate(own)}
        for path, found in zip(files, labels, strict=True):
            given = np.array([named[one] if isinstance(one, str) else one for one in found], dtype=np.int64)
            numbers.append(renumbered(str(path), given, own, classes))
            paths += _paths(path, columns, len(found))
            for group, (rows, size) in enumerate(_groups(path, columns)):
                self._groups.append((path, group))
                counts.append(rows)
                sizes.append(size // max(rows, 1))
                weights.append(size)
        if not paths:
            raise DataError(f"{files[0]} has no rows; fetch it again")
        super().__init__(classes, paths, np.concatenate(numbers), np.repeat(sizes, counts))
        self.facts = facts
        self.blocks = np.repeat(np.arange(len(counts)), counts)
        self.window = max(1, WINDOW_BYTES // max(1, max(weights)))
        self._firsts = np.cumsum(counts) - counts
        self._held: OrderedDict[int, list[bytes | None]] = OrderedDict()

    def read(self, index: int) -> bytes:
        assert self.blocks is not None
        group = int(self.blocks[index])
        if group not in self._held:
            if len(self._held) >= self.window:
                self._held.popitem(last=False)
            self._held[group] = self._read_group(group)
        data = self._held[group][index - int(self._firsts[group])]
        if data is None:
            raise base.UnreadableSampleError("the row has no bytes of an image")
        return data

    def _read_group(self, number: int) -> list[bytes | None]:
        path, group = self._groups[number]
        with _opened(path) as file:
            rows = file.read_row_group(group, columns=[self._columns.image_bytes], use_threads=False).column(0)
            return [row["bytes"] if isinstance(row, dict) else row for row in rows.to_pylist()]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a Parquet file. Raises DataError if it is damaged, or without pyarrow."""
    try:
        import pyarrow as arrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: {how_to_install('parquet')}") from error
    try:
        with ParquetFile(path) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a complete Parquet file ({error}); fetch it again") from error


def _split_of(path: Path, src: Path) -> str:
    match = _NAME.fullmatch(path.name)
    if match and not match["prefix"]:
        return match["split"]
    if src not in (path, path.parent) and path.parent.name in SPLIT_FOLDERS:
        return path.parent.name
    return split_named_in(path.stem, LIKE_SPLITS)


def _missing(src: Path, paths: list[Path]) -> list[str]:
    """Return the missing files, by the names of the others. Raises DataError if a split has files of two sets."""
    matches = [match for path in paths if (match := _NAME.fullmatch(path.name))]
    sets = Counter((match["split"], match["count"]) for match in matches)
    repeated = len({match["number"] for match in matches}) < len(matches)
    if len(sets) > 1 or repeated or 0 < len(matches) < len(paths):
        raise DataError(f"{src}: {paths[0].name} and {paths[-1].name} are of one split but of two data sets; keep one")
    if not matches:
        return []
    first, there = matches[0], {int(match["number"]) for match in matches}
    width = len(first["number"])
    return [
        f"{first['before']}{number:0{width}d}-of-{first['count']}.parquet"
        for number in range(int(first["count"]))
        if number not in there
    ]


def _column(path: Path, name: str) -> list[Any]:
    with _opened(path) as file:
        values: list[Any] = file.read(columns=[name], use_threads=False).column(0).to_pylist()
    return values


def _paths(path: Path, columns: Columns, rows: int) -> list[str]:
    """Return the path of each image from its column, or else the file and the row."""
    numbered = [f"{path.stem}/{row:06d}" for row in range(rows)]
    if columns.image_path is None:
        return numbered
    found = _column(path, columns.image_path)
    return [(row or {}).get("path") or number for row, number in zip(found, numbered, strict=True)]


def _groups(path: Path, columns: Columns) -> Iterator[tuple[int, int]]:
    """Yield the rows and the bytes of images of each group."""
    with _opened(path) as file:
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            parts = [group.column(i) for i in range(group.num_columns)]
            yield (
                group.num_rows,
                sum(part.total_uncompressed_size for part in parts if part.path_in_schema == columns.image_bytes),
            )
