"""Which device is a rank's own, and that DeepSpeed works on the same; what a stalled rank waits for.

torch records the last collectives of each rank: which one a stalled rank waits in, and which the others have. For NCCL,
`python -m torch.distributed.flight_recorder.fr_trace RUN/diagnostics -p flight-` compares the files of all ranks; torch
2.13 cannot read gloo's.
"""

import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.files import replace_file


def gpu_index(local_rank: int, shown: int) -> int:
    """The number of this rank's GPU among the `shown` ones.

    Of one alone it is 0: srun's --gpu-bind and --gpus-per-task show each task its own, or all ranks the same, which
    `refuse_shared` can tell.

    Raises:
        UserError: there are several GPUs, and fewer than ranks.
    """
    if shown == 1:
        return 0
    if local_rank >= shown:
        raise UserError(f"local rank {local_rank} has no GPU: this node shows {shown}; start one task per GPU")
    return local_rank


def tell_deepspeed(device_type: str) -> None:
    """Let DeepSpeed work on "cpu" or "cuda". Left alone it takes a GPU where torch sees one, once it is imported.

    Raises:
        UserError: this process has imported DeepSpeed for another kind of device.
    """
    os.environ["DS_ACCELERATOR"] = device_type
    if "deepspeed" in sys.modules:
        from deepspeed.accelerator import get_accelerator

        if (taken := get_accelerator().device_name()) != device_type:
            raise UserError(
                f"run.device = {device_type}, but DeepSpeed was imported for {taken} in this process; "
                "start another process, or import DeepSpeed after karat_scale has started"
            )


def device_name(device: torch.device) -> str:
    """The name of a device, for a person."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {plural(torch.get_num_threads(), 'thread')}"


def wait_for(device: torch.device | str) -> None:
    """Wait until a device of this process, its current GPU or the CPU, has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def card(device: torch.device) -> str:
    """The node and the GPU behind a device of this process, as no other GPU is called."""
    properties = torch.cuda.get_device_properties(device)
    marks = (getattr(properties, name, "") for name in ("uuid", "pci_bus_id"))  # no build of torch tells less than one
    return " ".join([socket.gethostname(), properties.name, *map(str, marks)])


def refuse_shared(cards: Sequence[str]) -> None:
    """Raises UserError where two ranks have the same GPU; `cards` has each rank's `card`."""
    for rank, name in enumerate(cards):
        first = cards.index(name)
        if first < rank:
            raise UserError(f"ranks {first} and {rank} have one GPU, {name}; start one task per GPU")


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
