"""A copy of the data on a disk of this node, where the launch wrapper has made one."""

import os
from collections.abc import Mapping
from pathlib import Path

from karat_scale.data.formats.shard_format import DATASET_FILE


def staged_copy(path: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Where this node's copy of the shards at `data.path` is; None where it has none, or none that is whole.

    `environ` has what was copied in KARAT_SHARDS and where to in KARAT_STAGED. The recipe knows nothing of it: another
    node, or tomorrow's evaluation, reads the shards at `data.path`.
    """
    copy = environ.get("KARAT_STAGED")
    if not copy or environ.get("KARAT_SHARDS") != path:
        return None
    return copy if (Path(copy) / DATASET_FILE).is_file() else None  # stage.py writes it last
