"""The exact loader in timm's train.py. These are the changes:

-   dataset_train = create_dataset(...)
-   mixup_fn = Mixup(...)
-   loader_train = create_loader(dataset_train, ...)
+   loader_train = ExactLoader(args.data_dir, global_batch=GLOBAL_BATCH, workers=args.workers, epochs=num_epochs,
+                              augment={"randaugment": args.aa, "mixup": args.mixup, "cutmix": args.cutmix,
+                                       "label_smoothing": args.smoothing}, device=device)
    if args.resume: resume_checkpoint(model, args.resume, optimizer, ...)
+   loader_train.load_state_dict(torch.load(args.resume)["loader"]); start_epoch = loader_train.epoch
    for epoch in range(start_epoch, num_epochs):
-       loader_train.sampler.set_epoch(epoch)
        for batch_idx, (input, target) in enumerate(loader_train):

and each checkpoint gets "loader": loader_train.state_dict(). This is the loop with them, shortened:

torchrun --nproc-per-node 2 examples/loaders/timm_train.py DATA RUN WORKERS
"""

import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils.distributed import init_distributed_device_so
from torch.nn.parallel import DistributedDataParallel

from karat_scale.data import ExactLoader

EPOCHS = 3
data, run, workers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
place: dict[str, Any] = init_distributed_device_so("cuda" if torch.cuda.is_available() else "cpu")
main = place["global_rank"] == 0
torch.manual_seed(0)
model: Any = timm.create_model("test_vit", num_classes=4, img_size=32).to(place["device"])
if place["distributed"]:
    model = DistributedDataParallel(model)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3)

loader = ExactLoader(
    data,
    global_batch=12,
    workers=workers,
    epochs=EPOCHS,
    image_size=32,
    augment={"randaugment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
    device=place["device"],
    total_digest=True,
)
scheduler, _ = create_scheduler_v2(optimizer, num_epochs=EPOCHS, updates_per_epoch=len(loader), step_on_epochs=False)
loss_of = SoftTargetCrossEntropy()
checkpoint = run / "last.pth.tar"
if checkpoint.exists():
    saved = torch.load(checkpoint, map_location=place["device"])
    getattr(model, "module", model).load_state_dict(saved["state_dict"])
    optimizer.load_state_dict(saved["optimizer"])
    loader.load_state_dict(saved["loader"])

for _ in range(loader.epoch, EPOCHS):
    for images, targets in loader:
        loss = loss_of(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(num_updates=loader.step)
        if loader.step % 3 == 0:
            state = {
                "state_dict": getattr(model, "module", model).state_dict(),
                "optimizer": optimizer.state_dict(),
                "loader": loader.state_dict(),
            }
            if main:
                new = run / "new.pth.tar"
                torch.save(state, new)
                new.rename(checkpoint)
        if main:
            print(f"step {loader.step} loss {loss.item():.4f}", flush=True)
digest = loader.run_digest()
if main:
    print(f"digest {digest}")
loader.close()
if place["distributed"]:
    dist.destroy_process_group()
