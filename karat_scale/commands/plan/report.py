"""The text of a plan: how each way to train fits, what the recommended one needs, and how long it takes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from karat_scale.checkpoint.tensor_storage import planned_bytes
from karat_scale.commands.plan.memory import Choice, Machine
from karat_scale.commands.plan.time import ComputeTime, DataNeed, Node, Point, Traffic, seconds, step_seconds
from karat_scale.data.plan import total_steps
from karat_scale.foundation.console import duration, gigabytes, plural, print_table
from karat_scale.foundation.machine import Gpu
from karat_scale.models.flops import Flops, flops_per_image
from karat_scale.recipe import Recipe

SHOWN_MICRO_BATCHES = 6
_TIME_UNKNOWN = "unknown; karat doctor RECIPE times a step here, --gpu estimates one, and --step-time takes yours"


@dataclass(frozen=True)
class Plan:
    """The results of a plan. `grid` holds each configuration's choices by micro batch, `choice` the recommended one.

    parameters: the number of those that learn. frozen: the number of the others. refused: the configurations that
    cannot train the recipe, and why. not_measured: why a run's log could not be used, or "".
    """

    recipe: Recipe
    parameters: int
    frozen: int
    machine: Machine
    gpu: Gpu | None
    node: Node
    grid: dict[str, list[Choice]]
    refused: dict[str, str]
    choice: Choice
    load: Traffic
    time: ComputeTime | None
    not_measured: str
    samples: int
    samples_from: str
    curve: list[Point]
    data: DataNeed | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.recipe.train.global_batch

    @cached_property
    def flops(self) -> Flops:
        """Operations for one image."""
        return flops_per_image(self.recipe.model, self.recipe.attention, self.recipe.train.freeze)

    @property
    def checkpoint_bytes(self) -> int:
        return planned_bytes(self.recipe, self.choice.stage, self.parameters, self.frozen)

    @property
    def communication(self) -> float:
        """Seconds of a step's collectives."""
        return seconds(self.load, self.machine.world, self.node.gpus, self.node.links)

    @property
    def step(self) -> float | None:
        """Seconds of a step."""
        if self.time is None:
            return None
        compute = self.time.seconds(self.choice.micro_batch, self.choice.accumulation)
        return step_seconds(compute, self.load, self.communication)

    @property
    def training(self) -> float | None:
        """Seconds of all steps, if images of each step have the last size, without evaluations."""
        return self.step and self.step * self.steps

    @property
    def left_out(self) -> str:
        """What the seconds of all steps leave out."""
        sizes = self.recipe.schedule.image_sizes
        grown = f", and as if all images had {sizes[-1][1]} px (schedule.image_sizes)" if sizes else ""
        return f"without evaluations{grown}"

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return total_steps(self.steps_per_epoch, self.recipe.train.epochs, self.recipe.train.max_steps)

    def to_json(self) -> dict[str, Any]:
        """Every figure, in bytes and seconds."""
        return {
            "recipe": self.recipe.run.name,
            "parameters": self.parameters,
            "flops_per_image": self.flops._asdict(),
            "checkpoint_bytes": self.checkpoint_bytes,
            "machine": asdict(self.machine),
            "gpu": self.gpu.key if self.gpu else None,
            "fits": self.choice.fits,
            "choice": _to_json(self.choice),
            "refused": self.refused,
            "candidates": [_to_json(choice) for choices in self.grid.values() for choice in choices],
            "communication": {**asdict(self.load), "sent_bytes": self.load.sent(self.machine.world)},
            "seconds": {
                "image": self.time and self.time.image,
                "device": self.time and self.time.device(self.choice.micro_batch, self.choice.accumulation),
                "host": self.time and self.time.host(self.choice.accumulation),
                "from": self.time and self.time.source,
                "communication": self.communication,
                "step": self.step,
                "epoch": self.step and self.step * self.steps_per_epoch,
                "training": self.training,
            },
            "launches": asdict(self.time.launches) if self.time and self.time.launches.step else None,
            "data": self.data and asdict(self.data),
            "samples": self.samples,
            "curve": [asdict(point) for point in self.curve],
        }


def _to_json(choice: Choice) -> dict[str, Any]:
    return {**asdict(choice), "needed": choice.needed, "fits": choice.fits}


