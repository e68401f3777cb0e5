"""What is planned: a recipe's model on fake tensors, its sizes, and what its passes allocate."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from timm.models import VisionTransformer

from karat_scale.attention.functional import REFUSALS
from karat_scale.attention.kernels import triton_fourier
from karat_scale.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.plan.footprint import Footprint
from karat_scale.plan.tracing import fake_copy, trace_step
from karat_scale.plan.zero import ParameterSizes
from karat_scale.recipe import Recipe

# Two sizes that mixup's pairs allow.
TRACED_BATCHES = (2, 4)


class Subject:
    """A recipe's model as it would run on a GPU, or on this machine's CPU.

    Raises RecipeError where the model cannot be built.
    """

    def __init__(self, recipe: Recipe, on_gpu: bool) -> None:
        self.recipe, self.on_gpu = recipe, on_gpu
        self.sizes = ParameterSizes.of(self._build(), recipe)
        self._footprints: dict[bool, Footprint] = {}

    def footprint(self, stage: int) -> Footprint:
        """What a micro batch allocates at a ZeRO stage: at 0 bf16 is autocast, later the model itself is bf16.

        Raises RecipeError where the model cannot run as the recipe says.
        """
        is_bf16 = self.recipe.train.precision == "bf16"
        autocast = is_bf16 and stage == 0
        if autocast not in self._footprints:
            self._footprints[autocast] = self._trace(torch.bfloat16 if is_bf16 and not autocast else None, autocast)
        return self._footprints[autocast]

    def _build(self) -> VisionTransformer:
        with torch.device("meta"):  # spares drawing the initial weights
            return create_model(self.recipe.model, self.recipe.attention)

    def _trace(self, dtype: torch.dtype | None, autocast: bool) -> Footprint:
        model = self._build()
        mode = fake_copy(model, dtype)
        size = self.recipe.model.image_size
        try:
            with attention_of_a_gpu() if self.on_gpu else nullcontext():
                return Footprint.through(
                    {batch: trace_step(model, mode, batch, size, autocast) for batch in TRACED_BATCHES}
                )
        except ValueError as error:
            raise RecipeError(f"attention.implementation = {self.recipe.attention.implementation!r}: {error}") from None


@contextmanager
def attention_of_a_gpu() -> Iterator[None]:
    """Let attention choose its implementation as on a GPU that runs the Triton kernels, whose fakes run anywhere."""
    ours = dict(REFUSALS)
    REFUSALS.update(triton=triton_fourier.call_refusal, cpu=lambda *_: "the tensors are on a GPU")
    try:
        yield
    finally:
        REFUSALS.update(ours)
