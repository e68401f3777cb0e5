"""The exact loader is a torchdata Stateful: torch.distributed.checkpoint (DCP) saves and loads it.

torchrun --nproc-per-node 2 examples/loaders/torchdata_checkpoint.py DATA RUN WORKERS
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
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
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

loader = ExactLoader(
    data, global_batch=12, workers=workers, epochs=EPOCHS, image_size=32, device=device, total_digest=True
)
if whole := sorted(run.glob("step-*")):
    state: dict[str, Any] = {"model": model.state_dict(), "loader": loader}
    dcp.load(state, checkpoint_id=whole[-1])  # calls loader.load_state_dict
    model.load_state_dict(state["model"])

for _ in range(loader.epoch, EPOCHS):
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loader.step % 3 == 0:
            new = run / "new"
            dcp.save({"model": model.state_dict(), "loader": loader}, checkpoint_id=new)
            if main:
                new.rename(run / f"step-{loader.step:06d}")
        if main:
            print(f"step {loader.step} loss {loss.item():.4f}", flush=True)
digest = loader.run_digest()
if main:
    print(f"digest {digest}")
loader.close()
dist.destroy_process_group()
