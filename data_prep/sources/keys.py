"""Names of samples in shards, made from any paths."""

import hashlib
import os
import re

MAX_KEY_BYTES = 90  # a tar name holds 100
_UNFIT = re.compile(r"[\x00-\x20\x7f\s]")


def unique_keys(paths: list[str]) -> list[str]:
    """Return a key for each path. Keys are unique and short enough for a tar.

    The key is the path without its suffix. Its last part has no dot, and it has no blank and no part that points
    outside of a directory; other characters become `_`, or the whole key becomes a hash.
    """
    keys: list[str] = []
    taken: set[str] = set()
    for path in paths:
        key = _key(path)
        if not key or key in taken or len(key.encode()) > MAX_KEY_BYTES:
            key = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
        for number in range(2, len(paths) + 2):
            if key not in taken:
                break
            key = hashlib.sha256(os.fsencode(path) + b"\0%d" % number).hexdigest()[:32]
        taken.add(key)
        keys.append(key)
    return keys


def _key(path: str) -> str:
    text = os.fsencode(path).decode(errors="replace").replace("\\", "/")
    parts = [_UNFIT.sub("_", part) for part in text.split("/") if part not in ("", ".", "..")]
    if not parts:
        return ""
    stem = parts[-1].rpartition(".")[0] or parts[-1]
    return "/".join([*parts[:-1], stem.replace(".", "_")])
