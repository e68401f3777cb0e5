"""A copy of the data on a local disk of this node, if the launch wrapper has made one."""

import os
from collections.abc import Mapping
from pathlib import Path

from karat_scale.data.formats.shard_format import DATASET_FILE


def staged_copy(path: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return this node's copy of the shards at `data.path`; None if there is none, or only an incomplete one.

    `environ` has the source of the copy in KARAT_SHARDS and its target in KARAT_STAGED. The recipe does not, since
    another node or a later evaluation reads the shards at `data.path`.
    """
    copy = environ.get("KARAT_STAGED")
    if not copy or environ.get("KARAT_SHARDS") != path:
        return None
    return copy if (Path(copy) / DATASET_FILE).is_file() else None  # stage.py writes it last
