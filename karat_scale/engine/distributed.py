"""The place of this process among the ranks, and the few collectives the trainer needs.

A single process, `torchrun`, and `srun` with one task per device all end in the same `World`. Each rank has its own
device, and DeepSpeed uses the same one.

torch records the last collectives of each rank. They show which one a stalled rank waits in, and where the others are.
For NCCL, `python -m torch.distributed.flight_recorder.fr_trace RUN/diagnostics -p flight-` compares the files of all
ranks; torch 2.13 cannot read gloo's.
"""

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed
import torch.distributed as dist

from karat_scale.engine.peers import CONNECTING, Place, explaining, meet
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.files import replace_file
from karat_scale.foundation.machine import launch_environment, number_in

T = TypeVar("T")
PATIENCE_MINUTES = 30.0
# About the number of threads and data workers that a rank has at once. gloo and torch wait for ever if they cannot
# start one.
_THREADS = 16
# The ranks that have read all GPUs' names, and how long rank 0 waits for them.
_READ, _READ_SECONDS = "read", 30.0
_meetings = itertools.count()


@dataclass(frozen=True)
class World:
    """This process among `size` ranks; `control` carries small CPU tensors, apart from NCCL's device traffic.

    `patience` is how long a collective waits for another rank.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    patience: timedelta = timedelta(minutes=PATIENCE_MINUTES)

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which writes and reports."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return True on all ranks if `flag` is true on any of them."""
        return self.max(int(flag)) > 0

    def max(self, value: int) -> int:
        """The largest `value` of all ranks."""
        return self.maxima(value)[0]

    def maxima(self, *values: int) -> list[int]:
        """Return the maximum over all ranks of each of the values, in one collective."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a small tensor, returned on the CPU in float64."""
        total = tensor.detach().to("cpu", torch.float64)
        if self.size > 1:
            dist.all_reduce(total, group=self.control)
        return total

    def add_up_on_main(self, tensor: torch.Tensor) -> None:
        """Replace rank 0's tensor, on this world's device, by the sum over ranks; the other ranks' become invalid."""
        if self.size > 1:
            dist.reduce(tensor, dst=0)

    def broadcast(self, value: T) -> T:
        """Return rank 0's picklable `value` on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def on_main(self, action: Callable[[], T]) -> T:
        """Return the result of rank 0's action on every rank; its UserError or OSError is raised on every rank."""
        with self.together():
            returned = action() if self.is_main else cast(T, None)
        return self.broadcast(returned)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise a UserError or OSError of one rank in the block on every rank, at the end of the block."""
        mine: Exception | None = None
        try:
            yield
        except (UserError, OSError) as error:
            mine = error
        for met in self.gather(mine):
            if met is not None:
                raise met

    def gather(self, value: T) -> list[T]:
        """Each rank's picklable `value`, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.control)
        return box


ALONE = World(0, 1, 0, torch.device("cpu"))
"""A process that has joined nothing."""


@contextmanager
def joined(
    device: str, patience_minutes: float = PATIENCE_MINUTES, check: Callable[[], object] = lambda: None
) -> Iterator[World]:
    """Join the process group for the block.

    Args:
        device: auto, cpu or cuda.
        patience_minutes: how long to wait for another rank.
        check: a function to call while waiting for the ranks; it may raise to give up.

    Raises:
        UserError: as in `start`.
        PeerError: another rank has ended.
    """
    of_launcher, is_orderly = os.environ.get("LOCAL_RANK"), False
    try:
        with explaining():
            yield start(device, patience_minutes, check)
        is_orderly = True
    finally:
        stop(is_orderly)
        if of_launcher is None:
            os.environ.pop("LOCAL_RANK", None)  # `start` has set the GPU's number
        else:
            os.environ["LOCAL_RANK"] = of_launcher


