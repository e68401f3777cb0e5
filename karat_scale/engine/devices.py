"""Which device is a rank's own, and that DeepSpeed works on the same."""

import os
import socket
import sys
from collections.abc import Sequence

import torch

from karat_scale.console import plural
from karat_scale.errors import UserError


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
