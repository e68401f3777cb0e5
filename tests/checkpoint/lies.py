"""Functions that write wrong content into a checkpoint's files, and hashes that match it."""

import json
from pathlib import Path
from typing import Any

import torch

from karat_scale.checkpoint.store import MANIFEST, STATE
from karat_scale.checkpoint.tensor_storage import load_tensors
from karat_scale.foundation.files import file_sha256

LOST = object()


def rehash(checkpoint: Path) -> None:
    """Write a manifest that agrees with the files, as a save does."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(checkpoint.iterdir())
        if path.name != MANIFEST
    }
    (checkpoint / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=2) + "\n")


def put(content: Any, place: str, value: Any) -> None:
    """Set, change or remove the value at a dotted place of nested dictionaries and lists."""
    *path, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    for key in path:
        content = content[key]
    if value is LOST:
        del content[last]
    else:
        content[last] = value(content[last]) if callable(value) else value


def tell(checkpoint: Path, file: str, place: str, value: Any) -> None:
    """Put wrong content into a file of a checkpoint, and update its hash."""
    path = checkpoint / file
    if file == STATE:
        content = json.loads(path.read_text())
        put(content, place, value)
        path.write_text(json.dumps(content))
    else:
        content = load_tensors(path)
        put(content, place, value)
        torch.save(content, path)
    rehash(checkpoint)
