"""What a store says of a file."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class FileFacts(NamedTuple):
    """The size of a file, and what its server says of its content: an ETag, a hash or a time; empty if nothing."""

    bytes: int
    etag: str


def facts_of(info: Mapping[str, Any]) -> FileFacts:
    """Return what one of fsspec's answers says of a file. The size is -1 where it is not said."""
    size = info.get("size")
    return FileFacts(-1 if size is None else int(size), tag_of(info))


def tag_of(info: Mapping[str, Any]) -> str:
    """Return what tells one content of a file from another."""
    lfs = info.get("lfs")
    values = [info.get(name) for name in ("ETag", "etag", "md5Hash", "blob_id")]
    values = [lfs.get("sha256") if isinstance(lfs, Mapping) else None, *values, info.get("Last-Modified")]
    return next((str(value).strip('"') for value in values if value), "")
