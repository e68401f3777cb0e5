"""A program that records how two ranks end when one is killed, stopped or missing, or when its data or disk fails.

`python -m tests.training.peers SCRATCH` writes outcomes.json: by case, the exit codes of the ranks and their output.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import karat_scale.engine.peers
import karat_scale.training.agreement
import karat_scale.training.run
import karat_scale.training.tasks.classification.task
from karat_scale.data.backends.images import SyntheticBackend
from karat_scale.data.batch import Batch
from karat_scale.data.plan import BatchSlice
from karat_scale.foundation.errors import DataError
from tests.conftest import SMALL, disk_of, wait_until
from tests.training.forked_ranks import ForkedRanks

DISKS = (4, 40, 100, 200, 400, 700)
STAGES = (1, 3)
WITHIN = 90.0


def _arguments(scratch: Path, run: Path, *overrides: str) -> list[str]:
    base = scratch / "peers.yaml"
    base.write_text("data: {backend: synthetic, synthetic_samples: 64}\nattention: {kind: karat}\n")
    fixed = ("schedule.warmup_epochs=0", "data.workers=0", f"run.dir={run}", "deepspeed.config=zero1")
    return ["train", str(base), *SMALL, *fixed, *overrides]


def _outcome(ranks: ForkedRanks, log: Path) -> dict[str, Any]:
    ended = ranks.wait(WITHIN)
    return {"ended": ended, "codes": [ranks.codes[pid] for pid in ranks.ranks], "said": log.read_text(errors="replace")}


def full_disk(scratch: Path, kilobytes: int, *overrides: str) -> dict[str, Any]:
    """Return the outcome of a run on a file system of that size."""
    log = scratch / f"disk-{kilobytes}.log"
    with disk_of(f"{kilobytes}k", scratch / f"disk-{kilobytes}") as disk:
        return _outcome(ForkedRanks(_arguments(scratch, disk / "run", *overrides), 2, log), log)


def disk_that_fills(scratch: Path) -> dict[str, Any]:
    """Return the outcome of a run whose disk fills during training; only rank 0 writes metrics."""
    log = scratch / "filled.log"
    with disk_of("2m", scratch / "filled") as disk:
        endless = ("train.epochs=100000", "checkpoint.every_minutes=null", "train.eval_every_epochs=100000")
        ranks = ForkedRanks(_arguments(scratch, disk / "run", *endless), 2, log)
        wait_until((disk / "run" / "metrics.jsonl").exists, WITHIN, log)
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        return _outcome(ranks, log)


def killed(scratch: Path, victim: int) -> dict[str, Any]:
    """Return the outcome of a run in which one rank is killed while both train."""
    run, log = scratch / f"killed-{victim}", scratch / f"killed-{victim}.log"
    ranks = ForkedRanks(_arguments(scratch, run, "train.epochs=100000", "checkpoint.every_steps=5"), 2, log)
    wait_until((run / "checkpoints" / "latest").exists, WITHIN, log)
    ranks.kill([ranks.ranks[victim]])
    return _outcome(ranks, log)


def failed_evaluation(scratch: Path, stage: int) -> dict[str, Any]:
    """Return the outcome of a run in which rank 1 alone cannot read a batch of an evaluation of averaged weights."""
    log = scratch / f"evaluation-{stage}.log"
    arguments = _arguments(scratch, scratch / f"evaluation-{stage}", f"deepspeed.config=zero{stage}")

    def break_backend(rank: int) -> None:
        if rank == 1:
            SyntheticBackend.eval_batches = _break_at_the_second  # type: ignore[method-assign]

    return _outcome(ForkedRanks(arguments, 2, log, break_backend), log)


_eval_batches = SyntheticBackend.eval_batches


def _break_at_the_second(self: SyntheticBackend, slices: Iterable[BatchSlice]) -> Iterator[Batch]:
    yield next(_eval_batches(self, slices))
    raise DataError("that shard is gone")


def absent(scratch: Path, rank: int) -> dict[str, Any]:
    """Return the outcome of a run of two ranks, one of which never starts."""
    log = scratch / f"absent-{rank}.log"
    arguments = _arguments(scratch, scratch / f"absent-{rank}", "run.peer_timeout_minutes=0.2")

    def notice_soon(rank: int) -> None:
        karat_scale.engine.peers._FIRST_NOTICE_SECONDS = 1.0  # long before it gives up

    ranks = ForkedRanks(arguments, 2, log, notice_soon, absent=rank)
    return _outcome(ranks, log)


def stopped(scratch: Path) -> dict[str, Any]:
    """Return the outcome of a rank that gets a stop signal while it waits for another."""
    log = scratch / "stopped.log"
    ranks = ForkedRanks(_arguments(scratch, scratch / "stopped"), 2, log, absent=1)
    wait_until(lambda: log.exists() and "has waited" in log.read_text(), WITHIN, log)
    os.kill(ranks.ranks[0], signal.SIGUSR2)
    return _outcome(ranks, log)


def stopped_alone(scratch: Path, rank: int) -> dict[str, Any]:
    """Return the outcome of a run in which one of two ranks gets a stop signal before the other has come."""
    log, go = scratch / f"stopped-alone-{rank}.log", scratch / f"go-{rank}"
    arguments = _arguments(scratch, scratch / f"stopped-alone-{rank}")

    def prepare(other: int) -> None:
        if other == rank:
            karat_scale.training.agreement._MEETING_SECONDS = WITHIN  # a loaded machine is slow
        else:
            wait_until(go.exists, 2 * WITHIN, log)

    ranks = ForkedRanks(arguments, 2, log, prepare)
    wait_until(lambda: _catches(ranks.ranks[rank], signal.SIGTERM), WITHIN, log)
    os.kill(ranks.ranks[rank], signal.SIGTERM)
    time.sleep(0.5)
    go.touch()
    return _outcome(ranks, log)


def _catches(pid: int, number: int) -> bool:
    (caught,) = re.findall(r"SigCgt:\t(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (number - 1) & 1)


def main(arguments: Sequence[str]) -> None:
    """Run all cases, one after the other."""
    scratch = Path(arguments[0])
    outcomes = {f"killed {victim}": killed(scratch, victim) for victim in (0, 1)}
    outcomes |= {f"absent {rank}": absent(scratch, rank) for rank in (0, 1)}
    outcomes["stopped"] = stopped(scratch)
    outcomes |= {f"stopped alone {rank}": stopped_alone(scratch, rank) for rank in (0, 1)}
    outcomes |= {f"evaluation {stage}": failed_evaluation(scratch, stage) for stage in STAGES}
    if os.geteuid() == 0:
        outcomes |= {f"disk {size}": full_disk(scratch, size) for size in DISKS}
        outcomes["disk that fills"] = disk_that_fills(scratch)
    (scratch / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main(sys.argv[1:])
