"""The exact loader in Lightning: a killed run continues with the next sample, on any number of ranks.

torchrun --nproc-per-node 2 examples/loaders/lightning_loop.py DATA RUN WORKERS
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from karat_scale.data import ExactLoader

EPOCHS = 3
data, run, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
world_size = int(os.environ.get("WORLD_SIZE", 1))


class Classifier(LightningModule):
    """A linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        """Say how far it is."""
        if self.global_rank == 0:
            print(f"step {self.global_step} loss {outputs['loss'].item():.4f}", flush=True)


class Data(LightningDataModule):
    """Saves the loader's state and gives it back. Lightning alone loses the state of an epoch's end."""

    def __init__(self, loader: ExactLoader) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> ExactLoader:
        """Return the loader."""
        return self.loader

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is."""
        return self.loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there."""
        self.loader.load_state_dict(state_dict)


seed_everything(0)
steps = ModelCheckpoint(run / "steps", filename="{step:06d}", every_n_train_steps=3, save_top_k=-1, save_last=True)
epochs = ModelCheckpoint(run / "epochs", filename="{epoch:03d}", save_top_k=-1, save_last=True)
trainer = Trainer(
    devices=world_size,
    strategy="ddp",
    max_epochs=EPOCHS,
    callbacks=[steps, epochs],
    use_distributed_sampler=False,  # the loader gives each rank its part already
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
loader = ExactLoader(
    data,
    global_batch=12,
    rank=trainer.global_rank,
    world_size=trainer.world_size,
    workers=workers,
    epochs=EPOCHS,
    image_size=32,
    total_digest=True,
)
trainer.fit(Classifier(), datamodule=Data(loader), ckpt_path="last")
digest = loader.run_digest()
if trainer.is_global_zero:
    print(f"digest {digest}")
loader.close()
