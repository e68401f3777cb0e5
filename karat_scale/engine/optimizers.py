"""The recipe's optimizer over a model's parameters, the learning rate of each step, and the average of the weights.

The trainable parameters of a group share a weight decay and a scale of the learning rate. The optimizers are torch's
AdamW, fused on a GPU; torch's Muon for the linear layers inside blocks, with AdamW for all other parameters; and
DeepSpeed's AdamW for CPUs, which is compiled when it is first used. Each is one row in
`karat_scale.foundation.tables.OPTIMIZERS`. The learning rate is a pure function of the step.
"""

import math
import shlex
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from karat_scale.engine.deepspeed_internals import master_weights, refresh_module
from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.files import locked
from karat_scale.foundation.tables import load
from karat_scale.models import no_weight_decay_names
from karat_scale.models.layers import blocks_of
from karat_scale.recipe import OptimConfig, Recipe, TrainConfig

Groups = list[dict[str, Any]]
"""Optimizer groups: `params`, `weight_decay`, and `lr_scale`, by which the schedule's rate is multiplied."""


def parameter_groups(model: nn.Module, optim: OptimConfig, apart: Collection[str] = ()) -> Groups:
    """Return the groups of a model's trainable parameters.

    With `optim.layer_decay` d the layer that is n layers below the head has the scale d^n. An operator has the scale of
    its block; an operator that blocks share has the scale of the last one.

    Args:
        apart: names of parameters to leave out.
    """
    exempt = no_weight_decay_names(model, optim.karat_weight_decay)
    scales = layer_scales(model, optim.layer_decay)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in apart:
            decays = name not in exempt
            new = {"params": [], "weight_decay": optim.weight_decay if decays else 0.0, "lr_scale": scales[name]}
            groups.setdefault((scales[name], decays), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]


def layer_scales(model: Any, decay: float) -> dict[str, float]:
    """Return the factor of each parameter's learning rate; layers are timm's: the stem, each block, and the head.

    Raises:
        RecipeError: timm does not say what the model's layers are.
    """
    if decay == 1.0:
        return {name: 1.0 for name, _ in model.named_parameters()}
    if not hasattr(model, "group_matcher"):
        raise RecipeError(
            f"optim.layer_decay = {decay:g}: timm names no layers of a {type(model).__name__}; use optim.layer_decay=1"
        )
    layers: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last_names = {parameter: name for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters():
        if (last := last_names[parameter]) != name:  # next to it are parameters that only its attention layer has
            of_layer = last.partition("operator.")[0]
            layers[name] = next(layer for other, layer in layers.items() if other.startswith(of_layer))
    top = max(layers.values())
    return {name: decay ** (top - layer) for name, layer in layers.items()}


def build_optimizer(
    model: nn.Module, optim: OptimConfig, device: torch.device, on_cpu: bool = False, groups: Groups | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer of `optim.name`; with `on_cpu`, DeepSpeed's version of it for an offloaded step.

    `groups` are groups of the trainable parameters, each with its weight decay and its scale of the rate; by default
    those of `parameter_groups`.

    Raises:
        RecipeError: this torch does not have the optimizer.
    """
    if on_cpu:
        offloaded: torch.optim.Optimizer = load(optim.row.on_cpu)(
            groups or parameter_groups(model, optim), lr=optim.lr, betas=optim.betas, eps=optim.eps
        )
        return offloaded
    built: torch.optim.Optimizer = load(optim.row.place)(model, optim, device, groups)
    return built


def hidden_matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights of the linear layers inside blocks.

    The patch embedding and the head are not among them, as Muon's authors advise. KArAt's parameters are
    not either: coefficients are many small functions, W is a stack over heads, and none maps one activation to the
    next.
    """
    inside = {module for block in blocks_of(model) for module in block.modules()}
    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear) and module in inside
    }


def own_matrices(model: nn.Module, optim: OptimConfig) -> set[str]:
    """Return the names of the parameters that have the row's `matrix_states`."""
    return set() if optim.row.matrix_states is None else hidden_matrices(model)


