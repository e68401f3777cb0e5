"""The exact loader in bare PyTorch: a killed run continues with the next sample, on any number of ranks.

torchrun --nproc-per-node 2 examples/loaders/ddp.py DATA RUN WORKERS
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from karat_scale.data import ExactLoader

EPOCHS = 3
data, run, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
dist.init_process_group()
main = dist.get_rank() == 0
device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).to(device))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

# The batch of all ranks together. Each rank gets its part.
loader = ExactLoader(
    data, global_batch=12, workers=workers, epochs=EPOCHS, image_size=32, device=device, total_digest=True
)
checkpoint = run / "checkpoint.pt"
if checkpoint.exists():
    saved = torch.load(checkpoint, map_location=device)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    loader.load_state_dict(saved["loader"])

for _ in range(loader.epoch, EPOCHS):
    for images, labels in loader:  # after a resume, the rest of the epoch
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loader.step % 3 == 0:
            # On every rank, because of total_digest.
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
            if main:
                new = run / "checkpoint.new"
                torch.save(state, new)
                new.rename(checkpoint)  # so a kill leaves the old one or the new one
        if main:
            print(f"step {loader.step} loss {loss.item():.4f}", flush=True)
digest = loader.run_digest()
if main:
    print(f"digest {digest}")
loader.close()
dist.destroy_process_group()
