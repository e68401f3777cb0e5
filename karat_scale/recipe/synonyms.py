"""What timm, Lightning, transformers and torchvision call the things that a recipe's keys stand for."""

from collections.abc import Iterable

# Their names, in any spelling of - and _, and the keys to look at, the most likely one first.
SYNONYMS = {
    "aa": ("augment.randaugment",),
    "accumulate_grad_batches": ("train.micro_batch",),
    "adam_beta1": ("optim.betas",),
    "adam_beta2": ("optim.betas",),
    "adam_epsilon": ("optim.eps",),
    "arch": ("model.name",),
    "autoaugment": ("augment.randaugment",),
    "amp": ("train.precision",),
    "batch": ("train.global_batch", "train.micro_batch"),
    "batch_size": ("train.global_batch", "train.micro_batch"),
    "bf16": ("train.precision",),
    "checkpoint_dir": ("run.dir",),
    "clip_grad_norm": ("optim.clip_grad",),
    "cutmix_alpha": ("augment.cutmix",),
    "crop_pct": ("augment.eval_crop",),
    "data_dir": ("data.path",),
    "dataset": ("data.path",),
    "drop_path_rate": ("model.drop_path",),
    "eval_every": ("train.eval_every_epochs",),
    "fp16": ("train.precision",),
    "grad_accum_steps": ("train.micro_batch",),
    "gradient_accumulation_steps": ("train.micro_batch",),
    "gradient_checkpointing": ("train.recompute.policy",),
    "gradient_clip_val": ("optim.clip_grad",),
    "grad_checkpointing": ("train.recompute.policy",),
    "hidden_size": ("model.embed_dim",),
    "img_size": ("model.image_size",),
    "input_size": ("model.image_size",),
    "label_smoothing_factor": ("augment.label_smoothing",),
    "learning_rate": ("optim.lr",),
    "logging_steps": ("log.every_steps",),
    "lr_scheduler": ("schedule",),
    "max_epochs": ("train.epochs",),
    "max_grad_norm": ("optim.clip_grad",),
    "mixed_precision": ("train.precision",),
    "mixup_alpha": ("augment.mixup",),
    "model_ema": ("train.ema_decay",),
    "model_ema_decay": ("train.ema_decay",),
    "num_attention_heads": ("model.num_heads",),
    "num_epochs": ("train.epochs",),
    "num_hidden_layers": ("model.depth",),
    "num_labels": ("model.num_classes",),
    "num_train_epochs": ("train.epochs",),
    "num_workers": ("data.workers",),
    "opt": ("optim.name",),
    "optimizer": ("optim.name",),
    "output": ("run.dir",),
    "output_dir": ("run.dir",),
    "per_device_eval_batch_size": ("train.eval_batch",),
    "per_device_train_batch_size": ("train.micro_batch", "train.global_batch"),
    "pretrained": ("init_from",),
    "random_erasing": ("augment.erasing",),
    "reprob": ("augment.erasing",),
    "resume_from_checkpoint": ("resume.from",),
    "save_steps": ("checkpoint.every_steps",),
    "save_total_limit": ("checkpoint.keep_last",),
    "smoothing": ("augment.label_smoothing",),
    "total_batch_size": ("train.global_batch",),
    "train_batch_size": ("train.global_batch", "train.micro_batch"),
    "val_batch_size": ("train.eval_batch",),
    "validation_batch_size": ("train.eval_batch",),
    "wd": ("optim.weight_decay",),
    "wandb": ("log.trackers",),
    "zero_stage": ("deepspeed.config",),
}


# Settings of other tools that are no keys here, and what sets them.
_PROCESSES = "`karat launch --ranks N` sets the number of processes, one for each GPU"
ELSEWHERE = {
    **dict.fromkeys(("devices", "gpus", "nprocpernode", "numgpus", "numprocesses", "ranks", "worldsize"), _PROCESSES),
    **dict.fromkeys(("nnodes", "nodes", "numnodes"), "`karat submit --nodes=N` sets the number of nodes"),
}


def elsewhere(name: str) -> str:
    """Return what sets a setting of another tool that is no key here; an empty text for any other name."""
    return ELSEWHERE.get(_plain(name), "")


def keys_called(name: str, keys: Iterable[str]) -> list[str]:
    """Return those of `keys` that other tools call by the last part of `name`."""
    known, called = set(keys), _plain(name)
    return [key for other, meant in SYNONYMS.items() if _plain(other) == called for key in meant if key in known]


def _plain(name: str) -> str:
    return name.rpartition(".")[2].lower().replace("-", "").replace("_", "")
