"""An estimate of a step's time on 1 to 1,024 GPUs: docs/scaling.md explains the model and what it misses.

The time of one GPU and its host is estimated from operations, bytes and kernels. Or it is taken from the log of a run
whose recipe is the same in all keys that set the speed. Communication takes the bytes that a step sends, over the
bandwidths between GPUs. For the data path one core of this machine is timed, and the others are counted.

Bandwidths are bytes a second in one direction. Data sheets give NVLink's for both directions together; half of that is
used here.

Ring all-reduce: each rank sends 2 (W - 1) / W of the bytes in 2 (W - 1) steps; an all-gather or a reduce-scatter half.
A tree sends as much in 2 log2(W) steps (Thakur et al., "Optimization of Collective Communication Operations in MPICH",
2005; NCCL takes the faster). Between nodes all GPUs of a node send at once, each through its share of the network.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from karat_scale.commands.measure.loading import images_per_second
from karat_scale.commands.plan.memory import Footprint, Subject, micro_batches, written_by_rows
from karat_scale.commands.plan.tracing import Launches
from karat_scale.commands.plan.zero import ALL_REDUCE, BUCKET, PERSISTENT, overlaps_collectives
from karat_scale.data.plan import micro_batch_of, possible_micro_batch
from karat_scale.engine.deepspeed_config import load_ds_config, offloads_optimizer, zero_stage
from karat_scale.engine.engine import PRECISIONS, matrix_peak
from karat_scale.engine.reporting.progress import read_events
from karat_scale.foundation.console import plural
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.machine import Gpu, find_gpu
from karat_scale.models.factory import layer_sizes
from karat_scale.models.flops import flops_per_image
from karat_scale.models.recompute import choices_by_rule
from karat_scale.recipe import Recipe, TrainConfig
from karat_scale.recipe.loading import flatten
from karat_scale.training.run_directory import RunDirectory

# Fitted to three measured models on one card, and tested on others: docs/scaling.md.
MATRIX_EFFICIENCY = 0.75
TRAFFIC_PER_BYTE = 3.0
BANDWIDTH_EFFICIENCY = 0.75

# Seconds of one Python thread for an operation of eager torch that launches a kernel: the operation itself (about 6 us
# with autograd: pytorch/pytorch issues 41383 and 122029), the views and autocast's look-ups around it, the modules' own
# Python, and the driver's launch (1.3 us: meta-pytorch/tritonbench pull request 1016). Public accounts of the whole
# range from 5 to 25 us; a slow or busy CPU is at the upper end.
EAGER_LAUNCH = 10e-6
# The seconds of a kernel in torch.compile's code, and of entering one of its graphs: the same pull request.
COMPILED_LAUNCH, GRAPH_ENTRY = 6.5e-6, 33e-6
# Seconds between the end of one kernel and the work of the next on the GPU, launched ahead or in a CUDA graph. NVIDIA's
# introduction to CUDA graphs has 3.4 to 3.8 us a kernel of 2.9 us; the rest is filling and draining the GPU.
KERNEL_GAP = 1.5e-6
# Kernels of a step besides the model's, as counted on our engine: clipping, the fused AdamW, the EMA; at stage 0 that
# is all. From stage 1 on there are DeepSpeed's casts of masters and its clipping of each parameter group too, and each
# bucket is put together, divided and taken apart.
STEP_KERNELS, STEP_KERNELS_FROM_STAGE_1, PER_BUCKET = 40, 50, 3
# With `contiguous_gradients`, DeepSpeed copies each gradient into a bucket, and once more where it is kept. At stages 1
# and 2 it widens 16-bit gradients one by one. With offload it also takes norms one by one. At stage 3 it assembles each
# weight that it gathers.
PER_GRADIENT, PER_OFFLOADED, PER_GATHERED = 1.5, 4.5, 1.0


@dataclass(frozen=True)
class StepLaunches:
    """Kernels of a micro batch, further kernels of a step, the host's seconds for both, and those between two."""

    micro_batch: int
    step: int
    host_micro_batch: float
    host_step: float
    gap: float = KERNEL_GAP

    @classmethod
    def of(
        cls, launches: Launches, train: TrainConfig, config: Mapping[str, Any], sizes: Sequence[int], blocks: int
    ) -> "StepLaunches":
        """Return the launches under `train.compile` and a DeepSpeed config. sizes: the elements of each parameter."""
        model = launches.kernels(bool(train.compile))
        stage, zero = zero_stage(config), config.get("zero_optimization", {})
        reductions = gathers = 0.0
        if stage > 0:
            reductions = PER_BUCKET * math.ceil(sum(sizes) / int(zero.get("reduce_bucket_size", BUCKET)))
            if offloads_optimizer(config):
                reductions += PER_OFFLOADED * len(sizes)
            elif zero.get("contiguous_gradients", True) or (train.holds_16_bits and stage < 3):
                reductions += PER_GRADIENT * len(sizes)
        if stage == 3:
            kept_whole = int(zero.get("stage3_param_persistence_threshold", PERSISTENT))
            gathers = PER_GATHERED * sum(size > kept_whole for size in sizes)
        around = round(gathers + (reductions if stage > 1 else 0))
        step = round((STEP_KERNELS_FROM_STAGE_1 if stage else STEP_KERNELS) + (reductions if stage == 1 else 0))
        if train.records_graphs:  # one each for forward and backward
            host = 2 * GRAPH_ENTRY
        elif train.compile:  # each block by itself
            host = 2 * blocks * GRAPH_ENTRY + model * COMPILED_LAUNCH
        else:
            host = model * EAGER_LAUNCH
        return cls(model + around, step, host + around * EAGER_LAUNCH, step * EAGER_LAUNCH)

    def gaps(self, accumulation: int) -> float:
        """Seconds of a step that the GPU spends between kernels."""
        return self.gap * (accumulation * self.micro_batch + self.step)

    def host(self, accumulation: int) -> float:
        """Seconds that the host takes to launch a step."""
        return accumulation * self.host_micro_batch + self.host_step


