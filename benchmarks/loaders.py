"""Our loader beside those of other libraries, over the same JPEGs: `python -m benchmarks.loaders`.

For each: images a second of processor time and by the clock, memory, what it prepares, and what a kill in the middle of
the second epoch costs: seconds to the first batch after a resume, and samples of that epoch that were lost or repeated,
with as many workers and with one more. Loaders run in turn, each in a process of its own; medians of the rounds.
Libraries that are not installed are left out.
"""

import functools
import io
import itertools
import multiprocessing
import os
import pickle
import signal
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from PIL import Image

from benchmarks.loader_peers import OURS, PEERS, WHOLE, Peer, State, Use
from karat_scale.commands.measure.interleaved import processor_seconds
from karat_scale.commands.measure.loading import photo_like
from karat_scale.foundation.arguments import OneLineParser, new_file, whole
from karat_scale.foundation.console import write_json
from karat_scale.foundation.errors import UserError, run_script

EVERYTHING = {peer.name: peer for peer in (WHOLE, *OURS, *PEERS)}
MEMORY_EVERY = 0.05


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table in Markdown, and write the file of `--json`."""
    parser = OneLineParser(prog="python -m benchmarks.loaders", description=__doc__)
    parser.add_argument("images", nargs="?", metavar="PLACE", help="a folder or tar of JPEGs (default: made here)")
    parser.add_argument("--count", type=whole(1), default=512, help="images (default: %(default)s)")
    parser.add_argument("--batch", type=whole(1), default=32)
    parser.add_argument("--workers", type=whole(0), default=1)
    parser.add_argument("--augment", choices=("crop", "paper"), default="crop")
    parser.add_argument("--rounds", type=whole(1), default=5)
    parser.add_argument("--epochs", type=whole(1), default=2, help="of a round (default: %(default)s)")
    parser.add_argument("--only", action="append", metavar="NAME", help="a loader; may be repeated (default: all)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    options = parser.parse_args(arguments)
    if wrong := set(options.only or ()) - set(EVERYTHING):
        raise UserError(f"--only {wrong.pop()}: no such loader; choose from: {'; '.join(EVERYTHING)}")
    peers = [EVERYTHING[name] for name in options.only or EVERYTHING]
    left_out = {peer.name: peer.lacks for peer in peers if peer.lacks}
    left_out |= {peer.name: f"no {options.augment}" for peer in peers if options.augment not in peer.augments}
    with tempfile.TemporaryDirectory(prefix="karat-loaders-") as scratch:
        folder = Path(scratch) / "images"
        used = write_images(folder, options.images, options.count, options.batch)
        rows: dict[str, dict[str, Any]] = {}
        uses: dict[str, Use] = {}
        for number, peer in enumerate(peers):
            if peer.name not in left_out:
                use = Use(Path(scratch) / f"{number}", options.workers, options.batch, options.augment, 2)
                try:
                    rows[peer.name] = prepared(peer, folder, use) | after_a_kill(peer, use)
                    uses[peer.name] = replace(use, epochs=options.epochs)
                except LoaderFailedError as error:
                    left_out[peer.name] = str(error)
        add_speeds(rows, uses, options.rounds, used)
    result = {"images": used, "augment": options.augment, "workers": options.workers, "rounds": options.rounds}
    result |= {"rows": [{"loader": name, **row} for name, row in rows.items()], "not_measured": left_out}
    print_markdown(result)
    write_json(options.json, result)
    return 0


class LoaderFailedError(Exception):
    """A loader cannot do what is measured."""


def write_images(folder: Path, place: str | None, wanted: int, batch: int) -> int:
    """Write whole colour JPEGs as a folder, each its own class; return how many, a multiple of `batch`.

    Raises UserError where there are fewer than two batches, of which the second can be resumed.
    """
    found = list(itertools.islice(filter(is_colour, jpegs(place)), wanted))
    used = len(found) // batch * batch
    if used < 2 * batch:
        few = f"{len(found)} whole colour JPEGs, fewer than two batches of {batch}"
        raise UserError(f"{place or '--count'}: {few}; use more images or a smaller --batch")
    for number, data in enumerate(found[:used]):
        path = folder / f"train/{number:06d}/image.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    return used


def jpegs(place: str | None) -> Iterator[bytes]:
    """Yield the JPEGs of a folder or a tar, or made here. Raises UserError."""
    if place is None:
        yield from map(photo_like, itertools.count())
    elif Path(place).is_dir():
        for path in sorted(Path(place).rglob("*")):
            if path.suffix.lower() in (".jpg", ".jpeg"):
                yield path.read_bytes()
    else:
        try:
            with tarfile.open(place) as tar:
                for member in tar:
                    if member.name.lower().endswith((".jpg", ".jpeg")) and (file := tar.extractfile(member)):
                        yield file.read()
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"{place} cannot be read: {error}; name a folder or a tar of JPEGs") from error


def is_colour(data: bytes) -> bool:
    """Whether every library can read it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image.mode == "RGB" and image.format == "JPEG"
    except OSError:
        return False


