"""What DeepSpeed and the engine keep on a rank, as numbers; `zero` fills them in, stage by stage."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """What a rank holds, in bytes.

    weights: what the forward pass reads; masters: fp32 weights beside them. moments: of the optimizer. ema: fp32.
    held_gradients: alive before a backward pass begins, in the worst micro batch of a step.
    keeps_gradients: how many times the bytes of each gradient that backward makes stay: 1 where it stays itself, 2
    where it is widened to fp32, 0 where it is copied away at once.
    bucket: DeepSpeed's buffers while gradients come. gathered: stage 3's whole weights between forward and backward.
    fetched: stage 3's weights that an evaluation has fetched ahead, in one buffer and each by itself.
    partition: allocated for gradients when `flush_after` bytes of them have come.
    final_gradients: alive when the step begins. reducing: more than that, at its most, between backward and step.
    resting: gradients and their buffers that are kept when no step is under way.
    stepping: temporaries of the step. starting: all that is alive at the worst moment of `deepspeed.initialize`.
    host: of it all, what offload moves to the CPU's memory beside a GPU.
    """

    weights: int
    masters: int
    moments: int
    ema: int
    held_gradients: int
    keeps_gradients: int
    bucket: int
    gathered: int
    fetched: int
    partition: int
    flush_after: int
    final_gradients: int
    resting: int
    reducing: int
    stepping: int
    starting: int
    host: int

    @property
    def steady(self) -> int:
        """Between steps."""
        return self.weights + self.masters + self.moments + self.ema
