"""The source of an export: one kind of weights of one checkpoint of a run."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from karat_scale.checkpoint.weights import describe_weights, load_weights
from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.models import create_model
from karat_scale.models.transfer import teacher_of, weights_digest
from karat_scale.recipe import Recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.classification.teacher import build_model
from karat_scale.training.weights_file import write_weights

TRACEABLE = "reference"
"""The implementation of KArAt's operator with plain tensor operations, which a tracer can record."""


@dataclass(frozen=True)
class Source:
    """Raw or averaged weights of an intact checkpoint.

    Args:
        run: the run's directory.
        recipe: the run's.
        checkpoint: its name.
        kind: "raw" or "ema".

    Each method raises UserError if the checkpoint has no such weights or holds another model.
    """

    run: RunDirectory
    recipe: Recipe
    checkpoint: str
    kind: str

    @cached_property
    def model(self) -> Any:
        """Return the model with its weights, fp32, in evaluation mode; of a student, without its teacher."""
        return self._with_weights(create_model(self.recipe.model, self.recipe.attention))

    @cached_property
    def facts(self) -> dict[str, str]:
        """Return the metadata of the model that every format holds; see `describe_weights`."""
        facts = describe_weights(self.recipe, self._saved, self.checkpoint, self.kind, self.run.classes())
        return {**facts, "weights_sha256": weights_digest(self.model)}

    def traceable_model(self) -> nn.Module:
        """Return the model with operations that a tracer can record; a student includes its teacher."""
        model = build_model(self.recipe.changed(attention__implementation=TRACEABLE), self.run.path)
        teacher = teacher_of(self._with_weights(model))
        return _WithTeacher(model, teacher.model) if teacher else model

    def refuse_student(self) -> None:
        """Raise RunDirectoryError if the model needs its teacher."""
        if self.recipe.attention.transfer_from:
            raise RunDirectoryError(
                f"{self.run.path}: it uses its teacher's attention matrices, and this format cannot hold a teacher; "
                "use --format onnx or torch-export"
            )

    @property
    def _saved(self) -> dict[str, Any]:
        return self.run.store.state(self.checkpoint)

    def _with_weights(self, model: nn.Module) -> nn.Module:
        load_weights(model, self.run.store.root / self.checkpoint, self._saved, ema=self.kind == "ema")
        return model.eval()


def write_safetensors(source: Source, path: Path) -> str:
    """Write the weights as one safetensors file of timm's names. Raises UserError as the methods of Source."""
    write_weights(source.run, source.recipe, source.checkpoint, source.kind, path)
    return ""


class _WithTeacher(nn.Module):
    """A student together with its teacher, so that a tracer records the teacher's weights too."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of normalised images."""
        logits: Tensor = self.student(images)
        return logits
