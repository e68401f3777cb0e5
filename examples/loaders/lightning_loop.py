"""The exact loader in Lightning: killed anywhere, the run goes on with the next sample, on any number of ranks.

torchrun --nproc-per-node 2 examples/loaders/lightning_loop.py DATA RUN WORKERS
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
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


seed_everything(0)
saves = ModelCheckpoint(run, filename="{step:06d}", every_n_train_steps=3, save_top_k=-1, save_last=True)
trainer = Trainer(
    devices=world_size,
    strategy="ddp",
    max_epochs=EPOCHS,
    callbacks=[saves],
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
# Lightning saves the loader's state with the model, and gives it back.
trainer.fit(Classifier(), loader, ckpt_path="last")
digest = loader.run_digest()
if trainer.is_global_zero:
    print(f"digest {digest}")
loader.close()