@dataclass(frozen=True)
class ComputeTime:
    """The time of a rank's step without collectives, and where the figures come from.

    image: seconds of the GPU's work on an image, forward and backward. launches: none if `image` is of a measured
    micro batch, and includes their cost.
    """

    image: float
    source: str
    launches: StepLaunches = StepLaunches(0, 0, 0.0, 0.0)

    def scaled(self, factor: float, source: str) -> "ComputeTime":
        """Return a time of which each part takes `factor` times as long."""
        own = self.launches
        micro_batch, step, gap = (factor * part for part in (own.host_micro_batch, own.host_step, own.gap))
        launches = StepLaunches(own.micro_batch, own.step, micro_batch, step, gap)
        return ComputeTime(factor * self.image, source, launches)

    def device(self, images: int, accumulation: int) -> float:
        """Seconds of the GPU on a step of `accumulation` micro batches of `images`, if the host is ahead of it."""
        return accumulation * images * self.image + self.launches.gaps(accumulation)

    def host(self, accumulation: int) -> float:
        """Seconds of the host to launch it all."""
        return self.launches.host(accumulation)

    def seconds(self, images: int, accumulation: int) -> float:
        """Return the seconds of a step: host and GPU work at once, and the slower of them sets the time."""
        return max(self.device(images, accumulation), self.host(accumulation))

    def is_bound_by_launches(self, images: int, accumulation: int) -> bool:
        """Whether the GPU waits for the host."""
        return self.host(accumulation) > self.device(images, accumulation)

    def least_micro_batch(self, accumulation: int) -> int:
        """The smallest power of two of images that keeps the GPU as busy as the host."""
        idle = max(self.host(accumulation) - self.device(0, accumulation), 0.0)
        return int(2 ** math.ceil(math.log2(max(idle / (accumulation * self.image), 1.0))))


