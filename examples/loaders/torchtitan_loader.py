"""The exact loader as `BaseDataLoader` of torchtitan 0.3, over your own tokens, on any number of data-parallel ranks.

In torchtitan, set the trainer's `dataloader` to `ExactTokens.Config(...)`; its checkpoints hold the loader's state.
Below is the part of its trainer that uses a loader. torchtitan need not be installed:

torchrun --nproc-per-node 2 examples/loaders/torchtitan_loader.py DATA RUN WORKERS
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel

from karat_scale.data import ExactLoader

if find_spec("torchtitan"):
    from torchtitan.components.dataloader import BaseDataLoader
else:

    class BaseDataLoader(Stateful):  # type: ignore[no-redef]
        """What torchtitan asks of a loader."""

        @dataclass(kw_only=True, slots=True)
        class Config:
            """torchtitan's settings of every loader."""

            dataset: str = ""
            dataset_path: str | None = None


class Tokens:
    """Sequences of a file of int32 tokens, each with the token after it."""

    def __init__(self, path: str, length: int) -> None:
        self._tokens, self._length = np.memmap(path, np.int32, "r"), length
        self.identity = f"{len(self._tokens)} tokens in sequences of {length}"

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._length

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        start = index * self._length
        part = torch.from_numpy(self._tokens[start : start + self._length + 1].astype(np.int64))
        return {"input": part[:-1]}, part[1:]


class ExactTokens(BaseDataLoader):
    """Yields ({"input": int64 [b, length]}, labels), as torchtitan's trainer expects."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """global_batch: torchtitan's `training.global_batch_size`. It keeps a step the same on any number of ranks."""

        global_batch: int
        workers: int = 2
        epochs: int | None = None

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, seq_len: int, **_: Any
    ) -> None:
        self.exact = ExactLoader(
            Tokens(config.dataset_path or "", seq_len),
            global_batch=config.global_batch,
            micro_batch=local_batch_size,
            rank=dp_rank,
            world_size=dp_world_size,
            workers=config.workers,
            epochs=config.epochs,
            total_digest=True,
        )

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield the batches of all epochs that are left."""
        while True:
            step = self.exact.step
            yield from self.exact
            if self.exact.step == step:
                return

    def state_dict(self) -> dict[str, Any]:
        """Return where it is; torchtitan calls this on every rank."""
        return self.exact.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there, also on another number of ranks. An empty state is that of a first start."""
        if state_dict:
            self.exact.load_state_dict(state_dict)


def train(tokens: str, run: Path, workers: int) -> None:
    """Train as torchtitan's trainer does: one iterator over all epochs, and DCP for the checkpoints."""
    dist.init_process_group()
    main, ranks = dist.get_rank() == 0, dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 100)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = ExactTokens.Config(dataset_path=tokens, global_batch=12, workers=workers, epochs=3)
    loader = ExactTokens(config, dp_world_size=ranks, dp_rank=dist.get_rank(), local_batch_size=12 // ranks, seq_len=4)
    if whole := sorted(run.glob("step-*")):
        state: dict[str, Any] = {"model": model.state_dict(), "dataloader": loader}
        dcp.load(state, checkpoint_id=whole[-1])
        model.load_state_dict(state["model"])
    for inputs, labels in loader:
        loss = nn.functional.cross_entropy(model(inputs["input"]).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step = loader.exact.step
        if step % 3 == 0:
            dcp.save({"model": model.state_dict(), "dataloader": loader}, checkpoint_id=run / "new")
            if main:
                (run / "new").rename(run / f"step-{step:06d}")
        if main:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    digest = loader.exact.run_digest()
    if main:
        print(f"digest {digest}")
    loader.exact.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