def prepared(peer: Peer, folder: Path, use: Use) -> dict[str, Any]:
    """Let a loader prepare the images; return what that took."""
    begun = time.perf_counter()
    in_own_process(prepare, peer.name, folder, use)
    seconds = time.perf_counter() - begun
    own = [] if use.place.is_symlink() else [use.place, *use.place.rglob("*")]
    size = sum(path.stat().st_size for path in own if path.is_file())
    return {"prepare_seconds": round(seconds, 1) if own else 0, "prepare_mb": round(size / 1e6, 1)}


def prepare(name: str, folder: Path, use: Use) -> None:
    """Prepare, in a process of its own."""
    EVERYTHING[name].prepare(folder, use.place)


@functools.cache
def fresh_processes() -> Any:
    """Return the context of processes that have imported what is slow to import and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.loader_peers"])  # not this module: each process runs it as its main
    return context


def in_own_process(work: Any, *arguments: Any, killed: bool = False) -> Any:
    """Return what `work(*arguments, answer)` leaves in its file, or its result. Raises LoaderFailedError."""
    with tempfile.TemporaryDirectory() as scratch:
        answer = Path(scratch) / "answer"
        process = fresh_processes().Process(target=_answer, args=(answer, work, arguments))
        process.start()
        process.join(600)
        if process.is_alive():
            os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
            raise LoaderFailedError("it hangs")
        if process.exitcode != (-signal.SIGKILL if killed else 0):
            said = answer.read_bytes() if answer.exists() else b""
            raise LoaderFailedError(str(pickle.loads(said)) if said else f"it ended with {process.exitcode}")
        return pickle.loads(answer.read_bytes())


def _answer(answer: Path, work: Any, arguments: tuple[Any, ...]) -> None:
    os.setsid()  # so that a kill reaches its workers too
    as_a_script()
    save = [answer] if work is until_killed else []
    try:
        found = work(*arguments, *save)
    except BaseException as error:
        answer.write_bytes(pickle.dumps(f"{type(error).__name__}: {error}".splitlines()[0]))
        raise SystemExit(1) from error  # without a traceback
    answer.write_bytes(pickle.dumps(found))


def as_a_script() -> None:
    """Let loaders start their workers as they do in a user's script; one thread each."""
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)


def after_a_kill(peer: Peer, use: Use) -> dict[str, Any]:
    """Kill a loader in the middle of its second epoch, and resume it; return what that took and lost."""
    if peer is WHOLE:
        return {}
    first, state = in_own_process(until_killed, peer.name, use, killed=True)
    found: dict[str, Any] = {}
    for more in (0, 1):
        try:
            again = in_own_process(resumed, peer.name, replace(use, workers=use.workers + more), state)
        except LoaderFailedError as error:
            found |= {f"resume_{more}": f"refused: {error}"}
            continue
        seen = Counter([*first[1], *again["ids"]])
        found |= {f"lost_{more}": len(set(first[0]) - set(seen)), f"repeated_{more}": seen.total() - len(seen)}
        if not more:
            found |= {"first_batch_seconds": again["seconds"], "memory_mb": again["memory_mb"]}
    return found


def until_killed(name: str, use: Use, answer: Path) -> None:
    """Load until half of the second epoch, note all ids and the state, and kill this process and its workers."""
    ids: tuple[list[int], list[int]] = ([], [])
    for epoch, batch, state in EVERYTHING[name].batches(use, {}):
        ids[epoch].extend(batch)
        if 2 * len(ids[1]) >= len(ids[0]) > 0:
            answer.write_bytes(pickle.dumps((ids, state())))
            os.killpg(0, signal.SIGKILL)


