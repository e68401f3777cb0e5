"""torch's record of the last collectives of each rank: which one a stalled rank waits in, and which the others have.

For NCCL, `python -m torch.distributed.flight_recorder.fr_trace RUN/diagnostics -p flight-` compares the files of all
ranks; torch 2.13 cannot read gloo's.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from karat_scale.files import replace_file

_COLLECTIVES = "2000"


def record_collectives() -> None:
    """Let torch record the collectives of process groups that are made from here on, unless the user decided."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _COLLECTIVES)


def write_flight_record(directory: Path, rank: int) -> None:
    """Write this rank's record to `directory`/flight-RANK, and a line on its last collective to standard error.

    It never fails: it is called when something else has.
    """
    with suppress(OSError, RuntimeError, ValueError):
        entries, record = _newest_record(torch._C._distributed_c10d)
        print(f"rank {rank}: {_last_collective(entries)}", file=sys.stderr, flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / f"flight-{rank}", record)


def _newest_record(torch_c: Any) -> tuple[list[dict[str, Any]], bytes]:
    """Return the newer of NCCL's and gloo's records: its entries, and the record as torch writes it."""
    # An older torch has none, and a torch for CPUs has not the first.
    names = [name for name in ("_dump_nccl_trace", "_dump_fr_trace") if hasattr(torch_c, name)]
    found = {name: json.loads(getattr(torch_c, f"{name}_json")()).get("entries", []) for name in names}
    if not found:
        raise RuntimeError("this torch is too old to have a record")
    name = max(found, key=lambda name: found[name][-1]["time_created_ns"] if found[name] else 0)
    return found[name], getattr(torch_c, name)()


def _last_collective(entries: list[dict[str, Any]]) -> str:
    if not entries:
        return "it has entered no collective"
    last = entries[-1]
    sizes = " and ".join("x".join(map(str, size)) or "1" for size in last["input_sizes"]) or "nothing"
    return f"its last collective is number {last['op_id']}, {last['profiling_name']} of {sizes}, {last['state']}"
