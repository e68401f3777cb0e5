"""Opens the images of a recipe on all ranks. With `data.verify: hash`, the ranks of a node share the hashing."""

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.shards.checks import unused_classes
from karat_scale.data.shards.hashing import hash_files, is_hashed
from karat_scale.data.shards.shard_format import staged_copy
from karat_scale.engine.distributed import World
from karat_scale.engine.reporting.progress import Reporter
from karat_scale.recipe import DataConfig, Recipe

# How long a rank reads before it meets the others: far less than any of them waits for a hang.
_TURN_SECONDS = 2.0


def open_images(recipe: Recipe, world: World, reporter: Reporter, is_verified: bool) -> Backend:
    """Return the backend of a recipe. Collective.

    Args:
        is_verified: this run has compared the files with their hashes before, so their sizes are enough.

    Raises:
        DataError, RecipeError: as `open_backend`.
    """
    spec = ImageSpec.of(recipe)
    shares = is_hashed(spec.data)
    backend = open_backend(replace(spec, data=spec.data.changed(verify="size")) if shares else spec)
    if shares and not is_verified:
        try:
            hash_together(spec.data, world, lambda: reporter.beat("starting"))
        except BaseException:
            backend.close()
            raise
    if copy := staged_copy(recipe.data.path):
        reporter.info(f"the images are read from {copy}, this node's copy")
    if notice := unused_classes(backend.num_classes, recipe.model.num_classes):
        reporter.info(f"notice: {notice}")
    return backend


def hash_together(data: DataConfig, world: World, beat: Callable[[], object]) -> None:
    """Compare the files of a data set that can be opened with their hashes. Collective.

    The ranks of a node share its files, not all ranks: each node may have a copy of its own. Each rank calls `beat`
    while all get on.

    Raises:
        DataError: on all ranks, if a file differs on one.
    """
    nodes = world.gather(_this_node())
    here = [rank for rank, node in enumerate(nodes) if node == nodes[world.rank]]
    with world.together():
        pieces = hash_files(data, here.index(world.rank), len(here))
    left = True
    while world.any(left):
        beat()
        with world.together():
            left = left and _read_for_a_turn(pieces)


def _this_node() -> str:
    """Return what differs between nodes, also if they have the same name."""
    kernel = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname() + (kernel.read_text() if kernel.exists() else "")


def _read_for_a_turn(pieces: Iterator[None]) -> bool:
    """Read for some seconds; returns False at the end."""
    end = time.monotonic() + _TURN_SECONDS
    return any(time.monotonic() > end for _ in pieces)
