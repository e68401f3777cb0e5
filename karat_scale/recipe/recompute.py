"""The `train.recompute` section of a recipe: activation checkpointing."""

from typing import Literal

from pydantic import model_validator

from karat_scale.recipe.base import Count, Positive, Section


class RecomputeConfig(Section):
    """The activations that are recomputed in the backward pass instead of being kept."""

    policy: Literal["none", "attention", "every", "all", "budget"] = "none"
    """The parts to recompute: nothing, the `attention` of each block, `every` n-th block, `all` blocks, or as little as
    fits into a `budget`."""
    every: Count = 2
    """n of `policy: every`."""
    budget_gb: Positive | None = None
    """Most memory for saved activations, for `policy: budget`. In GB (1e9 bytes), of one micro batch on one rank."""
    method: Literal["torch", "deepspeed"] = "torch"
    """torch's non-reentrant checkpoint, or DeepSpeed's."""
    partition: bool = False
    """Split saved activations over model-parallel ranks. Needs `method: deepspeed`."""
    cpu: bool = False
    """Keep saved activations on the CPU. Needs `method: deepspeed`."""

    @model_validator(mode="after")
    def _keys_suit_policy_and_method(self) -> "RecomputeConfig":
        if self.policy == "budget" and self.budget_gb is None:
            raise ValueError(
                "train.recompute.policy = budget needs train.recompute.budget_gb, the GB of saved activations of a "
                "micro batch on a rank"
            )
        if self.policy != "budget" and self.budget_gb is not None:
            raise ValueError(
                f"train.recompute.budget_gb = {self.budget_gb:g} has no effect with train.recompute.policy = "
                f"{self.policy}; use policy budget or remove it"
            )
        for name in ("partition", "cpu"):
            if self.method == "torch" and getattr(self, name):
                raise ValueError(
                    f"train.recompute.{name} = true needs DeepSpeed's checkpoint; set train.recompute.method=deepspeed"
                )
        return self