def resumed(name: str, use: Use, state: State) -> dict[str, Any]:
    """Load what is left; return its ids, the seconds to the first batch, and the peak of memory."""
    import_module(EVERYTHING[name].library)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, memory_of_all())
            if done.wait(MEMORY_EVERY):
                return

    watcher = threading.Thread(target=watch)
    begun = time.perf_counter()
    batches = EVERYTHING[name].batches(use, state)
    _, first, _ = next(batches)
    seconds = time.perf_counter() - begun
    watcher.start()
    ids = [*first, *itertools.chain.from_iterable(batch for _, batch, _ in batches)]
    done.set()
    watcher.join()
    return {"ids": ids, "seconds": round(seconds, 2), "memory_mb": round(peak / 1e6)}


def memory_of_all() -> int:
    """Return the bytes of this process and its workers, shared pages divided among those who share them."""
    total, this = 0, psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total


def processor_seconds_of_all() -> float:
    """Return the processor time of this process and its workers, also of those that have ended."""
    total = processor_seconds()  # finer than psutil's, which counts in hundredths of a second
    for process in psutil.Process().children(recursive=True):
        try:
            total += sum(process.cpu_times()[:4])  # its own, and that of its children that have ended
        except psutil.Error:  # it has just ended
            continue
    return total


def add_speeds(rows: dict[str, dict[str, Any]], uses: dict[str, Use], rounds: int, images: int) -> None:
    """Add to each row its images a second, loaders in turn, every other round in reverse order."""
    with ExitStack() as stack:
        pools = {}
        for name in rows:
            pools[name] = stack.enter_context(ProcessPoolExecutor(1, fresh_processes()))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for number in range(rounds + 1):
            for name in list(rows) if number % 2 else list(rows)[::-1]:
                taken = pools[name].submit(whole_pass, name, uses[name]).result()
                if number:  # the first warms up
                    times[name].append(taken)
    for name, row in rows.items():
        processor, clock = (median(kind) for kind in zip(*times[name], strict=True))
        row["per_processor_second"] = round(uses[name].epochs * images / processor, 1)
        row["per_clock_second"] = round(uses[name].epochs * images / clock, 1)
    decoding = [peer.name for peer in PEERS if not peer.without_decoding]
    for bases, figure in ((decoding, "over_best_peer"), ([WHOLE.name], "over_whole")):
        best = max((rows[name]["per_processor_second"] for name in bases if name in rows), default=None)
        for row in rows.values():
            row[figure] = best and round(row["per_processor_second"] / best, 2)


def whole_pass(name: str, use: Use) -> tuple[float, float]:
    """Return the processor's and the clock's seconds of a loader from its start to the end of its epochs."""
    as_a_script()
    processor, clock = processor_seconds_of_all(), time.perf_counter()
    for _ in EVERYTHING[name].batches(use, {}):
        pass
    return processor_seconds_of_all() - processor, time.perf_counter() - clock


def print_markdown(result: dict[str, Any]) -> None:
    """Print the table, and what could not be measured."""
    print(f"{result['images']} images, {result['augment']}, workers: {result['workers']}\n")
    names = ["loader", "images/s of a processor", "over best peer", "over whole decode", "images/s by the clock"]
    names += ["memory, MB", "first batch after resume, s", "lost, repeated", "with one more worker", "prepared"]
    print(f"|{'|'.join(names)}|\n|{'---|' * len(names)}")
    for row in result["rows"]:
        kill = [row.get(f"resume_{i}") or f"{row.get(f'lost_{i}', '')}, {row.get(f'repeated_{i}', '')}" for i in (0, 1)]
        keys = ("loader", "per_processor_second", "over_best_peer", "over_whole", "per_clock_second", "memory_mb")
        cells = [*(row.get(key, "") for key in (*keys, "first_batch_seconds")), *kill]
        print(f"|{'|'.join(map(str, cells))}|{row['prepare_seconds']} s, {row['prepare_mb']} MB|")
    for name, reason in result["not_measured"].items():
        print(f"\nnot measured: {name}: {reason}")


if __name__ == "__main__":
    run_script(main)