def estimate(
    recipe: Recipe,
    gpu: Gpu,
    footprint: Footprint,
    config: Mapping[str, Any],
    parameters: Sequence[int],
    teacher_flops: int = 0,
) -> ComputeTime:
    """Estimate matrix products at a share of the peak, all else at a share of the memory's bandwidth, and launches.

    Each byte that a pass allocates is written once and read about twice. The GPU must have the recipe's precision.
    footprint: that of a training step. config: DeepSpeed's, filled. parameters: the elements of each tensor that
    learns. Blocks that recompute take their forward pass's products twice; recomputed attention alone counts once.
    teacher_flops: the operations of a teacher's forward pass for an image, of which only matrix products count.
    """
    peak = matrix_peak(recipe.train, gpu.peaks)
    assert peak is not None
    depth = len(layer_sizes(recipe.model))
    recomputed = choices_by_rule(recipe.train.recompute, depth).count("block") / depth
    model = flops_per_image(recipe.model, recipe.attention, recipe.train.freeze)
    flops = model.training + recomputed * model.forward + teacher_flops
    products = flops / (MATRIX_EFFICIENCY * peak)
    written = footprint.written(2) - footprint.written(1) + written_by_rows(recipe, on_gpu=True)
    moved = TRAFFIC_PER_BYTE * written / (BANDWIDTH_EFFICIENCY * gpu.bandwidth)
    launches = StepLaunches.of(footprint.launches, recipe.train, config, parameters, depth)
    return ComputeTime(products + moved, "estimated from operations, bytes and launches", launches)


GB = 1e9
# Bytes a second of PCIe 4.0 and 5.0 with 16 lanes, in one direction.
PCIE_4, PCIE_5 = 32 * GB, 64 * GB


@dataclass(frozen=True)
class Links:
    """`within`: a GPU's bandwidth to its node's others. `between`: its share of the node's network, one direction."""

    within: float
    between: float


# The share of the peak that NCCL reaches by rings: its maintainers state 370 of an H100's 450 GB/s (NVIDIA/nccl-tests
# issue 212). All-reduce through the switches themselves (NVLink SHARP) is faster, about 480, and is not counted on.
REACHED = 0.8
# Seconds a step of a ring or a tree takes however little it carries; NCCL's tuning tables (src/graph/tuning.cc) have
# 3.4 us a step of its simple protocol within a node, and 14 us across a network.
LATENCY_WITHIN, LATENCY_BETWEEN = 3.4e-6, 14e-6

# By the first word of a GPU's key. Data sheets: HGX B200 (NVLink 1.8 TB/s), H100 and H200 (900 GB/s), A100 (600 GB/s);
# DGX B200, H100 (8 x 400 Gb/s) and A100 (8 x 200 Gb/s) user guides for their networks.
_BY_FAMILY = {
    "b200": Links(900 * GB, 50 * GB),
    "gh200": Links(450 * GB, 50 * GB),
    "h200": Links(450 * GB, 50 * GB),
    "h100": Links(450 * GB, 50 * GB),
    "h100-pcie": Links(PCIE_5, 25 * GB),
    "h100-nvl": Links(PCIE_5, 25 * GB),
    "a100": Links(300 * GB, 25 * GB),
    "a100-pcie": Links(PCIE_4, 12.5 * GB),
    "v100": Links(150 * GB, 3.1 * GB),  # DGX-1: four ports of 100 Gb/s for eight
}
# No NVLink: PCIe, and a node of four or eight with two ports of 100 Gb/s.
_PLAIN = Links(PCIE_4, 3.1 * GB)


def links_of(key: str) -> Links:
    """Return the links of the GPU with this key, in the servers in which it is usually sold."""
    return _BY_FAMILY.get(key.rpartition("-")[0], _PLAIN)


@dataclass(frozen=True)
class Traffic:
    """Bytes that go through collectives in a step, and in how many calls.

    all_reduced: gradients. gathered: weights, of which each rank has its share. scattered: gradients, of which each
    rank gets its share. hidden: the share of traffic that runs during backward passes (DeepSpeed's `overlap_comm`).
    passes: the share of backward passes that have such traffic.
    """

    all_reduced: float
    gathered: float
    scattered: float
    calls: int
    hidden: float = 0.0
    passes: float = 1.0

    def sent(self, world: int) -> float:
        """Bytes that each of `world` ranks sends."""
        return (2 * self.all_reduced + self.gathered + self.scattered) * (world - 1) / world


