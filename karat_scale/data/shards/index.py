"""Indexes of shards and betons: columns of numbers, and the samples' keys, in an npz file.

An index whose hash is right may still lie: another program wrote it. So its columns are checked once, when a split is
opened.
"""

import io
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[Any]
KEY = "key"


def read_columns(data: bytes, kinds: Mapping[str, Any], samples: int, file_bytes: int) -> dict[str, Column]:
    """Return the columns of an index's bytes, as numbers of these kinds.

    Args:
        kinds: the dtype of each column; `offset` and `size` are among them.
        samples: how many samples there must be.
        file_bytes: the size of the file that holds them.

    Raises:
        ValueError: it is no index of such a file; the message says why, in a few words.
    """
    columns = {name: _numbers(read_column(data, name), name, kind) for name, kind in kinds.items()}
    keys = read_column(data, KEY)
    if keys.dtype.kind != "S":
        raise ValueError(f"column {KEY} holds no names")
    for name, column in (*columns.items(), (KEY, keys)):
        if column.shape != (samples,):
            raise ValueError(f"column {name} has the shape {column.shape}, and there are {samples} samples")
    outside = (columns["size"] < 0) | (columns["offset"] < 0) | (columns["offset"] > file_bytes - columns["size"])
    if outside.any():
        raise ValueError(f"sample {outside.argmax()} lies outside of the file's {file_bytes} bytes")
    return columns


def read_column(data: bytes, name: str) -> Column:
    """Return one column of an index's bytes, as it is.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    try:
        archive = np.load(io.BytesIO(data), allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is no npz file")
        with archive:
            return np.asarray(archive[name])
    except KeyError:
        raise ValueError(f"it has no column {name}") from None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, MemoryError, NotImplementedError, SyntaxError) as error:
        raise ValueError(f"it is no npz file: {str(error)[:100] or type(error).__name__}") from None


def key_of(data: bytes, sample: int) -> str:
    """Return the key of a sample, for messages. Bytes that are not UTF-8 become \\xNN."""
    key: bytes = read_column(data, KEY)[sample]
    return key.decode(errors="backslashreplace")


def keys_of(data: bytes) -> list[str]:
    """Return the keys of all samples, as `key_of`."""
    return [key.decode(errors="backslashreplace") for key in read_column(data, KEY).tolist()]


def _numbers(column: Column, name: str, kind: Any) -> Column:
    if column.dtype.kind not in "iu":
        raise ValueError(f"column {name} holds no whole numbers")
    limits = np.iinfo(kind)
    if column.size and (int(column.min()) < limits.min or int(column.max()) > limits.max):
        raise ValueError(f"column {name} has numbers that are out of range")
    return column.astype(kind, copy=False)
