"""The exact loader in a loop of Hugging Face accelerate: a killed run continues with the next sample.

accelerate launch --num_processes 2 examples/loaders/accelerate_loop.py DATA RUN WORKERS
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from karat_scale.data import ExactLoader

EPOCHS = 3
data, run, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
accelerator = Accelerator(cpu=not torch.cuda.is_available())
torch.manual_seed(0)
model: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
# Without the loader: it gives each process its part already, and needs no `skip_first_batches`.
model, optimizer = accelerator.prepare(model, optimizer)
loader = ExactLoader(
    data,
    global_batch=12,
    rank=accelerator.process_index,
    world_size=accelerator.num_processes,
    workers=workers,
    epochs=EPOCHS,
    image_size=32,
    device=accelerator.device,
    total_digest=True,
)
accelerator.register_for_checkpointing(loader)
if whole := sorted(run.glob("step-*")):
    accelerator.load_state(str(whole[-1]))

for _ in range(loader.epoch, EPOCHS):
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if loader.step % 3 == 0:
            new = run / "new"
            accelerator.save_state(str(new))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                new.rename(run / f"step-{loader.step:06d}")
        if accelerator.is_main_process:
            print(f"step {loader.step} loss {loss.item():.4f}", flush=True)
digest = loader.run_digest()
if accelerator.is_main_process:
    print(f"digest {digest}")
loader.close()
accelerator.end_training()