def show(plan: Plan) -> None:
    """Print the plan's tables, at most a hundred columns wide."""
    choice, recipe, world = plan.choice, plan.recipe, plan.machine.world
    # Some micro batches: from one above the largest that fits anywhere, if there are enough.
    count = len(next(iter(plan.grid.values())))
    fitting = [number for choices in plan.grid.values() for number, choice in enumerate(choices) if choice.fits]
    first = max(0, min(min(fitting, default=count) - 1, count - SHOWN_MICRO_BATCHES))
    shown = slice(first, first + SHOWN_MICRO_BATCHES)
    sizes = [str(choice.micro_batch) for choice in next(iter(plan.grid.values()))[shown]]
    rows = [
        [config, *(f"{choice.needed / 1e9:.2f}{'' if choice.fits else ' -'}" for choice in choices[shown])]
        for config, choices in plan.grid.items()
    ]
    kind = plan.gpu.key if plan.gpu else ("GPU" if plan.machine.on_gpu else "CPU")
    title = f"GB needed by a rank of {world}, on {kind} with {gigabytes(plan.machine.memory)}"
    note = " (- does not fit)" if any(cell.endswith(" -") for row in rows for cell in row) else ""
    print_table(f"{title}, by micro batch{note}", ["", *sizes], rows)
    for config, refusal in plan.refused.items():
        print(f"  {config} passed over: {refusal}")
    print(f"\n{line(choice, recipe)}")
    parts = {**choice.peak.parts, "context, loader, fragmentation": choice.margin}
    rows = [[name, _gb(size)] for name, size in parts.items() if size]
    if choice.host:
        rows.append(["of it in the CPU's memory", f"-{_gb(choice.host)}"])
    print_table(f"at its worst moment ({choice.peak.moment})", ["part", "GB a rank"], rows)
    blocks = list(choice.peak.blocks.items())
    rows = [
        ["outside blocks" if block < 0 else f"block {block}", _gb(size)]
        for number, (block, size) in enumerate(blocks)
        if not number or size != blocks[number - 1][1]  # only the first of several alike
    ]
    if rows:
        print_table("activations at that moment", ["", "GB each"], rows)
    _show_time(plan)
    if recipe.checkpoint.url:
        print(f"checkpoint.url: each checkpoint copies about {gigabytes(plan.checkpoint_bytes)} there")
    if plan.curve:
        rows = []
        for point in plan.curve:
            strong = "-" if point.strong is None else f"{point.strong:,.0f}"
            rows.append([f"{point.gpus:,}", f"{point.weak:,.0f}", f"{100 * point.efficiency:.1f} %", strong])
        header = ["GPUs", f"{choice.micro_batch} a GPU", "efficiency", f"global batch {recipe.train.global_batch}"]
        print_table(f"predicted images a second, {plan.node.gpus} GPUs a node", header, rows)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size >= 1e7 else "< 0.01"


def _gigas(count: float) -> str:
    return f"{count / 1e9:.2f}" if count >= 1e9 else f"{count / 1e9:.2g}"


def show_side_by_side(plans: Sequence[Plan]) -> None:
    """Print a table with a column for each plan. The numbers in brackets are ratios to the first plan."""
    figures: list[tuple[str, Callable[[Plan], float | None], Callable[[float], str]]] = [
        ("parameters", lambda plan: plan.parameters, lambda count: f"{count:,.0f}"),
        ("GFLOPs of an image, forward", lambda plan: plan.flops.forward, _gigas),
        ("GFLOPs of an image, training", lambda plan: plan.flops.training, _gigas),
        ("memory of a rank", lambda plan: plan.choice.needed, gigabytes),
        ("time of a step", lambda plan: plan.step, duration),
        ("time of all steps", lambda plan: plan.training, duration),
    ]
    ways = [f"{plan.choice.config}, {plan.choice.micro_batch}{'' if plan.choice.fits else ' -'}" for plan in plans]
    rows = [
        ["stage, micro batch (- does not fit)", *ways],
        ["global batch", *(str(plan.recipe.train.global_batch) for plan in plans)],
    ]
    for name, figure, text in figures:
        first, *others = (figure(plan) for plan in plans)
        cells = ["unknown" if first is None else text(first)]
        for value in others:
            share = f" ({value / first:.2f})" if first and value else ""
            cells.append("unknown" if value is None else f"{text(value)}{share}")
        rows.append([name, *cells])
    print_table("plans side by side", ["", *(plan.recipe.run.name for plan in plans)], rows)
    for plan in plans:
        print(f"{plan.recipe.run.name}: {line(plan.choice, plan.recipe)}")
        print(f"  time: {f'{plan.time.source}, {plan.left_out}' if plan.time else _TIME_UNKNOWN}")
        if plan.not_measured:
            print(plan.not_measured)