def start(device: str, patience_minutes: float = PATIENCE_MINUTES, check: Callable[[], object] = lambda: None) -> World:
    """Join the process group; the arguments are those of `joined`.

    Raises:
        UserError: CUDA was asked for and there is none for each rank, or the ranks do not meet.
        PeerError: the launcher, or the rank that keeps the store, has ended.
    """
    patience = timedelta(minutes=patience_minutes)
    rank, size, local_rank = launch_environment(os.environ)
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    here = torch.device("cpu")
    if use_cuda:
        if not torch.cuda.is_available():
            raise UserError("run.device = cuda, but torch sees no CUDA device; use run.device=auto or cpu")
        here = torch.device("cuda", gpu_index(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(here)
    tell_deepspeed(here.type)
    # DeepSpeed insists on it, and takes the GPU of that number.
    os.environ["LOCAL_RANK"] = str(here.index if use_cuda else local_rank)
    return World(rank, size, local_rank, here, _join(rank, size, here, patience, check), patience)


def stop(is_orderly: bool = True) -> None:
    """Leave the process group. Another run may start in this process, except after an error on a GPU.

    NCCL would then wait for the other ranks, which wait for this one. They notice when this process has ended.
    """
    if dist.is_initialized() and (is_orderly or dist.get_backend() != "nccl" or dist.get_world_size() == 1):
        dist.destroy_process_group()
    if "deepspeed" in sys.modules:
        from karat_scale.engine.deepspeed_internals import forget_groups, use_torchs_own_linear

        forget_groups()
        use_torchs_own_linear()


def _join(
    rank: int, size: int, device: torch.device, patience: timedelta, check: Callable[[], object]
) -> dist.ProcessGroup | None:
    """Make the group of all ranks and, if it is NCCL's, another one for `World.control`."""
    if dist.is_initialized():
        return None
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # collectives of each group that is made from here on
    _need_threads()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if size == 1:
        # No port, no host name: nothing that another job on this machine could collide with.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return None
    met = meet(Place(*meeting_place(), rank, size, patience, str(next(_meetings)), check))
    if device.type == "cuda":  # before NCCL, whose own refusal is a traceback
        have_a_gpu_each(dist.PrefixStore("cards", met), rank, size, card(device))
    store = dist.PrefixStore("group", met)
    # With its device NCCL connects now, where a fault is seen, and each barrier knows which GPU is meant.
    device_id = device if device.type == "cuda" else None
    # All are here: who keeps the others waiting for longer was killed.
    limit = min(patience, CONNECTING) if backend == "gloo" else patience
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=device_id)
    if backend == "gloo":
        dist.distributed_c10d._set_pg_timeout(patience)
    group: Any = dist.new_group(backend="gloo", timeout=patience) if device.type == "cuda" else None
    found: dist.ProcessGroup | None = group  # torch 2.15's type has a number, too, for ranks outside a group
    return found


def meeting_place() -> tuple[str, int]:
    """Return the address and the port at which the ranks of this job meet, and set them in the environment."""
    os.environ["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or _first_slurm_host()
    port = os.environ["MASTER_PORT"] = os.environ.get("MASTER_PORT") or default_port(os.environ)
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT = {port}: should be a number from 1 to 65535")
    return os.environ["MASTER_ADDR"], int(port)


def _need_threads() -> None:
    """Raise RuntimeError if this process may not start as many threads as a rank needs."""
    go_on = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(_THREADS):
            thread = threading.Thread(target=go_on.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        go_on.set()
        for thread in started:
            thread.join()


def default_port(environ: Mapping[str, str]) -> str:
    """Return the default port of the rendezvous: by SLURM's job, so that two jobs on a node seldom collide."""
    return str(20000 + number_in(environ, "SLURM_JOB_ID", "0") % 10000)  # below the ports that kernels hand out


def have_a_gpu_each(store: dist.Store, rank: int, size: int, mine: str) -> None:
    """Compare this rank's `card` with those of the other ranks. Raises UserError on all ranks if two are the same.

    The store may end with rank 0, so before the error rank 0 waits until all have read.
    """
    if torch.cuda.device_count() == 1:
        print(f"[rank {rank}] takes the one GPU that it is shown: {mine}", flush=True)
    store.set(str(rank), mine)
    cards = [name.decode() for name in store.multi_get([str(other) for other in range(size)])]
    store.add(_READ, 1)
    try:
        refuse_shared(cards)
    except UserError:
        last = time.monotonic() + _READ_SECONDS
        while rank == 0 and store.add(_READ, 0) < size and time.monotonic() < last:
            time.sleep(0.05)
        raise


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            "several ranks, but no MASTER_ADDR and `scontrol show hostnames` does not answer; set MASTER_ADDR"
        ) from None


def gpu_index(local_rank: int, shown: int) -> int:
    """Return the number of this rank's GPU among the `shown` ones.

    If one GPU is shown, it is 0: srun's --gpu-bind and --gpus-per-task show each task its own GPU, or all ranks the
    same, which `refuse_shared` detects.

    Raises:
        UserError: there are several GPUs, and fewer than ranks.
    """
    if shown == 1:
        return 0
    if local_rank >= shown:
        raise UserError(f"local rank {local_rank} has no GPU: this node shows {shown}; start one task per GPU")
    return local_rank


def tell_deepspeed(device_type: str) -> None:
    """Make DeepSpeed use "cpu" or "cuda". By default it takes a GPU if torch sees one when it is imported.

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
    """Return a name of the node and the GPU behind a device of this process that no other GPU has."""
    properties = torch.cuda.get_device_properties(device)
    marks = (getattr(properties, name, "") for name in ("uuid", "pci_bus_id"))  # every build of torch has one
    return " ".join([socket.gethostname(), properties.name, *map(str, marks)])


def refuse_shared(cards: Sequence[str]) -> None:
    """Raises UserError where two ranks have the same GPU; `cards` has each rank's `card`."""
    for rank, name in enumerate(cards):
        first = cards.index(name)
        if first < rank:
            raise UserError(f"ranks {first} and {rank} have one GPU, {name}; start one task per GPU")


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
    # An older torch has neither, and a torch for CPUs lacks the first.
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
