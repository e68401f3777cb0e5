"""`karat plan`: will it fit, on which stage, how long will it take, and what is wrong with it."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from karat_scale.commands.plan.choose import (
    STAGES,
    Choice,
    Machine,
    choose,
    consider,
    micro_batches,
    preferred,
    recommended,
    refused_stages,
    usable,
)
from karat_scale.commands.plan.dry_run import dry_run
from karat_scale.commands.plan.report import Plan, show
from karat_scale.commands.plan.subject import Subject
from karat_scale.commands.plan.time import (
    ComputeTime,
    Measured,
    Node,
    curve,
    data_need,
    estimate,
    find_measured,
    links_of,
    traffic,
)
from karat_scale.commands.plan.tracing import count_samples
from karat_scale.engine.deepspeed_config import load_ds_config
from karat_scale.engine.engine import matrix_peak
from karat_scale.foundation.console import work_display, write_json
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.machine import Gpu, known_gpu, usable_memory
from karat_scale.recipe import Recipe
from karat_scale.recipe.loading import load_recipe


@dataclass(frozen=True)
class Request:
    """What the command line asks for: `gpu` a key of the table, `memory` GB of a rank, `step_time` seconds."""

    gpus: int = 1
    gpus_per_node: int = 8
    cores_per_gpu: int = 12
    gpu: str | None = None
    memory: float | None = None
    step_time: float | None = None
    with_curve: bool = False
    only_dry_run: bool = False
    json_file: str | None = None


def plan_recipe(source: str, overrides: Sequence[str], request: Request) -> int:
    """Plan a recipe and print the plan, or only check it; returns 0, or 1 where nothing fits.

    Raises:
        UserError: the recipe is wrong, does not fit its data or the world, or a GPU is unknown.
    """
    recipe = load_recipe(source, overrides)
    if request.only_dry_run:
        for line in dry_run(recipe, request.gpus):
            print(line, flush=True)
        return 0
    plan = make_plan(recipe, request)
    show(plan)
    write_json(request.json_file, plan.to_json())
    return 0 if plan.choice.fits else 1


def make_plan(recipe: Recipe, request: Request) -> Plan:
    """The whole plan, nothing printed. Raises UserError as `plan_recipe`."""
    gpu = known_gpu(request.gpu) if request.gpu else None
    machine = _machine(recipe, request, gpu)
    has_time = gpu is not None or request.step_time is not None or isinstance(find_measured(recipe, None), Measured)
    if request.with_curve and not has_time:
        raise UserError("--curve needs --gpu with a name that the table has, or --step-time")
    subject = Subject(recipe, machine.on_gpu)
    own = recipe.deepspeed.config
    configs = usable(recipe, STAGES if own in STAGES else [own])
    sizes = list(micro_batches(recipe, machine.world))
    grid = _consider_all(subject, machine, configs, sizes)
    choice = recommended(map(preferred, grid.values()))
    if not choice.fits:
        choice = choose(recipe, machine, configs)
    node = Node(
        min(request.gpus_per_node, request.gpus) if not request.with_curve else request.gpus_per_node,
        links_of(gpu.key if gpu else ""),
    )
    chosen = recipe.changed(deepspeed__config=choice.config, train__recompute__policy=choice.recompute)
    config = load_ds_config(chosen, machine.world, choice.micro_batch)
    found = None if request.step_time is not None else find_measured(chosen, gpu)
    if isinstance(found, Measured):
        time: ComputeTime | None = found.compute_time(subject.sizes.total, Node(request.gpus_per_node, node.links))
    else:
        time = _compute_time(request, gpu, subject, choice, config)
    points = []
    if request.with_curve and time is not None:
        points = curve(recipe, subject.sizes.total, config, choice.micro_batch, time, node)
    samples, samples_from = count_samples(recipe.data)
    plan = Plan(
        recipe=recipe,
        parameters=subject.sizes.total,
        machine=machine,
        gpu=gpu,
        node=node,
        grid=grid,
        refused={} if own not in STAGES else refused_stages(recipe),
        choice=choice,
        load=traffic(subject.sizes.total, config, choice.accumulation, recipe.train.precision),
        time=time,
        not_measured=found if isinstance(found, str) else "",
        samples=samples,
        samples_from=samples_from,
        curve=points,
    )
    if gpu is None or plan.step is None:
        return plan
    rate = recipe.train.global_batch / plan.step
    return replace(plan, data=data_need(recipe, rate, request.gpus, request.cores_per_gpu))


def _consider_all(
    subject: Subject, machine: Machine, configs: Sequence[str], sizes: Sequence[int]
) -> dict[str, list[Choice]]:
    """Return the choices of each configuration, by micro batch."""
    grid: dict[str, list[Choice]] = {config: [] for config in configs}
    with work_display() as show_work:
        for number, (config, size) in enumerate(itertools.product(configs, sizes)):
            show_work("plan each stage and micro batch", number, len(configs) * len(sizes))
            grid[config].append(consider(subject, machine, config, size))
    return grid


def _machine(recipe: Recipe, request: Request, gpu: Gpu | None) -> Machine:
    if gpu is not None and matrix_peak(recipe.train, gpu.peaks) is None:
        raise UserError(f"train.precision = {recipe.train.precision}: {gpu.key} has no such matrix units; use fp32")
    on_gpu = recipe.run.device != "cpu" and (gpu is not None or request.memory is not None)
    if request.memory is not None:
        memory = int(request.memory * 1e9)
    elif on_gpu and gpu is not None:
        memory = gpu.memory_bytes
    else:
        memory = usable_memory() // request.gpus
    if recipe.train.precision == "fp16" and not on_gpu:
        raise UserError("train.precision = fp16 needs a GPU; name it by --gpu, or give its memory by --memory")
    return Machine(request.gpus, memory, on_gpu)


def _compute_time(
    request: Request, gpu: Gpu | None, subject: Subject, choice: Choice, config: Mapping[str, Any]
) -> ComputeTime | None:
    if request.step_time is not None:
        return ComputeTime(request.step_time / choice.micro_batch, f"from --step-time, of {choice.micro_batch} images")
    if gpu is None:
        return None
    return estimate(subject.recipe, gpu, subject.footprint(), config, subject.sizes.each, subject.teacher.flops)
