"""Join splits that were made separately into one data set, and divide a source into train and val.

    python data_prep/join_splits.py --src DIR --out DIR

The script joins splits such as those of a job array's tasks. It moves the shards of --src into --out, on the same file
system, and adds its splits to dataset.json there. A run that was stopped resumes. Several runs may join into one
--out: one works and the others wait.

A source with one split is divided by class, and by a seed.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from karat_scale.data.order import epoch_order
from karat_scale.data.prepare.job import make_parser, rank_in_class
from karat_scale.data.prepare.sources import Source, SourceOptions, open_splits
from karat_scale.data.shards.shard_format import (
    DATASET_FILE,
    TIMM_FILE,
    DatasetRecord,
    read_dataset_record,
    write_dataset_record,
)
from karat_scale.foundation.errors import DataError, run_script
from karat_scale.foundation.files import flush_to_disk

TURN = ".joining"
"""In --out: a link to the --src that is being joined."""
_POLL_SECONDS = 1.0


@contextmanager
def _turn(src: Path, out: Path) -> Iterator[None]:
    """Let no other run join into `out` inside the block, since each writes dataset.json there.

    A link and not a lock: some shared file systems have no locks, or only between processes of one node. A run that was
    killed leaves its link behind, so the link names its source, and the next run of that source takes it over.
    """
    link, mine, waited = out / TURN, src.resolve(), False
    while True:
        try:
            link.symlink_to(mine)
            break
        except FileExistsError:
            other = _target(link)
        if other == mine:
            break
        if other is not None and not waited:
            print(f"waiting until {other} is joined; if no run does that any more, remove {link}", flush=True)
            waited = True
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        link.unlink(missing_ok=True)


def _target(link: Path) -> Path | None:
    """Return what a link names; None if it has just been removed."""
    try:
        return link.readlink()
    except FileNotFoundError:
        return None


def join(src: Path, out: Path) -> list[str]:
    """Move the splits of `src` into `out`; returns their names. Raises DataError if the two do not fit together."""
    record = read_dataset_record(src)
    out.mkdir(parents=True, exist_ok=True)
    with _turn(src, out):
        _join(src, record, out)
    return list(record.splits)


def _join(src: Path, record: DatasetRecord, out: Path) -> None:
    joined = read_dataset_record(out) if (out / DATASET_FILE).exists() else record.model_copy(update={"splits": {}})
    if record.root or joined.root:
        raise DataError(f"{src} and {out}: one lists tars that are elsewhere; run `karat index` on all tars at once")
    if joined.classes != record.classes:
        raise DataError(f"{src} has different classes than {out}; make both splits from the same images")
    if both := sorted(joined.splits.keys() & record.splits.keys()):
        raise DataError(f"{out} has a split {both[0]} already; use another --out")
    for split in record.splits.values():
        for file in (file for shard in split.shards for file in (shard, shard.index)):
            if (src / file.name).exists():  # else an earlier run moved it
                (src / file.name).rename(out / file.name)
    flush_to_disk(out)
    joined.splits.update(record.splits)
    write_dataset_record(out, joined)
    (src / TIMM_FILE).unlink(missing_ok=True)
    (src / DATASET_FILE).unlink()
    src.rmdir()


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("Join splits that were made separately into one data set.", writes=False)
    parser.add_argument("--src", type=Path, required=True, metavar="DIR", help="the directory of the splits to add")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the data set to add them to")
    options = parser.parse_args(arguments)
    print(f"{options.out} has {', '.join(join(options.src, options.out))} now")


if __name__ == "__main__":
    run_script(main)


class PartOfSource(Source):
    """The samples `indices` of another source, in this order. See Source."""

    def __init__(self, whole: Source, indices: npt.NDArray[np.int64]) -> None:
        super().__init__(whole.classes, whole.labels[indices], whole.sizes[indices], whole.facts)
        self._whole, self._indices, self.exact_sizes = whole, indices, whole.exact_sizes
        self.blocks, self.window = None if whole.blocks is None else whole.blocks[indices], whole.window

    def name(self, index: int) -> str:
        return self._whole.name(int(self._indices[index]))

    def key(self, index: int) -> str:
        return self._whole.key(int(self._indices[index]))

    def read(self, index: int) -> bytes:
        return self._whole.read(int(self._indices[index]))

    def fingerprint(self) -> str:
        return self._whole.fingerprint()


def open_chosen(options: argparse.Namespace, known_classes: list[str] | None) -> dict[str, Source]:
    """Return the splits that the command line asks for. Raises DataError."""
    sources = open_splits(options.src, options.split, known_classes, SourceOptions.of(options))
    if options.val_fraction is None and options.val_count is None:
        return sources
    option = "--val-fraction" if options.val_count is None else "--val-count"
    if "val" in sources:
        raise DataError(f"{options.src} already has a validation split; remove {option}")
    if len(sources) > 1:
        raise DataError(f"{options.src} has the splits {', '.join(sources)}; give the folder of one as --src")
    (whole,) = sources.values()
    held = held_out(whole.labels, options.val_fraction, options.val_count, options.seed)
    train, val = PartOfSource(whole, np.flatnonzero(~held)), PartOfSource(whole, np.flatnonzero(held))
    train.skipped = whole.skipped
    return {"train": train, "val": val}


def held_out(
    labels: npt.NDArray[np.int32], fraction: float | None, count: int | None, seed: int
) -> npt.NDArray[np.bool_]:
    """Return which samples are for validation: so many, each class in proportion, drawn by the seed.

    Each class keeps an image for training. Raises DataError if no image or too many are asked for.
    """
    total = round((fraction or 0) * len(labels)) if count is None else count
    asked = f"--val-fraction {fraction}" if count is None else f"--val-count {count}"
    order = epoch_order(seed, 0, len(labels))
    ranks, sizes = rank_in_class(labels[order]), np.bincount(labels)[labels[order]]
    spare = ranks < sizes - 1
    if not 1 <= total <= spare.sum():
        raise DataError(
            f"{asked} is {total} of {len(labels)} images; choose 1 to {spare.sum()}, so that each class keeps one to "
            "train on"
        )
    # Webster's rule of proportion. Among equals, the order that the seed draws decides.
    turns = np.where(spare, (ranks + 0.5) / sizes, np.inf)
    held = np.zeros(len(labels), dtype=bool)
    held[order[np.argsort(turns, kind="stable")[:total]]] = True
    return held
