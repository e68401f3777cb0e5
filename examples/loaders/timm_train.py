"""The exact loader in timm's train.py. These are the changes, for updates of one batch (--grad-accum-steps 1):

-   dataset_train = create_dataset(...)
-   collate_fn = FastCollateMixup(**mixup_args)
-   mixup_fn = Mixup(**mixup_args)
-   loader_train = create_loader(dataset_train, ...)
+   loader_train = ExactLoader(
+       args.data_dir, global_batch=GLOBAL_BATCH, workers=args.workers, device=device,
+       image_size=data_config["input_size"][-1], num_classes=args.num_classes,
+       augment={"randaugment": args.aa or "", "mixup": args.mixup, "cutmix": args.cutmix,
+                "label_smoothing": args.smoothing if mixup_active else 0,  # else timm's loss smooths
+                "mean": data_config["mean"], "std": data_config["std"]})
    if args.resume:
        resume_epoch = resume_task_checkpoint(...)
+       saved = torch.load(args.resume, map_location="cpu", weights_only=False)  # it holds timm's args, a Namespace
+       loader_train.load_state_dict(saved["loader"])
+       resume_epoch = loader_train.epoch
    saver = utils.CheckpointSaver(...)
+   saver.loader = loader_train
-   if lr_scheduler is not None and start_epoch > 0:
+   if lr_scheduler is not None and loader_train.step > 0:
        if args.sched_on_updates:
-           lr_scheduler.step_update(start_epoch * updates_per_epoch)
+           lr_scheduler.step_update(loader_train.step)
    for epoch in range(start_epoch, num_epochs):
-       _set_loader_epoch(loader_train, epoch)

In train_one_epoch, which may begin in the middle of an epoch:

-   num_updates = epoch * updates_per_epoch
+   num_updates = loader.step
-   for batch_idx, (input, target) in enumerate(loader):
+   for batch_idx, (input, target) in enumerate(loader, loader.step % len(loader)):

In CheckpointSaver._save, before torch.save:

+   save_state["loader"] = self.loader.state_dict()

This is the loop with them, shortened:

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
