"""How many kernels a step launches, and how long the host takes to launch them.

A kernel that runs for less time than its launch takes leaves the GPU waiting. Counts come from the trace; the times are
published ones.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from karat_scale.commands.plan.zero import BUCKET, PERSISTENT
from karat_scale.engine.deepspeed_config import offloads_optimizer, zero_stage
from karat_scale.recipe import TrainConfig

# Seconds of one Python thread for an operation of eager torch that launches a kernel: the operation itself (about 6 us
# with autograd: pytorch/pytorch issues 41383 and 122029), the views and autocast's look-ups around it, the modules' own
# Python, and the driver's launch (1.3 us: meta-pytorch/tritonbench pull request 1016). Public accounts of the whole
# range from 5 to 25 us; a slow or busy CPU is at the upper end.
EAGER_LAUNCH = 10e-6
# Of a kernel in torch.compile's code, and of entering one of its graphs: the same pull request.
COMPILED_LAUNCH, GRAPH_ENTRY = 6.5e-6, 33e-6
# Seconds between the end of one kernel and the work of the next on the GPU, launched ahead or in a CUDA graph. NVIDIA's
# introduction to CUDA graphs has 3.4 to 3.8 us a kernel of 2.9 us; the rest is filling and draining the GPU.
KERNEL_GAP = 1.5e-6

# Kernels of an operation, where they are not one. A norm's backward pass reduces its weights' gradients apart;
# attention's multiplies O by its gradient before, and rounds the query's gradient after.
_KERNELS = {
    "native_layer_norm_backward": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
    "convolution_backward": 3,
}
# Of KArAt's own operations, which have one name each for the forward and the backward pass. The backward pass of
# psi(A) V, of the content form, ends with a sum.
OPERATOR_FORWARD, OPERATOR_BACKWARD = 2, 5
PSI_FORWARD, PSI_BACKWARD = 1, 3
# What torch.compile leaves as kernels of their own.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
_ATTENTION = "_scaled_dot_product"

# Kernels of a step beside the model's, as counted on our engine: clipping, the fused AdamW, the EMA; at stage 0 that is
# all. From stage 1 on there are DeepSpeed's casts of masters and its clipping of each parameter group too, and each
# bucket is put together, divided and taken apart.
STEP_KERNELS, STEP_KERNELS_FROM_STAGE_1, PER_BUCKET = 40, 50, 3
# With `contiguous_gradients`, DeepSpeed copies each gradient into a bucket, and where it is kept once more; 16-bit ones
# of stages 1 and 2 it widens one by one. With offload it also takes norms one by one. At stage 3 it puts each weight
# together that it gathers.
PER_GRADIENT, PER_OFFLOADED, PER_GATHERED = 1.5, 4.5, 1.0


@dataclass(frozen=True)
class Launches:
    """Kernels of a forward and backward pass: products (attention included), and all others, mostly elementwise."""

    products: int
    others: int

    @classmethod
    def of(cls, operations: Iterable[Any]) -> "Launches":
        """Of operations of the dispatcher (`OpOverload`) that each launch something."""
        products = others = 0
        for operation in operations:
            name = operation._schema.name.partition("::")[2]
            if operation.namespace == "karat_scale":
                forward, backward = (
                    (PSI_FORWARD, PSI_BACKWARD) if "psi" in name else (OPERATOR_FORWARD, OPERATOR_BACKWARD)
                )
                products += backward if "backward" in name else forward
            elif name in _PRODUCTS or name.startswith(_ATTENTION):
                products += _KERNELS.get(name, 1)
            else:
                others += _KERNELS.get(name, 1)
        return cls(products, others)

    def kernels(self, compiled: bool) -> int:
        """How many run: compiled, what lies between two products becomes one kernel."""
        return self.products + (min(self.others, self.products) if compiled else self.others)


@dataclass(frozen=True)
class StepLaunches:
    """Kernels of a micro batch and, beside those, of a step; and the host's seconds for each."""

    micro_batch: int
    step: int
    host_micro_batch: float
    host_step: float

    @classmethod
    def of(
        cls, launches: Launches, train: TrainConfig, config: Mapping[str, Any], sizes: Sequence[int], blocks: int
    ) -> "StepLaunches":
        """Under `train.compile` and a DeepSpeed config, of parameter tensors of so many elements and so many blocks."""
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
        return KERNEL_GAP * (accumulation * self.micro_batch + self.step)

    def host(self, accumulation: int) -> float:
        """Seconds that the host takes to launch a step."""
        return accumulation * self.host_micro_batch + self.host_step