def state_names(model: nn.Module, optim: OptimConfig) -> set[str]:
    """Return the names of all states that the optimizer keeps for the parameters that learn."""
    row, matrices = optim.row, own_matrices(model, optim)
    learning = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {state for name in learning for state in ((row.matrix_states or ()) if name in matrices else row.states)}


def heeds_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if `step` changes nothing when the tensor `optimizer.found_inf` is 1, without reading it on the host.

    torch's fused optimizers do so, and declare it to torch's gradient scaler.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def build_adamw(model: nn.Module, optim: OptimConfig, device: torch.device, groups: Groups | None) -> torch.optim.AdamW:
    """Return AdamW over `groups`, or over all trainable parameters."""
    groups = parameter_groups(model, optim) if groups is None else groups
    fused = steps_fused(device)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)


def steps_fused(device: torch.device) -> bool:
    """Return True if a step takes few operations. A CPU would gain little, and its runs would round in other places."""
    return device.type == "cuda"


def build_muon(
    model: nn.Module, optim: OptimConfig, device: torch.device, groups: Groups | None = None
) -> torch.optim.Optimizer:
    """Return Muon and AdamW as one optimizer; only AdamW if no matrix is trainable.

    Raises:
        RecipeError: the task has its own groups.
    """
    if groups is not None:
        raise RecipeError("optim.name = muon: this task groups its parameters in another way; use optim.name=adamw")
    hidden = hidden_matrices(model)
    others = parameter_groups(model, optim, apart=hidden)
    matrices = parameter_groups(model, optim, apart={name for name, _ in model.named_parameters()} - hidden)
    adamw = [build_adamw(model, optim, device, others)] if others else []
    if not matrices:
        return adamw[0]
    # Updates of the size of AdamW's (arXiv 2502.16982): one learning rate and one weight decay are right for both.
    return MuonWithAdamW(torch.optim.Muon(matrices, lr=optim.lr, adjust_lr_fn="match_rms_adamw"), *adamw)


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon and torch's AdamW as one optimizer: one list of groups, one state."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self._parts = parts
        groups = [{**group, "part": number} for number, part in enumerate(parts) for group in part.param_groups]
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> Any:
        """Step both; a closure is not supported."""
        assert closure is None
        for number, part in enumerate(self._parts):
            # Loading a state replaces the lists of groups and states, so they are handed over each time.
            part.param_groups = [group for group in self.param_groups if group["part"] == number]
            part.state = self.state
            part.step()


# A build writes files all the time, and compiles none for longer than this.
QUIET_SECONDS = 60.0


def cpu_adam_can_be_built() -> bool:
    """Return whether this machine can compile DeepSpeed's AdamW. DeepSpeed's own `is_compatible` does not check."""
    from torch.utils.cpp_extension import get_cxx_compiler, is_ninja_available

    return is_ninja_available() and shutil.which(shlex.split(get_cxx_compiler())[0]) is not None


