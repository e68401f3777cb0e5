"""Whether the data path keeps up with the GPUs of a plan: one core of this machine is timed, others are counted."""

from dataclasses import dataclass

from karat_scale.data.backends.rate import images_per_second
from karat_scale.foundation.errors import UserError
from karat_scale.recipe import Recipe

# One core reads, decodes and augments batches of so many images for about so long.
_BATCH, _SECONDS = 16, 2.0
# Cores that trainers, their loaders and the system use themselves, for each GPU.
_OTHER_CORES = 1


@dataclass(frozen=True)
class DataNeed:
    """What the GPUs take and what cores give, in images a second.

    Attributes:
        needed: by all GPUs together.
        per_core: of one core of this machine; None if it could not be timed.
        cores: of all GPUs together, without those that are busy otherwise.
        why: the reason where nothing was timed.
        on_device: the GPU augments already.
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
            return ["data: not timed here; karat doctor times it on the machine that trains"]
        need = f"the GPUs take {self.needed:,.0f} images a second, a core of this machine makes {self.per_core:,.0f},"
        if not self.is_bound:
            busy = self.needed / self.per_core
            return [
                f"data: {need}",
                f"  so {busy:,.1f} of {self.cores} cores are busy: training does not wait for data",
            ]
        advice = ["more cores (--cores-per-gpu)", "smaller images (make_webdataset.py --resize)"]
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