def traffic(parameters: int, config: Mapping[str, Any], accumulation: int, precision: str) -> Traffic:
    """Return what DeepSpeed 0.19 sends in a step of `accumulation` micro batches, under a filled config.

    Gradients and weights travel in the dtype of the weights: fp32, except for `bf16_weights` and `fp16`. Stages 0 and 1
    all-reduce gradients once a step. Stage 2 all-reduces each micro batch's (its `reduce_scatter` is an all-reduce of
    whole buckets), stage 3 scatters them and gathers the weights once for each micro batch. Stages 1 and 2 gather the
    stepped weights once, after the step.
    """
    stage, zero = zero_stage(config), config.get("zero_optimization", {})
    size = PRECISIONS[precision].weights.itemsize * parameters
    overlaps = overlaps_collectives(config)
    if stage == 0:
        return Traffic(size, 0, 0, math.ceil(parameters / ALL_REDUCE))
    calls = math.ceil(parameters / int(zero.get("reduce_bucket_size", BUCKET)))
    if stage == 3:
        return Traffic(0, accumulation * size, accumulation * size, 2 * accumulation * calls, float(overlaps))
    reductions = accumulation if stage == 2 else 1
    overlaps = overlaps and not (stage == 1 and precision == "bf16_weights")
    hidden = 2 * reductions / (2 * reductions + 1) if overlaps else 0.0
    return Traffic(reductions * size, size, 0, reductions * calls + 1, hidden, reductions / accumulation)


def seconds(load: Traffic, world: int, per_node: int, links: Links) -> float:
    """Return the seconds of a step's collectives on `world` GPUs, `per_node` on a node, if nothing else runs."""
    if world == 1:
        return 0.0
    across = world > per_node
    # The ring of each network port goes through the whole node, so the node sends over all ports at once.
    bandwidth = min(links.within, per_node * links.between) if across else links.within
    latency = LATENCY_BETWEEN if across else LATENCY_WITHIN
    nodes = math.ceil(world / per_node)
    in_ring = 2 * (world - 1)
    in_tree = 2 * (math.ceil(math.log2(nodes)) + min(world, per_node) - 1)
    return load.sent(world) / (REACHED * bandwidth) + load.calls * min(in_ring, in_tree) * latency


def step_seconds(compute: float, load: Traffic, communication: float) -> float:
    """Return a step's seconds: computation, two thirds of it backward passes, and collectives that they do not hide."""
    return compute + max((1 - load.hidden) * communication, communication - 2 / 3 * load.passes * compute)


def compute_seconds(step: float, load: Traffic, communication: float) -> float:
    """Return the seconds of computation in a step of `step` seconds: the inverse of `step_seconds`, never below 0."""
    compute = step - (1 - load.hidden) * communication  # all that can be is hidden
    if load.hidden * communication > 2 / 3 * load.passes * compute:
        compute = (step - communication) / (1 - 2 / 3 * load.passes)
    return max(0.0, compute)


GPUS = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class Node:
    """The number of GPUs of a node, and the links between GPUs."""

    gpus: int
    links: Links


@dataclass(frozen=True)
class Point:
    """A number of GPUs, and images a second.

    weak: the rate if each GPU has the same micro batch, so that the global batch grows. efficiency: that rate over
    `gpus` times the rate of one GPU. strong: the rate if all share the recipe's global batch; None if it does not
    divide, or only into parts that are too large.
    """

    gpus: int
    weak: float
    efficiency: float
    strong: float | None


