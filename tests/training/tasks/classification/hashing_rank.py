"""One rank of a check by `data.verify: hash`: it prints which files it hashed, how often it beat, and its error.

Its arguments are the directory of the shards, and `each` if every rank is a node of its own, otherwise `one`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from karat_scale.data.shards import shard_format as hashing
from karat_scale.engine import distributed
from karat_scale.foundation.errors import DataError
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.tasks.classification import task


def main(path: str, nodes: str) -> None:
    files: list[str] = []
    beats: list[int] = []
    real = hashing.hash_file

    def noted(path: Path, *arguments: Any) -> Iterator[None]:
        for _ in real(path, *arguments):
            files.append(path.name)
            yield

    hashing.hash_file = noted
    task._TURN_SECONDS = 0.0  # the ranks meet after each piece
    world = distributed.start("cpu")
    if nodes == "each":
        task._this_node = lambda: str(world.rank)
    error = ""
    try:
        data = load_recipe("fashion_mnist_demo", [f"data.path={path}", "data.backend=webdataset"]).data
        task.hash_together(data, world, lambda: beats.append(1))
    except DataError as met:
        error = str(met)
    print(json.dumps({"files": sorted(set(files)), "beats": len(beats), "error": error}))
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
