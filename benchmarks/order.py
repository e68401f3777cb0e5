"""How well each order policy shuffles, and what it asks of a disk: `python -m benchmarks.order`.

Disk neighbours that meet in a batch, and the few blocks a batch draws from, are what `block` gives up; long reads in
place of one seek an image are what it gains.
"""

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from karat_scale.data.plan import BLOCK_SAMPLES, WINDOW_BLOCKS, epoch_order
from karat_scale.data.shards.shard_files import NO_BLOCKS, Blocks
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.arguments import OneLineParser, count, new_file
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import run_script

POLICIES = ("full", "block")


@dataclass(frozen=True)
class OrderCase:
    """An epoch: its samples, the global batch, and the blocks and windows of the block policy."""

    samples: int
    batch: int
    block_samples: int = BLOCK_SAMPLES
    window_blocks: int = WINDOW_BLOCKS


def main(arguments: list[str] | None = None) -> None:
    """Measure both policies, print a table, and write the file of `--json`."""
    parser = OneLineParser(prog="python -m benchmarks.order", description=__doc__)
    parser.add_argument("--samples", type=count, default=1_281_167, help="of an epoch (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=1024, help="global batch (default: %(default)s)")
    parser.add_argument("--block", type=count, default=256, help="samples per block (default: %(default)s)")
    parser.add_argument("--window", type=count, default=32, help="blocks per window (default: %(default)s)")
    parser.add_argument("--path", metavar="DIR", help="shards to read with a cold cache")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    case = OrderCase(options.samples, options.batch, options.block, options.window)
    rows = []
    for policy in POLICIES:
        row: dict[str, Any] = {"order": policy, **shuffle_quality(case, policy)}
        if options.path:
            row["cold_images_per_second"] = round(cold_read_rate(case, policy, options.path), 1)
        rows.append(row)
    title = f"{case.samples:,} samples, global batch {case.batch}, "
    title += f"blocks of {case.block_samples} samples, windows of {case.window_blocks} blocks"
    header = [column.replace("_", " ") for column in rows[0]]
    print_table(title, header, [[str(value) for value in row.values()] for row in rows])
    write_json(options.json, {**asdict(case), "rows": rows})


def order_of(case: OrderCase, policy: str, samples: int) -> npt.NDArray[np.int64]:
    """Return the order of the first epoch under a policy."""
    return epoch_order(0, 0, samples, policy, case.block_samples, case.window_blocks)


def shuffle_quality(case: OrderCase, policy: str) -> dict[str, float]:
    """Return what a policy does to an epoch.

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
    """Return images read per second in a policy's order by one reader, for at most `seconds`, from a cold cache."""
    path = Path(directory).expanduser()
    for shard in path.glob("train-*.tar"):
        with shard.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet stays in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    blocks = Blocks(case.block_samples, case.window_blocks) if policy == "block" else NO_BLOCKS
    split = ShardSplit(path, "train", 2**31 - 1, readahead=blocks)
    begun, count = time.perf_counter(), 0
    for sample_id in order_of(case, policy, len(split)).tolist():
        split.read(sample_id)
        count += 1
        if time.perf_counter() - begun > seconds:
            break
    split.close()
    return count / (time.perf_counter() - begun)


if __name__ == "__main__":
    run_script(main)
