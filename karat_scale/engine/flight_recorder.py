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

from karat_scale.files import write_atomically

_COLLECTIVES = "2000"


def record_collectives() -> None:
    """Let torch record the collectives of process groups that are made from here on, unless the user decided."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _COLLECTIVES)


def write_flight_record(directory: Path, rank: int) -> None:
    """Write this rank's record to `directory`/flight-RANK, and a line on its last collective to standard error.

    It never fails: it is called when something else has.
    """
    torch_c: Any = torch._C._distributed_c10d
    if not hasattr(torch_c, "_dump_fr_trace"):  # an older torch
        return
    with suppress(OSError, RuntimeError, ValueError):
        print(f"rank {rank}: {_last_collective(torch_c._dump_fr_trace_json())}", file=sys.stderr, flush=True)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / f"flight-{rank}", torch_c._dump_fr_trace())


def _last_collective(record: bytes) -> str:
    entries = json.loads(record).get("entries", [])
    if not entries:
        return "it has entered no collective"
    last = entries[-1]
    sizes = " and ".join("x".join(map(str, size)) or "1" for size in last["input_sizes"]) or "nothing"
    return f"its last collective is number {last['op_id']}, {last['profiling_name']} of {sizes}, {last['state']}"
