"""What timm, Lightning, transformers and torchvision call the things that a recipe's keys stand for."""

from collections.abc import Iterable

# Keys of ours, the most likely one first, and what others call them, in any spelling of - and _.
_CALLED = {
    "augment.cutmix": "cutmix_alpha",
    "augment.erasing": "random_erasing reprob",
    "augment.eval_crop": "crop_pct",
    "augment.label_smoothing": "label_smoothing_factor smoothing",
    "augment.mixup": "mixup_alpha",
    "augment.randaugment": "aa autoaugment",
    "checkpoint.every_steps": "save_steps",
    "checkpoint.keep_last": "save_total_limit",
    "data.path": "data_dir dataset",
    "data.train_split data.val_split": "split",
    "data.workers": "num_workers",
    "deepspeed.config": "stage zero zero_stage",
    "init_from": "pretrained",
    "log.every_steps": "logging_steps",
    "log.trackers": "wandb",
    "model.depth": "num_hidden_layers",
    "model.drop_path": "drop_path_rate",
    "model.embed_dim": "hidden_size",
    "model.image_size": "img_size input_size",
    "model.name": "arch",
    "model.num_classes": "num_labels",
    "model.num_heads": "num_attention_heads",
    "model.proj_drop": "drop_rate dropout",
    "optim.betas": "adam_beta1 adam_beta2",
    "optim.clip_grad": "clip_grad_norm gradient_clip_val max_grad_norm",
    "optim.eps": "adam_epsilon",
    "optim.lr": "learning_rate",
    "optim.name": "opt optimizer",
    "optim.weight_decay": "wd",
    "resume.from": "resume_from_checkpoint",
    "run.dir": "checkpoint_dir output output_dir",
    "schedule": "lr_scheduler scheduler",
    "schedule.warmup_epochs schedule.warmup_steps": "warmup",
    "train.ema_decay": "model_ema model_ema_decay",
    "train.epochs": "max_epochs num_epochs num_train_epochs",
    "train.eval_batch": "per_device_eval_batch_size val_batch_size validation_batch_size",
    "train.eval_every_epochs": "eval_every",
    "train.global_batch": "total_batch_size",
    "train.global_batch train.micro_batch": "batch batch_size train_batch_size",
    "train.micro_batch": "accumulate_grad_batches grad_accum grad_accum_steps gradient_accumulation_steps",
    "train.micro_batch train.global_batch": "per_device_train_batch_size",
    "train.precision": "amp bf16 fp16 mixed_precision",
    "train.recompute.policy": "grad_checkpointing gradient_checkpointing",
}
SYNONYMS = {name: keys.split() for keys, names in _CALLED.items() for name in names.split()}


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
