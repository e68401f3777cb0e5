"""What is exported: one kind of weights of one checkpoint of a run."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from karat_scale.errors import RunDirectoryError
from karat_scale.models import create_model
from karat_scale.models.transfer import teacher_of, weights_digest
from karat_scale.recipe import Recipe
from karat_scale.train.checkpoint.weights import describe_weights, load_weights
from karat_scale.train.run_directory import RunDirectory
from karat_scale.train.teacher import build_model

TRACEABLE = "reference"
"""The implementation of KArAt's operator that is plain tensor operations, all of which a tracer sees."""


@dataclass(frozen=True)
class Source:
    """Raw or averaged weights of an intact checkpoint.

    Args:
        run: the run's directory.
        recipe: the run's.
        checkpoint: its name.
        kind: "raw" or "ema".

    Everything raises UserError where the checkpoint has no such weights or holds another model.
    """

    run: RunDirectory
    recipe: Recipe
    checkpoint: str
    kind: str

    @cached_property
    def model(self) -> Any:
        """The model with its weights, fp32, in evaluation mode; of a student, what is its own."""
        return self._with_weights(create_model(self.recipe.model, self.recipe.attention))

    @cached_property
    def facts(self) -> dict[str, str]:
        """What every format says of the model; see `describe_weights`."""
        facts = describe_weights(self.recipe, self._saved, self.checkpoint, self.kind, self.run.classes())
        return {**facts, "weights_sha256": weights_digest(self.model)}

    def traceable_model(self) -> nn.Module:
        """The model of operations that a tracer understands; a student brings its teacher."""
        attention = self.recipe.attention.model_copy(update={"implementation": TRACEABLE})
        model = build_model(self.recipe.model_copy(update={"attention": attention}), self.run.path)
        teacher = teacher_of(self._with_weights(model))
        return _WithTeacher(model, teacher.model) if teacher else model

    def refuse_student(self) -> None:
        """Raises RunDirectoryError where the model computes nothing without its teacher."""
        if self.recipe.attention.transfer_from:
            raise RunDirectoryError(
                f"{self.run.path}: its attention matrices are its teacher's, for which this format has no place; "
                "use --format onnx or torchscript"
            )

    @property
    def _saved(self) -> dict[str, Any]:
        return self.run.store.state(self.checkpoint)

    def _with_weights(self, model: nn.Module) -> nn.Module:
        load_weights(model, self.run.store.root / self.checkpoint, self._saved, ema=self.kind == "ema")
        return model.eval()


class _WithTeacher(nn.Module):
    """A student that owns its teacher, so that a tracer meets the teacher's weights too."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of normalised images."""
        logits: Tensor = self.student(images)
        return logits