def curve(
    recipe: Recipe, parameters: int, config: Mapping[str, Any], micro_batch: int, time: ComputeTime, node: Node
) -> list[Point]:
    """Return a point for each of GPUS. config: DeepSpeed's, filled. time: the time of one GPU on a micro batch."""

    def rate(gpus: int, images: int, accumulation: int) -> float:
        load = traffic(parameters, config, accumulation, recipe.train.precision)
        communication = seconds(load, gpus, node.gpus, node.links)
        return gpus * images * accumulation / step_seconds(time.seconds(images, accumulation), load, communication)

    def strong(gpus: int) -> float | None:
        shared = recipe.changed(train__micro_batch=None)
        sizes = micro_batches(shared, gpus) if possible_micro_batch(shared, gpus) else ()
        images = next((size for size in sizes if size <= micro_batch), None)
        return rate(gpus, images, recipe.train.global_batch // gpus // images) if images else None

    weak = {gpus: rate(gpus, micro_batch, 1) for gpus in GPUS}
    return [Point(gpus, weak[gpus], weak[gpus] / (gpus * weak[1]), strong(gpus)) for gpus in GPUS]


# One core reads, decodes and augments batches of _BATCH images for about _SECONDS.
_BATCH, _SECONDS = 16, 2.0
# Cores that trainers, their loaders and the system use themselves, for each GPU.
_OTHER_CORES = 1


@dataclass(frozen=True)
class DataNeed:
    """The images a second that the GPUs take and that cores make.

    Attributes:
        needed: the rate that all GPUs together take.
        per_core: the rate of one core of this machine; None if it could not be timed.
        cores: the cores of all GPUs together, without those that other work needs.
        why: the reason where nothing was timed.
        on_device: whether the GPU augments already.
    """

    needed: float
    per_core: float | None
    cores: int
    why: str = ""
    on_device: bool = False

    @property
    def is_bound(self) -> bool:
        """Whether the GPUs would wait for data."""
        return self.per_core is not None and self.needed > self.per_core * self.cores

    def lines(self) -> list[str]:
        """Return what to print."""
        if self.per_core is None:
            return [f"data: not timed here{f': {self.why}' if self.why else ''}"]
        need = f"the GPUs take {self.needed:,.0f} images a second, a core of this machine makes {self.per_core:,.0f},"
        if not self.is_bound:
            busy = f"{self.needed / self.per_core:,.1f} of {self.cores} cores are busy"
            return [f"data: {need}", f"  so {busy}: training does not wait for data"]
        advice = ["more cores (--cores-per-gpu)", "smaller images (karat prepare webdataset --resize)"]
        if not self.on_device:
            advice.insert(0, "augment.run_on=device")
        return [
            f"BOUND BY DATA: {need}",
            f"  and {self.cores} cores make {self.per_core * self.cores:,.0f};",
            f"  use {', '.join(advice[:-1])} or {advice[-1]}",
        ]


def data_need(recipe: Recipe, needed: float, gpus: int, cores_per_gpu: int) -> DataNeed:
    """Time one core on the recipe's training data, if they are here, and compare."""
    cores = gpus * max(cores_per_gpu - _OTHER_CORES, 1)
    on_device = recipe.augment.run_on == "device"
    if recipe.data.row.files is None:
        return DataNeed(needed, None, cores, "synthetic images are not read")
    try:
        rate = images_per_second(recipe, recipe.data.fewest_workers, _BATCH, _SECONDS)
    except UserError as error:
        return DataNeed(needed, None, cores, f"{str(error).partition(';')[0]}", on_device)
    return DataNeed(needed, rate, cores, on_device=on_device)


# The keys that set the speed of a rank; a section stands for all its keys.
SPEED_KEYS = (
    *("model", "attention", "optim.name", "augment.run_on", "distill.from"),
    *("train.precision", "train.tf32", "train.compile", "train.freeze", "train.recompute"),
)


@dataclass(frozen=True)
class Measured:
    """A run of `recipe` by `world` ranks: its DeepSpeed config, filled, and images a second, collectives included."""

    recipe: Recipe
    world: int
    config: Mapping[str, Any]
    rate: float
    source: str

    @property
    def micro_batch(self) -> int:
        return int(self.config["train_micro_batch_size_per_gpu"])

    @property
    def accumulation(self) -> int:
        """Micro batches of a step."""
        return int(self.config["gradient_accumulation_steps"])

    def compute_seconds(self, parameters: int, node: Node) -> float:
        """Return the seconds of a step without the collectives of the run's own world, as the plan counts them.

        A plan for that world adds them again, and arrives at the measured time; a plan for another world adds its own.
        """
        train = self.recipe.train
        load = traffic(parameters, self.config, self.accumulation, train.precision)
        communication = seconds(load, self.world, node.gpus, node.links)
        return compute_seconds(train.global_batch / self.rate, load, communication)


def find_measured(recipe: Recipe, gpu: Gpu | None) -> tuple[Measured | None, str]:
    """Return the run in the recipe's own directory on this GPU (None: a CPU), with the median of its last 100 rates.

    The rates are of one start, the last that has any. Without such a run, the first is None; the second is why a run
    that is there says nothing about this recipe, else "".
    """
    directory = RunDirectory(recipe.run.dir)
    starts: list[tuple[dict[str, Any], list[float]]] = []
    for event in read_events(directory.metrics_file):
        if event.get("event") == "start":
            starts.append((event, []))
        elif starts and event.get("event") == "train" and (rate := event.get("images_per_second")):
            starts[-1][1].append(float(rate))
    last = next((one for one in reversed(starts) if one[1]), None)
    if last is None:
        return None, ""
    start, rates = last
    refused = f"what {directory.path} measured is not used: "
    device, world = str(start.get("device", "")), start.get("world_size")
    if not world:
        return None, f"{refused}an earlier version wrote its events, which do not say on what it ran"
    if find_gpu(device) is not gpu if gpu else not device.startswith("CPU"):
        return None, f"{refused}it ran on {device}"
    try:
        old = directory.recipe()
        if old.deepspeed.config == recipe.deepspeed.config:  # the user names the file too, so it may be read
            old = old.changed(deepspeed=recipe.deepspeed)
        before, after = flatten(old), flatten(recipe)
        speed = tuple(f"{key}." for key in SPEED_KEYS)
        if keys := [key for key in after if before.get(key) != after[key] and f"{key}.".startswith(speed)]:
            value, more = before.get(keys[0]), f", and {len(keys) - 1} more" if keys[1:] else ""
            return None, f"{refused}it ran with {keys[0]} = {'(empty)' if value == '' else value}{more}"
        if old.schedule.image_sizes:
            return None, f"{refused}its images grew (schedule.image_sizes), and its rates with them"
        config = load_ds_config(old, int(world), micro_batch_of(old, int(world)))
        source = f"measured in {directory.path} on {device}"
        return Measured(old, int(world), config, statistics.median(rates[-100:]), source), ""
    except UserError as error:
        return None, f"{refused}{error}"


def find_time(
    recipe: Recipe, subject: Subject, gpu: Gpu | None, config: Mapping[str, Any], step_time: float | None, node: Node
) -> tuple[ComputeTime | None, str]:
    """Return the time by `step_time`, else by the recipe's run, else an estimate; and why no run could be used, or "".

    A run's time is exact for its own micro batch. For another one, the estimate is scaled to agree with the run.

    recipe, config: the way to train that the plan recommends. step_time: seconds of a micro batch.
    """
    if step_time is not None:
        micro_batch = config["train_micro_batch_size_per_gpu"]
        return ComputeTime(step_time / micro_batch, f"from --step-time, of {micro_batch} images"), ""
    run, why = find_measured(recipe, gpu)
    step = run.compute_seconds(subject.sizes.total, node) if run else 0.0
    if run and step == 0:
        run = None
        why = (
            f"what {RunDirectory(recipe.run.dir).path} measured is not used: with --gpus-per-node {node.gpus}, its "
            "collectives alone would take longer than its steps did; if a node of that run had more, give their number"
        )
    if gpu is None:
        return ComputeTime(step / (run.accumulation * run.micro_batch), run.source) if run else None, why
    if subject.recipe.train.recompute != recipe.train.recompute:
        subject = Subject(recipe, subject.on_gpu)
    estimated = partial(estimate, recipe, gpu, subject.footprint)
    more = subject.sizes.each, subject.teacher.flops
    time = estimated(config, *more)
    if run is None:
        return time, why
    source = run.source
    if config["train_micro_batch_size_per_gpu"] != run.micro_batch:
        source += f" with {plural(run.micro_batch, 'image')} a micro batch, and scaled like the estimate"
    return time.scaled(step / estimated(run.config, *more).seconds(run.micro_batch, run.accumulation), source), ""
