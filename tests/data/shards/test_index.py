"""An index with wrong content but a matching hash gives one line that names the file, and no other error."""

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from karat_scale.data.shards.beton import COLUMNS, BetonSplit, index_bytes
from karat_scale.data.shards.shard_format import DATASET_FILE, BetonRecord, FileRecord, read_columns
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.errors import DataError

Change = Callable[[dict[str, Any]], Any]


def put(name: str, number: int, value: Any, kind: Any = None) -> Change:
    """Return a change of one number in a column, and of the column's dtype if `kind` is given."""

    def change(columns: dict[str, Any]) -> None:
        column = columns[name].astype(kind or columns[name].dtype)
        column[number] = value
        columns[name] = column

    return change


def swap(name: str, make: Callable[[Any], Any]) -> Change:
    """Return a change of a column."""
    return lambda columns: columns.update({name: make(columns[name])})


def _saved(columns: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    return buffer.getvalue()


LIES: dict[str, Change] = {
    "an offset beyond the file": put("offset", 3, 2**40),
    "an offset that overflows": put("offset", 3, 2**63 - 1),
    "a negative offset": put("offset", 3, -1),
    "a size beyond the file": put("size", 3, 2**40),
    "a size that overflows": put("size", 3, 2**63 - 1),
    "a negative size": put("size", 3, -5),
    "both overflow": lambda columns: (put("size", 3, 2**63 - 1)(columns), put("offset", 3, 2**63 - 1)(columns)),
    "an offset of 64 bits without a sign": put("offset", 3, 2**64 - 1, np.uint64),
    "labels that are NaN": put("label", 3, np.nan, np.float32),
    "a label that is too large": put("label", 3, 3),
    "a negative label": put("label", 3, -1),
    "a label beyond 32 bits": put("label", 3, 2**32, np.int64),
    "two dimensions": swap("offset", lambda column: column.reshape(-1, 1)),
    "no dimension": swap("offset", lambda column: column[0]),
    "a short column": swap("crc32", lambda column: column[:-1]),
    "a long column": swap("crc32", lambda column: np.append(column, column[0])),
    "no samples": lambda columns: columns.update({name: column[:0] for name, column in columns.items()}),
    "short keys": swap("key", lambda column: column[:-1]),
    "keys that are numbers": swap("key", lambda column: np.arange(len(column))),
    "a column of texts": swap("size", lambda column: column.astype(str)),
    "a column of complex numbers": swap("size", lambda column: column.astype(complex)),
    "a missing column": lambda columns: columns.pop("size"),
    "missing keys": lambda columns: columns.pop("key"),
    "objects": swap("size", lambda column: column.astype(object)),
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "no zip": lambda data: b"index" * 100,
    "a zip's beginning": lambda data: data[:100],
    "a zip of nothing": lambda data: b"PK\x05\x06" + bytes(18),
    "a plain array": lambda data: _array(np.arange(3)),
    "a damaged column": lambda data: data.replace(b"'descr': ", b"'desc': ", 1),
    "a column that is huge": lambda data: data.replace(b"(8,)", b"(9**9,)"),
}


def _array(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def rewrite(path: Path, change: Change | Callable[[bytes], bytes], of_bytes: bool) -> FileRecord:
    """Change an index, and return the record that fits it."""
    data = path.read_bytes()
    if of_bytes:
        data = change(data)  # type: ignore[arg-type]
    else:
        columns = dict(np.load(io.BytesIO(data)))
        change(columns)  # type: ignore[arg-type]
        data = _saved(columns)
    path.write_bytes(data)
    return FileRecord(name=path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


CASES = [*((change, False) for change in LIES.values()), *((change, True) for change in BYTES.values())]


def lies(directory: Path, change: Change | Callable[[bytes], bytes], of_bytes: bool) -> None:
    """Change the index of the second shard, and make the record agree with it."""
    record = rewrite(directory / "train-000001.index.npz", change, of_bytes)
    dataset = json.loads((directory / DATASET_FILE).read_text())
    dataset["splits"]["train"]["shards"][1]["index"] = record.model_dump()
    (directory / DATASET_FILE).write_text(json.dumps(dataset))


def test_what_is_no_index_is_told_as_such() -> None:
    one = io.BytesIO()
    np.save(one, np.ones(1))
    for data, said in (
        (b"x", "it is not an npz file"),
        (one.getvalue(), "it is not an npz file"),
        (_saved({"size": np.ones(1)}), "column size does not hold whole numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            read_columns(data, {"size": np.int64}, 1, 1)


def test_an_index_of_a_shard_that_lies_is_one_line(make_shards) -> None:
    directory = make_shards()
    index = directory / "train-000001.index.npz"
    whole = index.read_bytes()
    for change, of_bytes in CASES:
        index.write_bytes(whole)
        lies(directory, change, of_bytes)
        with pytest.raises(DataError) as refused:
            ShardSplit(directory, "train", 3)
        assert "train-000001" in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    """Return the directory of a beton that is made without FFCV and can be read without it.

    It holds four JPEGs, here of any bytes, and four images of raw pixels.
    """
    sizes = [100, 120, 140, 160, *[3 * 4 * 4] * 4]
    content = np.random.default_rng(0).integers(0, 256, sum(sizes), dtype=np.uint8).tobytes()
    path = tmp_path / "train.beton"
    path.write_bytes(content)
    columns = {
        "offset": np.cumsum([0, *sizes[:-1]]),
        "size": np.array(sizes),
        "label": np.arange(8) % 3,
        "crc32": np.zeros(8, np.int64),
        "mode": np.array([0] * 4 + [1] * 4),
        "width": np.full(8, 4),
        "height": np.full(8, 4),
    }
    (tmp_path / "train.beton.index.npz").write_bytes(index_bytes(columns, [f"{number:04d}" for number in range(8)]))
    seal(tmp_path)
    assert columns.keys() == COLUMNS.keys()
    assert len(BetonSplit(tmp_path, "train", 3)) == 8
    return tmp_path


def seal(directory: Path, **changes: Any) -> None:
    """Write the record that fits a beton and its index, apart from `changes`."""
    index, path = (directory / name for name in ("train.beton.index.npz", "train.beton"))
    files = [
        {"name": file.name, "bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in (path, index)
    ]
    record = BetonRecord(**{**files[0], "samples": 8, "index": files[1], "split": "train", "classes": list("abc")})
    (directory / "train.beton.json").write_text(json.dumps({**record.model_dump(), **changes}))


BETON_LIES: dict[str, Change] = {
    "another mode": put("mode", 0, 7),
    "no width": put("width", 0, 0),
    "a negative height": put("height", 0, -4),
    "more pixels than bytes": put("width", 5, 5),
    "pixels that overflow": lambda columns: (put("width", 5, 2**31 - 1)(columns), put("height", 5, 2**31 - 1)(columns)),
}


def test_an_index_or_record_of_a_beton_that_lies_is_one_line(beton: Path) -> None:
    index = beton / "train.beton.index.npz"
    whole = index.read_bytes()
    for change, of_bytes in (*CASES, *((change, False) for change in BETON_LIES.values())):
        index.write_bytes(whole)
        rewrite(index, change, of_bytes)
        seal(beton)
        with pytest.raises(DataError) as refused:
            BetonSplit(beton, "train", 3)
        assert "train.beton" in str(refused.value)
        assert "\n" not in str(refused.value)
    index.write_bytes(whole)
    for changes in ({"samples": -1}, {"samples": 10**30}, {"bytes": -1}, {"classes": []}, {"index": None}):
        seal(beton, **changes)
        with pytest.raises(DataError, match=r"train\.beton"):
            BetonSplit(beton, "train", 3)
    seal(beton)
    for name in ("train.beton", "train.beton.index.npz", "train.beton.json"):  # a pipe is refused at once
        kept = (beton / name).read_bytes()
        (beton / name).unlink()
        os.mkfifo(beton / name)
        with pytest.raises(DataError, match=name):
            BetonSplit(beton, "train", 3)
        (beton / name).unlink()
        (beton / name).write_bytes(kept)
    assert len(BetonSplit(beton, "train", 3)) == 8


def test_a_key_that_is_not_utf8_is_written_out_and_a_split_of_more_samples_than_its_shards_refused(make_shards) -> None:
    directory = make_shards()
    keys = np.array([b"\xff\xfe%d" % number for number in range(8)], dtype=np.bytes_)
    lies(directory, swap("key", lambda _: keys), of_bytes=False)
    assert ShardSplit(directory, "train", 3).locate(9) == (r"\xff\xfe1", "train-000001.tar")
    dataset = json.loads((directory / DATASET_FILE).read_text())
    dataset["splits"]["train"]["samples"] += 1
    (directory / DATASET_FILE).write_text(json.dumps(dataset))
    with pytest.raises(DataError, match="train has not as many samples as its shards"):
        ShardSplit(directory, "train", 3)