def build_cpu_adam() -> None:
    """Compile DeepSpeed's AdamW for CPUs, if that has not been done, one process at a time.

    torch marks a build with a file and waits until that file is gone. A build that was killed leaves its file, and
    every later one would wait forever. Our lock ends with the process that holds it.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils.cpp_extension import _get_build_directory

    builder = CPUAdamBuilder()
    directory = Path(_get_build_directory(builder.name, verbose=False))
    with locked(directory / "karat.lock"):
        wait_for_mark(directory)
        builder.load(verbose=False)


def wait_for_mark(directory: Path) -> None:
    """Wait until torch's mark of a build in `directory` is gone. If nothing there changes for QUIET_SECONDS, remove it.

    The time since a change is that of the files or, as their server may have another clock, that of this wait.
    """
    seen, since = 0.0, time.monotonic()
    while (directory / "lock").exists():
        newest = max((file.stat().st_mtime for file in directory.iterdir() if file.name != "karat.lock"), default=0.0)
        if newest != seen:
            seen, since = newest, time.monotonic()
        if max(time.time() - newest, time.monotonic() - since) > QUIET_SECONDS:
            (directory / "lock").unlink(missing_ok=True)
        else:
            time.sleep(0.2)


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up from `warmup_lr` to `peak_lr`, then half a cosine down to `min_lr` at `total_steps`.

    The half cosine begins at step `cosine_from`.
    """

    peak_lr: float
    min_lr: float
    warmup_lr: float
    warmup_steps: int
    total_steps: int
    cosine_from: int = 0

    def lr(self, step: int) -> float:
        """The rate for the update that follows `step` finished updates."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak_lr - self.warmup_lr) * step / self.warmup_steps
        if step >= self.total_steps:
            return self.min_lr
        done = (step - self.cosine_from) / (self.total_steps - self.cosine_from)
        return self.min_lr + 0.5 * (self.peak_lr - self.min_lr) * (1 + math.cos(math.pi * done))


def build_schedule(recipe: Recipe, steps_per_epoch: int) -> CosineSchedule:
    """The recipe's schedule in steps (paper, training recipe: lr * batch / 512, cosine per step).

    Raises:
        RecipeError: the warm-up has more steps than training.
    """
    batches = recipe.train.global_batch / recipe.optim.lr_batch if recipe.optim.lr_batch else 1.0
    schedule = recipe.schedule
    total_steps = recipe.train.epochs * steps_per_epoch
    warmup_steps = schedule.warmup_steps
    if warmup_steps is None:
        warmup_steps = round(schedule.warmup_epochs * steps_per_epoch)
    elif warmup_steps > total_steps:
        raise RecipeError(
            f"schedule.warmup_steps = {warmup_steps} are more than the {total_steps} steps of train.epochs = "
            f"{recipe.train.epochs}; shorten the warm-up"
        )
    return CosineSchedule(
        peak_lr=recipe.optim.lr * batches,
        min_lr=schedule.min_lr,
        warmup_lr=schedule.warmup_lr,
        warmup_steps=warmup_steps,
        total_steps=total_steps,
        cosine_from=warmup_steps if schedule.cosine_after_warmup else 0,
    )


def ema_decay(step: int, decay: float, warmup: bool) -> float:
    """The decay for the update after `step` finished steps; the warm-up is timm's (1 - 1 / step^(2/3))."""
    if step <= 1:
        return 0.0
    return min(decay, 1.0 - float(step) ** (-2.0 / 3.0)) if warmup else decay


_TAKEN = torch.tensor(True)


class Ema:
    """average = decay * average + (1 - decay) * weights, on each rank's own fp32 shard.

    Averaging the module's parameters would average what bf16 rounded.
    """

    def __init__(self, engine: Any, train: TrainConfig) -> None:
        self._engine = engine
        self._decay = train.ema_decay
        self._warmup = train.ema_warmup
        self.shards = [master.detach().clone() for master in master_weights(engine)]

    @torch.no_grad()
    def update(self, step: int, was_taken: torch.Tensor = _TAKEN) -> None:
        """Take in the weights after `step` finished steps, unless the last step was not taken.

        Args:
            was_taken: bool, 0-dim, on any device, which is not read.
        """
        masters = master_weights(self._engine)
        if not masters:
            return
        share = (was_taken * (1.0 - ema_decay(step, self._decay, self._warmup))).to(masters[0].device)
        if averages_one_by_one(share.device):
            for average, master in zip(self.shards, masters, strict=True):
                average.lerp_(master, share)
        else:  # three kernels for all tensors
            difference = torch._foreach_sub(masters, self.shards)
            torch._foreach_mul_(difference, share)
            torch._foreach_add_(self.shards, difference)

    @contextmanager
    def in_place_of_weights(self, *shared: type[Exception]) -> Iterator[None]:
        """Let the module hold the averages inside the block, and its own weights again after it. Collective.

        After an error the averages stay, as only one rank may have raised it. After one of `shared`, which all ranks
        raise, the weights return.
        """
        self._swap()
        try:
            yield
        except shared:
            self._swap()
            raise
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.shards, master_weights(self._engine), strict=True):
            held = average.clone()
            average.copy_(master)
            master.data.copy_(held)
        refresh_module(self._engine)


def averages_one_by_one(device: torch.device) -> bool:
    """Return True on a CPU, where three passes over memory cost more than a call for each tensor."""
    return device.type == "cpu"
