"""Shards at a URL next to the same shards on a disk: `python -m benchmarks.remote --path DIR`.

A server in a process of its own answers each request after `--latency`, and counts requests and bytes. Both loaders
make the same batches in turn. The cache is empty at each start, so each pass is a first epoch, which fetches
everything. The time of a pass begins when the data set is open.
"""

import http.server
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from karat_scale.commands.measure.interleaved import Rounds, interleaved, processor_seconds
from karat_scale.commands.measure.loading import AUGMENTS, BATCH, SIZE
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.data.plan import BLOCK_SAMPLES, WINDOW_BLOCKS, TrainPlan
from karat_scale.data.shards.remote import VARIABLE
from karat_scale.data.shards.shard_format import read_dataset_record, write_dataset_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.arguments import OneLineParser, count, new_file, positive
from karat_scale.foundation.console import print_table, write_json
from karat_scale.foundation.errors import run_script
from karat_scale.recipe import DataConfig

DISK, URL = "disk", "URL"


@dataclass(frozen=True)
class Setting:
    """What both loaders do."""

    directory: Path
    order: str
    block: int
    window: int
    workers: int
    samples: int

    def config(self, path: str) -> DataConfig:
        """Return the recipe's section for data at a path or a URL."""
        return DataConfig.model_validate(
            {
                "path": path,
                "order": self.order,
                "block_samples": self.block,
                "window_blocks": self.window,
                "workers": self.workers,
                "on_bad_sample": "skip",
                "cache_gb": 1000,
            }
        )

    def run(self, path: str) -> tuple[float, float, float]:
        """Make all batches of an epoch, at most `samples` images.

        Returns:
            The seconds, those of processors, and those to the first batch.
        """
        backend = open_backend(ImageSpec(self.config(path), AUGMENTS["crop"], SIZE, 1 << 30, 0))
        plan = TrainPlan(0, backend.num_train, BATCH, BATCH, 0, 1, self.order, self.block, self.window)
        steps = min(plan.steps_per_epoch, self.samples // BATCH)
        begun, used = time.perf_counter(), processor_seconds()
        batches = backend.train_batches(plan.slices(0, steps))
        next(batches)
        first = time.perf_counter() - begun
        for _ in batches:
            pass
        taken = time.perf_counter() - begun
        backend.close()
        return taken, processor_seconds() - used, first


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write the file of `--json`."""
    parser = OneLineParser(prog="python -m benchmarks.remote", description=__doc__)
    parser.add_argument("--path", required=True, type=Path, metavar="DIR", help="shards")
    parser.add_argument("--copies", type=count, default=1, help="how often each shard occurs (default: %(default)s)")
    parser.add_argument("--latency", type=positive, default=0.02, help="seconds (default: %(default)s)")
    parser.add_argument("--order", choices=("block", "full"), default="block", help="(default: %(default)s)")
    parser.add_argument("--block", type=count, default=BLOCK_SAMPLES, help="samples in a block (default: %(default)s)")
    parser.add_argument("--window", type=count, default=WINDOW_BLOCKS, help="blocks in a window (default: %(default)s)")
    parser.add_argument("--workers", type=count, default=2, help="(default: %(default)s)")
    parser.add_argument("--samples", type=count, default=1 << 40, metavar="N", help="at most N images in a pass")
    parser.add_argument("--rounds", type=count, default=5, help="(default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="karat-remote-") as scratch:
        copies = repeat_shards(options.path.expanduser().resolve(), Path(scratch) / "shards", options.copies)
        setting = Setting(copies, options.order, options.block, options.window, options.workers, options.samples)
        result = measure(setting, Path(scratch), options.latency, options.rounds)
    rows = [[name, f"{result['images_per_second'][name]:,.0f}"] for name in (DISK, URL)]
    title = f"{result['images']:,} images a pass, order {options.order}, {options.workers} workers, "
    print_table(title + f"{1000 * options.latency:g} ms for each request", ["from", "images/s"], rows)
    for what, ratio in (
        ("by the clock", "ratio"),
        ("by the clock after the first batch", "ratio_after_first_batch"),
        ("for a second of a processor", "ratio_of_processor_time"),
    ):
        print(f"URL over disk, images {what}: {result[ratio]:.3f} (median of {options.rounds} rounds)")
    first = {name: statistics.median(taken) for name, taken in result["seconds_to_first_batch"].items()}
    print(f"seconds to the first batch: {first[DISK]:.2f} from the disk, {first[URL]:.2f} from the URL")
    for name in ("requests", "bytes"):
        made, ideal = result[name], result[f"ideal_{name}"]
        print(f"{name} of a pass: {made:,}, over the ideal {ideal:,}: {made / ideal:.3f}")
    write_json(options.json, {**vars(options), **result, "path": str(options.path)})


def repeat_shards(source: Path, target: Path, copies: int) -> Path:
    """Return a directory in which each training shard of a data set occurs `copies` times, as links."""
    target.mkdir()
    record = read_dataset_record(source)
    tars = Path(record.tars_of(source))
    for split in record.splits.values():
        shards = []
        for copy in range(copies):
            for shard in split.shards:
                name, index = f"copy{copy}-{shard.name}", f"copy{copy}-{shard.index.name}"
                (target / name).symlink_to(tars / shard.name)
                (target / index).symlink_to(source / shard.index.name)
                renamed = shard.index.model_copy(update={"name": index})
                shards.append(shard.model_copy(update={"name": name, "index": renamed}))
        split.shards, split.samples, split.bytes = shards, copies * split.samples, copies * split.bytes
    record.root = ""
    write_dataset_record(target, record)
    return target


def measure(setting: Setting, scratch: Path, latency: float, rounds: int) -> dict[str, Any]:
    """Return the figures of both loaders."""
    processors: dict[str, list[float]] = {DISK: [], URL: []}
    firsts: dict[str, list[float]] = {DISK: [], URL: []}
    os.environ[VARIABLE] = str(scratch / "cache")

    def run(name: str, path: str) -> float:
        taken, used, first = setting.run(path)
        processors[name].append(used)
        firsts[name].append(first)
        shutil.rmtree(os.environ[VARIABLE], ignore_errors=True)
        return taken

    with served(setting.directory, latency) as (url, counts):
        seconds = interleaved({DISK: lambda: run(DISK, str(setting.directory)), URL: lambda: run(URL, url)}, rounds)
    passes = rounds + 1  # one to warm up
    processors, firsts = (Rounds({name: taken[1:] for name, taken in of.items()}) for of in (processors, firsts))
    after = Rounds({name: [a - b for a, b in zip(seconds[name], firsts[name], strict=True)] for name in seconds})
    images, requests, ideal_bytes = ideal(setting)
    return {
        "images": images,
        "images_per_second": {name: images / statistics.median(taken) for name, taken in seconds.items()},
        "seconds": seconds,
        "processor_seconds": processors,
        "seconds_to_first_batch": firsts,
        "ratio_after_first_batch": 1 / after.ratio(URL, DISK),
        "ratio": 1 / seconds.ratio(URL, DISK),
        "ratio_of_processor_time": 1 / processors.ratio(URL, DISK),
        "requests": round(int(counts[0]) / passes),
        "ideal_requests": requests,
        "bytes": round(int(counts[1]) / passes),
        "ideal_bytes": ideal_bytes,
    }


def ideal(setting: Setting) -> tuple[int, int, int]:
    """Return the images of a pass, the requests for them if each extent is fetched once, and the images' bytes."""
    split = ShardSplit(setting.directory, "train", 1 << 30)
    plan = TrainPlan(0, len(split), BATCH, BATCH, 0, 1, setting.order, setting.block, setting.window)
    images = min(plan.steps_per_epoch, setting.samples // BATCH) * BATCH
    ids = plan.epoch_order(0)[:images]
    places = split.places
    together = setting.block if setting.order == "block" else 1
    extents = {(places.shard_of(int(number)), int(number) // together) for number in ids}
    split.close()
    return images, len(extents), int(places.sizes[ids].sum())


@contextmanager
def served(directory: Path, latency: float) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """Serve a directory by a process; returns its URL and the counts of requests for tars and of their bytes."""
    shared = multiprocessing.RawArray("q", 2)
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_serve, args=(directory, latency, shared, theirs), daemon=True
    )
    process.start()
    port = mine.recv()
    try:
        yield f"http://127.0.0.1:{port}", np.frombuffer(shared, dtype=np.int64)
    finally:
        process.kill()
        process.join()


def _serve(directory: Path, latency: float, counts: Any, pipe: Any) -> None:
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self) -> None:
            time.sleep(latency)
            self._head(200, (directory / self.path[1:]).stat().st_size)

        def do_GET(self) -> None:
            time.sleep(latency)
            path = directory / self.path[1:]
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, stop = int(first), int(last) + 1
            if path.suffix == ".tar":
                with lock:
                    counts[0] += 1
                    counts[1] += stop - start
            self._head(206, stop - start, f"bytes {start}-{stop - 1}/{path.stat().st_size}")
            self.wfile.flush()
            with path.open("rb") as file:
                while start < stop:
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, stop - start)

        def _head(self, status: int, length: int, content_range: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pipe.send(server.server_address[1])
    server.serve_forever()


if __name__ == "__main__":
    run_script(main)
