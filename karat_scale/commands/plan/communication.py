"""How fast GPUs exchange data, what a step sends, and how long that takes.

Bandwidths are bytes a second in one direction. Data sheets print NVLink in both directions together: half of that is
here.

Ring all-reduce: each rank sends 2 (W - 1) / W of the bytes in 2 (W - 1) steps; an all-gather or a reduce-scatter half.
A tree sends as much in 2 log2(W) steps (Thakur et al., "Optimization of Collective Communication Operations in MPICH",
2005; NCCL takes the faster). Between nodes all GPUs of a node send at once, each through its share of the network.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from karat_scale.commands.plan.zero import ALL_REDUCE, BUCKET
from karat_scale.engine.deepspeed_config import zero_stage
from karat_scale.engine.precision import PRECISIONS

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
    """The links of the GPU whose key this is, in the servers it is usually sold in."""
    return _BY_FAMILY.get(key.rpartition("-")[0], _PLAIN)


@dataclass(frozen=True)
class Traffic:
    """Bytes that go through collectives in a step, and in how many calls.

    all_reduced: gradients. gathered: weights, each rank its share. scattered: gradients, to each rank its share.
    hidden: the share that runs beside backward passes (DeepSpeed's `overlap_comm`). passes: the share of these.
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
    """What DeepSpeed 0.19 sends in a step of `accumulation` micro batches, under a filled config.

    Gradients and weights travel in the dtype of the weights: fp32, but for `bf16_weights` and `fp16`. Stages 0 and 1
    all-reduce gradients once a step. Stage 2 all-reduces
    each micro batch's (its `reduce_scatter` is an all-reduce of whole buckets), stage 3 scatters them and gathers the
    weights once for each micro batch. Stages 1 and 2 gather the stepped weights once, after the step.
    """
    stage, zero = zero_stage(config), config.get("zero_optimization", {})
    size = PRECISIONS[precision].weights.itemsize * parameters
    overlaps = zero.get("overlap_comm")
    if overlaps is None:
        overlaps = stage == 3
    bucket = int(zero.get("reduce_bucket_size", BUCKET))
    if stage == 0:
        return Traffic(size, 0, 0, math.ceil(parameters / ALL_REDUCE))
    calls = math.ceil(parameters / bucket)
    if stage == 3:
        return Traffic(0, accumulation * size, accumulation * size, 2 * accumulation * calls, float(overlaps))
    reductions = accumulation if stage == 2 else 1
    overlaps = overlaps and not (stage == 1 and precision == "bf16_weights")
    return Traffic(
        all_reduced=reductions * size,
        gathered=size,
        scattered=0,
        calls=reductions * calls + 1,
        hidden=2 * reductions / (2 * reductions + 1) if overlaps else 0.0,
        passes=reductions / accumulation,
    )


def seconds(load: Traffic, world: int, per_node: int, links: Links) -> float:
    """How long a step's collectives take on `world` GPUs, `per_node` on a node, if nothing else runs."""
    if world == 1:
        return 0.0
    across = world > per_node
    # The ring of each network port goes through the whole node: what leaves it is the sum of all ports.
    bandwidth = min(links.within, per_node * links.between) if across else links.within
    latency = LATENCY_BETWEEN if across else LATENCY_WITHIN
    nodes = math.ceil(world / per_node)
    in_ring = 2 * (world - 1)
    in_tree = 2 * (math.ceil(math.log2(nodes)) + min(world, per_node) - 1)
    return load.sent(world) / (REACHED * bandwidth) + load.calls * min(in_ring, in_tree) * latency


def step_seconds(compute: float, load: Traffic, communication: float) -> float:
    """A step: its computation, of which two thirds are backward passes, and the collectives that these do not hide."""
    return compute + max((1 - load.hidden) * communication, communication - 2 / 3 * load.passes * compute)


def compute_seconds(step: float, load: Traffic, communication: float) -> float:
    """The computation in a step of so many seconds: `step_seconds` undone, and not below 0."""
    compute = step - (1 - load.hidden) * communication  # all that can be is hidden
    if load.hidden * communication > 2 / 3 * load.passes * compute:
        compute = (step - communication) / (1 - 2 / 3 * load.passes)
    return max(0.0, compute)