def line(choice: Choice, recipe: Recipe) -> str:
    """Return the recommendation in a line, and in a second one what evaluations need changed."""
    how = f"deepspeed.config={choice.config} train.micro_batch={choice.micro_batch}"
    if choice.recompute != "none":
        how += f" train.recompute.policy={choice.recompute}"
    needed, available, asked, note = gigabytes(choice.needed), gigabytes(choice.available), recipe.train.eval_batch, ""
    if not choice.fits:
        return f"nothing fits into {available}; the least is {needed}, with {how}"
    if choice.eval_batch < asked:
        how += f" train.eval_batch={choice.eval_batch}"
        note = f"\nan evaluation with train.eval_batch = {asked} does not fit; {choice.eval_batch} does"
    return f"recommended: {how} ({choice.accumulation} a step): {needed} of {available}{note}"


def _show_time(plan: Plan) -> None:
    print()
    if sent := plan.load.sent(plan.machine.world):
        share = f", {100 * plan.load.hidden:.0f} % of it beside" if plan.load.hidden else " after"
        took = f"{duration(plan.communication)}{share} the backward pass"
        print(f"communication: each rank sends {gigabytes(sent)} a step, {took}")
    has_kernels = any(own.has_functions and own.is_modular_series for own in plan.recipe.attention.sections)
    if plan.gpu is not None and not plan.gpu.has_triton and has_kernels:
        print(f"{plan.gpu.key} is older than Ampere and cannot run the Triton kernels, so KArAt is slower than planned")
    if plan.not_measured:
        print(plan.not_measured)
    if plan.step is None or plan.time is None:
        print(f"time: {_TIME_UNKNOWN}")
        return
    rate = plan.recipe.train.global_batch / plan.step
    epoch = plan.step * plan.steps_per_epoch
    is_cut = plan.steps < plan.steps_per_epoch * plan.recipe.train.epochs
    whole = plural(plan.steps, "step") if is_cut else plural(plan.recipe.train.epochs, "epoch")
    print(f"time: {duration(plan.step)} a step, {rate:,.0f} images a second ({plan.time.source});")
    print(f"  {duration(epoch)} an epoch of {plan.samples:,} images ({plan.samples_from});")
    print(f"  {duration(plan.step * plan.steps)} for {whole}, {plan.left_out}")
    if note := launch_note(plan):
        print(note)
    for text in plan.data.lines() if plan.data else ():
        print(text)


def launch_note(plan: Plan) -> str:
    """Return what to change if the GPU waits for launches, else ""."""
    micro_batch, accumulation = plan.choice.micro_batch, plan.choice.accumulation
    if plan.time is None or not plan.time.is_bound_by_launches(micro_batch, accumulation):
        return ""
    host, device = plan.time.host(accumulation), plan.time.device(micro_batch, accumulation)
    kernels = accumulation * plan.time.launches.micro_batch + plan.time.launches.step
    images = plan.time.least_micro_batch(accumulation)
    part, even = plan.recipe.train.global_batch // plan.machine.world, plan.recipe.augment.mixes
    fits = [m for m in range(images, part + 1) if part % m == 0 and not (even and m % 2)]
    fix = f"train.micro_batch={fits[0] if fits else images}"
    if not fits:
        fix += f" train.global_batch={images * plan.machine.world} (which is another training)"
    fix += " would end that"
    if accumulation == 1 and plan.choice.stage < 3 and not plan.recipe.train.records_graphs:
        fix += ",\n  and so would train.compile=reduce-overhead"
    return (
        f"bound by launches: the host takes {duration(host)} to launch {kernels:,} kernels, the GPU {duration(device)} "
        f"to run them;\n  {fix}"
    )
