"""`karat plan`: will a recipe fit, on which stage, how long will it take, and what is wrong with it.

A dry run finds what would stop a run of any world size, in one process, before the queue.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch

from karat_scale.commands.plan.memory import STAGES, Machine, Subject, refused_stages, search
from karat_scale.commands.plan.report import Plan, show, show_side_by_side
from karat_scale.commands.plan.time import Node, curve, data_need, find_measured, find_time, links_of, traffic
from karat_scale.commands.plan.tracing import count_samples
from karat_scale.data.augmentation.device_augment import Normalize
from karat_scale.data.backends import Backend, ImageSpec, open_backend
from karat_scale.data.plan import BatchSlice, EvalPlan, check_one_batch, micro_batch_of, total_steps
from karat_scale.data.shards.shard_format import unused_classes
from karat_scale.engine.deepspeed_config import load_ds_config, zero_stage
from karat_scale.engine.engine import matrix_peak
from karat_scale.foundation.console import plural, write_json
from karat_scale.foundation.errors import DataError, RecipeError, UserError
from karat_scale.foundation.machine import Gpu, known_gpu, usable_memory
from karat_scale.models import create_model, parameter_count
from karat_scale.recipe import Recipe


@dataclass(frozen=True)
class Request:
    """The options of the command line: `gpu` is a key of the table, `memory` GB of a rank, `step_time` seconds."""

    gpus: int = 1
    gpus_per_node: int = 8
    cores_per_gpu: int = 12
    gpu: str | None = None
    memory: float | None = None
    step_time: float | None = None
    with_curve: bool = False
    only_dry_run: bool = False
    json_file: str | None = None


def plan_recipes(recipes: Sequence[Recipe], request: Request) -> int:
    """Plan recipes and print the plans, or only check them; returns 0, or 1 if a recipe fits nowhere.

    Several plans are printed side by side.

    Raises:
        UserError: a recipe does not fit its data or the world, or a GPU is unknown.
    """
    more = len(recipes) > 1
    if more and request.with_curve:
        raise UserError("--curve takes one recipe; name one, or leave out --curve")
    if more and request.step_time is not None:
        raise UserError("--step-time is of one recipe; name one, or leave out --step-time")
    if request.only_dry_run:
        for recipe in recipes:
            for line in dry_run(recipe, request.gpus):
                print(f"{recipe.run.name}: {line}" if more else line, flush=True)
        return 0
    plans = [make_plan(recipe, request) for recipe in recipes]
    if more:
        show_side_by_side(plans)
    else:
        show(plans[0])
    found = [plan.to_json() for plan in plans]
    write_json(request.json_file, {"plans": found} if more else found[0])
    return 0 if all(plan.choice.fits for plan in plans) else 1


def make_plan(recipe: Recipe, request: Request) -> Plan:
    """Return the whole plan, and print nothing. Raises UserError as `plan_recipes`."""
    gpu = known_gpu(request.gpu) if request.gpu else None
    machine = _machine(recipe, request, gpu)
    has_time = gpu is not None or request.step_time is not None
    if request.with_curve and not has_time and find_measured(recipe, None)[0] is None:
        raise UserError("--curve needs the time of a step; add --gpu NAME, such as h100-80, or --step-time S")
    samples, samples_from = count_samples(recipe.data)
    check_one_batch(samples, recipe.train.global_batch)
    subject = Subject(recipe, machine.on_gpu)
    grid, choice = search(subject, machine)
    a_node = request.gpus_per_node
    node = Node(a_node if request.with_curve else min(a_node, request.gpus), links_of(gpu.key if gpu else ""))
    chosen = recipe.changed(deepspeed__config=choice.config, train__recompute__policy=choice.recompute)
    parameters, micro_batch = subject.sizes.total, choice.micro_batch
    config = load_ds_config(chosen, machine.world, micro_batch)
    time, not_measured = find_time(chosen, subject, gpu, config, request.step_time, Node(a_node, node.links))
    plan = Plan(
        recipe=recipe,
        parameters=parameters,
        frozen=subject.sizes.frozen,
        machine=machine,
        gpu=gpu,
        node=node,
        grid=grid,
        refused=refused_stages(recipe) if recipe.deepspeed.config in STAGES else {},
        choice=choice,
        load=traffic(parameters, config, choice.accumulation, recipe.train.precision),
        time=time,
        not_measured=not_measured,
        samples=samples,
        samples_from=samples_from,
        curve=curve(recipe, parameters, config, micro_batch, time, node) if request.with_curve and time else [],
    )
    if gpu is None or plan.step is None:
        return plan
    rate = recipe.train.global_batch / plan.step
    return replace(plan, data=data_need(recipe, rate, request.gpus, request.cores_per_gpu))


def _machine(recipe: Recipe, request: Request, gpu: Gpu | None) -> Machine:
    if gpu is not None and recipe.run.device == "cpu":
        raise UserError(f"--gpu {gpu.key} has no effect with run.device = cpu; remove one of them")
    if gpu is not None and matrix_peak(recipe.train, gpu.peaks) is None:
        raise UserError(f"train.precision = {recipe.train.precision}: {gpu.key} has no matrix units for it; use fp32")
    if gpu is not None and not gpu.has_triton and recipe.attention.implementation == "triton":
        raise UserError(
            f"attention.implementation = triton: {gpu.key} is older than Ampere, which the kernels need; use auto"
        )
    on_gpu = recipe.run.device != "cpu" and (gpu is not None or request.memory is not None)
    if request.memory is not None:
        memory = int(request.memory * 1e9)
    elif on_gpu and gpu is not None:
        memory = gpu.memory_bytes
    else:
        memory = usable_memory() // min(request.gpus, request.gpus_per_node)
    if recipe.train.precision == "fp16" and not on_gpu:
        raise UserError("train.precision = fp16 needs a GPU; name it by --gpu, or give its memory by --memory")
    return Machine(request.gpus, memory, on_gpu)


PROBED = 2  # images, a pair for mixup


def dry_run(recipe: Recipe, world: int) -> Iterator[str]:
    """Build and check the parts of a run of `world` ranks; yields a line on each part that is right.

    Every rank's part of the first and the last global batch is cut and put together again, two images are read, and
    one goes through the model on the CPU.

    Raises:
        UserError: the first mistake, as the run would report it.
    """
    stage, ranks = zero_stage(load_ds_config(recipe, world, micro_batch_of(recipe, world))), plural(world, "rank")
    yield f"deepspeed.config = {recipe.deepspeed.config}: ZeRO stage {stage}, valid for this recipe on {ranks}"
    data = recipe.data.on_a_cpu().changed(workers=int(recipe.data.is_stream))
    with closing(open_backend(ImageSpec.of(recipe.changed(data=data)))) as backend:
        yield f"data: {backend.num_train:,} training and {backend.num_val:,} validation images"
        notice = unused_classes(backend.num_classes, recipe.model.num_classes)
        counts = f"{backend.num_classes} in the data, {recipe.model.num_classes} in the model"
        yield f"classes: {notice or counts}"
        yield _check_batches(recipe, world, backend)
        ids = np.arange(min(PROBED, backend.num_train), dtype=np.int64)
        batch, size = next(iter(backend.train_batches([BatchSlice(0, 0, ids)]))), recipe.model.image_size
        if tuple(batch.images.shape[1:]) != (3, size, size):
            shape = " x ".join(map(str, batch.images.shape[1:]))
            raise DataError(f"{recipe.data.path}: images come as {shape}, but the model takes 3 x {size} x {size}")
        if int(batch.labels.max()) >= recipe.model.num_classes:
            raise DataError(f"{recipe.data.path}: a label is {int(batch.labels.max())}, beyond model.num_classes")
    yield f"images: {PROBED} read, 3 x {size} x {size}"
    yield _check_model(recipe, batch.images)


def _check_batches(recipe: Recipe, world: int, backend: Backend) -> str:
    """Check the first and the last global batch, cut by every rank; returns a line on all batches."""
    plan = backend.plan(recipe.train.global_batch, micro_batch_of(recipe, world), 0, world, recipe.data.lanes)
    total = total_steps(plan.steps_per_epoch, recipe.train.epochs, recipe.train.max_steps)
    for step in () if plan.lanes else {0, total - 1}:
        epoch, batch = divmod(step, plan.steps_per_epoch)
        order = plan.epoch_order(epoch)
        cut = [part.sample_ids for rank in range(world) for part in replace(plan, rank=rank).cut(order, epoch, batch)]
        whole = order[batch * plan.global_batch : (batch + 1) * plan.global_batch]
        if not np.array_equal(np.concatenate(cut), whole):
            raise RecipeError(
                f"train.global_batch = {plan.global_batch}: the parts of {world} ranks are not the batch; "
                "please report this"
            )
    evaluation = EvalPlan(backend.num_val, recipe.train.eval_batch, 0, world).num_batches
    return (
        f"batches: {plural(total, 'step')} of {plan.global_batch} = {plural(world, 'rank')} x {plan.accumulation} x "
        f"{plan.micro_batch}; an evaluation takes {evaluation:,} of {recipe.train.eval_batch} a rank"
    )


def _check_model(recipe: Recipe, images: torch.Tensor) -> str:
    """Check a forward pass on the CPU; `streaming` replaces `triton`, which needs a GPU, and computes the same."""
    attention = recipe.attention
    if attention.transfer_from:
        raise RecipeError("attention.transfer_from: the teacher is not checked; add attention.transfer_from=")
    if attention.implementation == "triton":
        attention = attention.changed(implementation="streaming")
    torch.manual_seed(recipe.run.seed)
    model = create_model(recipe.model, attention).eval()
    with torch.no_grad():
        try:
            logits = model(Normalize(recipe.augment.mean, recipe.augment.std)(images[:1]))
        except ValueError as error:
            raise RecipeError(f"attention.implementation = {attention.implementation!r}: {error}") from None
    if not torch.isfinite(logits).all():
        raise RecipeError("model: the first image's logits are not finite; use attention.init=variance_preserving")
    return (
        f"model: {parameter_count(model):,} parameters; one image through it on the CPU gives {logits.shape[1]} logits"
    )
