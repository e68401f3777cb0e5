"""`karat bench order`: how well each order policy shuffles, and what it asks of a disk.

Disk neighbours that meet in a batch, and the few blocks a batch draws from, are what `block` gives up; long reads in
place of one seek an image are what it gains.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karat_scale.data.formats.shards import ShardSplit
from karat_scale.data.order import BLOCK_SAMPLES, WINDOW_BLOCKS, epoch_order
from karat_scale.files import write_atomically

POLICIES = ("full", "block")


@dataclass(frozen=True)
class OrderCase:
    """An epoch: its samples, the global batch, and the blocks and windows of the block policy."""

    samples: int
    batch: int
    block_samples: int = BLOCK_SAMPLES
    window_blocks: int = WINDOW_BLOCKS


def bench_order(case: OrderCase, shards: str | None, json_file: str | None) -> int:
    """Measure both policies, print a table, write `json_file`; returns 0. `shards`: a directory to read from."""
    rows = []
    for policy in POLICIES:
        row: dict[str, Any] = {"order": policy, **shuffle_quality(case, policy)}
        if shards:
            row["cold_images_per_second"] = round(cold_read_rate(case, policy, shards), 1)
        rows.append(row)
    result = {**asdict(case), "rows": rows}
    _print(result)
    if json_file:
        write_atomically(Path(json_file), json.dumps(result, indent=2) + "\n")
    return 0


def order_of(case: OrderCase, policy: str, samples: int) -> npt.NDArray[np.int64]:
    """The first epoch's order under a policy."""
    return epoch_order(0, 0, samples, policy, case.block_samples, case.window_blocks)


def shuffle_quality(case: OrderCase, policy: str) -> dict[str, float]:
    """What a policy does to an epoch.

    blocks_per_batch: distinct blocks that a global batch draws from, mean. neighbours_together: share of disk
    neighbours that are in the same global batch. mean_shift: how far samples are from their place on disk, over that
    of a perfect shuffle (a third of the epoch). reads_per_image: separate reads, where a block in use is read once.
    """
    order = order_of(case, policy, case.samples)
    position = np.argsort(order)
    batches = len(order) // case.batch
    by_batch = (order[: batches * case.batch] // case.block_samples).reshape(batches, case.batch)
    blocks = np.mean([len(np.unique(row)) for row in by_batch])
    together = np.mean(position[1:] // case.batch == position[:-1] // case.batch)
    shift = np.mean(np.abs(position - np.arange(len(order)))) / (len(order) / 3)
    reads = 1.0 if policy == "full" else -(-len(order) // case.block_samples) / len(order)
    return {
        "blocks_per_batch": round(float(blocks), 1),
        "neighbours_together": round(float(together), 6),
        "mean_shift": round(float(shift), 4),
        "reads_per_image": round(reads, 5),
    }


def cold_read_rate(case: OrderCase, policy: str, directory: str, seconds: float = 10.0) -> float:
    """Images read per second in a policy's order, by one reader, for so long at most, from shards not in memory."""
    path = Path(directory).expanduser()
    for shard in path.glob("train-*.tar"):
        with shard.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet stays in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    split = ShardSplit(path, "train", 2**31 - 1, readahead=case.block_samples if policy == "block" else 0)
    begun, count = time.perf_counter(), 0
    for sample_id in order_of(case, policy, len(split)).tolist():
        split.read(sample_id)
        count += 1
        if time.perf_counter() - begun > seconds:
            break
    split.close()
    return count / (time.perf_counter() - begun)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{result['samples']:,} samples, global batch {result['batch']}, "
    title += f"blocks of {result['block_samples']} samples, windows of {result['window_blocks']} blocks"
    table = Table(title=title)
    for column in result["rows"][0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "order" else "right")
    for row in result["rows"]:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
