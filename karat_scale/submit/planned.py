"""The settings that `karat submit` takes from `karat plan`. torch is imported only if there is something to plan."""

from collections.abc import Mapping, Sequence

from karat_scale.machine import known_gpu
from karat_scale.recipe import Recipe


def planned_overrides(recipe: Recipe, overrides: Sequence[str], ranks: int, gpu: str | None) -> list[str]:
    """Return overrides that make `recipe` fit `ranks` GPUs of the kind `gpu`, and print a line about them.

    Keys in `overrides` are not changed. Without the name of a GPU there are no overrides, and the line says so.

    Raises:
        UserError: the GPU is unknown, the recipe does not divide over the ranks, or its model cannot be built.
    """
    if gpu is None:
        print("not planned: name the GPU with --gpu, such as h100-80; karat plan --memory GB plans for any GPU\n")
        return []
    memory = known_gpu(gpu).memory_bytes
    from karat_scale.estimate.choose import STAGES, choose
    from karat_scale.estimate.report import line

    named = {override.partition("=")[0] for override in overrides}
    own = recipe.deepspeed.config
    configs = (own,) if "deepspeed.config" in named or own not in STAGES else STAGES
    choice = choose(recipe, ranks, memory, configs)
    print(f"{line(choice, recipe)}\n")
    if not choice.fits:
        return []
    chosen: Mapping[str, object] = {
        "deepspeed.config": choice.config,
        "train.micro_batch": choice.micro_batch,
        "train.recompute.policy": choice.recompute,
        "train.eval_batch": choice.eval_batch,
    }
    there = {
        "deepspeed.config": own,
        "train.micro_batch": recipe.train.micro_batch,
        "train.recompute.policy": recipe.train.recompute.policy,
        "train.eval_batch": recipe.train.eval_batch,
    }
    return [f"{key}={value}" for key, value in chosen.items() if key not in named and value != there[key]]
