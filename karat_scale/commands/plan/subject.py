"""What is planned: a recipe's model on fake tensors, its sizes, and what its passes allocate."""

from contextlib import AbstractContextManager, nullcontext

import torch

from karat_scale.attention.functional import choosing_as_on_a_gpu
from karat_scale.attention.variants.controls import planning
from karat_scale.commands.plan.memory import Footprint
from karat_scale.commands.plan.tracing import fake_copy, trace_evaluation, trace_step
from karat_scale.commands.plan.zero import ParameterSizes
from karat_scale.engine.engine import PRECISIONS
from karat_scale.foundation.errors import RecipeError
from karat_scale.models.factory import outline
from karat_scale.models.layers import blocks_of
from karat_scale.models.recompute import choices_by_rule, recompute
from karat_scale.recipe import Recipe
from karat_scale.training.tasks.classification.distillation_teacher import planned_cost

# Two sizes that mixup's pairs allow.
TRACED_BATCHES = (2, 4)


class Subject:
    """A recipe's model as it would run on a GPU, or on this machine's CPU.

    Raises RecipeError where the model cannot be built.
    """

    def __init__(self, recipe: Recipe, on_gpu: bool) -> None:
        if recipe.attention.transfer_from:
            raise RecipeError("attention.transfer_from: a teacher's memory is not known; plan without it, and add it")
        self.recipe, self.on_gpu = recipe, on_gpu
        self.teacher = planned_cost(recipe)
        model = outline(self.recipe)
        self.sizes = ParameterSizes.of(model, recipe.optim)
        precision = PRECISIONS[recipe.train.precision]
        # What the model is cast to, if it is, and whether autocast casts.
        self._dtype = None if precision.weights == torch.float32 else precision.weights
        self._autocasts = precision.autocasts
        # As `pixel_dtype` and the task choose it.
        made_for_gpu = on_gpu and not recipe.distill.from_
        self.pixels = precision.compute if made_for_gpu else torch.float32
        self._footprints: dict[bool, Footprint] = {}

    def footprint(self) -> Footprint:
        """What a micro batch allocates and launches, at every ZeRO stage.

        Raises RecipeError where the model cannot run as the recipe says.
        """
        return self._traced(trains=True)

    def evaluation(self) -> Footprint:
        """As `footprint`, of a batch of an evaluation, which recomputes nothing."""
        return self._traced(trains=False)

    def _traced(self, trains: bool) -> Footprint:
        if trains not in self._footprints:
            self._footprints[trains] = self._trace(trains)
        return self._footprints[trains]

    def _trace(self, trains: bool) -> Footprint:
        model = outline(self.recipe)
        mode = fake_copy(model, self._dtype)
        trace = trace_step if trains else trace_evaluation
        if trains:
            recompute(model, choices_by_rule(self.recipe.train.recompute, len(blocks_of(model))))
        size = self.recipe.model.image_size
        pixels = self.pixels if self._autocasts else None
        try:
            with self._choosing(), planning():
                traces = {batch: trace(model, mode, batch, size, self._autocasts, pixels) for batch in TRACED_BATCHES}
        except ValueError as error:
            raise RecipeError(f"attention.implementation = {self.recipe.attention.implementation!r}: {error}") from None
        return Footprint.through(traces)

    def _choosing(self) -> AbstractContextManager[None]:
        return choosing_as_on_a_gpu() if self.on_gpu else nullcontext()
