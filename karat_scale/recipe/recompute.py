"""The `train.recompute` section of a recipe: activation checkpointing."""

from typing import Literal

from pydantic import model_validator

from karat_scale.recipe.base import Count, Positive, Section


class RecomputeConfig(Section):
    """Which activations are computed again in the backward pass in place of being kept.

    `attention` and `all` recompute that of each block, `every` each n-th block whole. `budget` takes the fewest
    recomputations that hold saved activations to `budget_gb` (1e9 bytes, of one micro batch on one rank). `method` is
    torch's non-reentrant checkpoint or DeepSpeed's; only the latter splits what it keeps over model-parallel ranks
    (`partition`) or keeps it on the CPU (`cpu`).
    """

    policy: Literal["none", "attention", "every", "all", "budget"] = "none"
    every: Count = 2
    budget_gb: Positive | None = None
    method: Literal["torch", "deepspeed"] = "torch"
    partition: bool = False
    cpu: bool = False

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
                    f"train.recompute.{name} = true is DeepSpeed's alone; set train.recompute.method=deepspeed"
                )
        return self
