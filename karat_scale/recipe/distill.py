"""The section `distill`: what a run learns from a trained classifier, beside the labels."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from karat_scale.recipe.base import Positive, Section


class DistillConfig(Section):
    """Knowledge distillation from a frozen teacher, which sees the same augmented and mixed images as the student.

    A student with DeiT's distillation token learns from the teacher by that token, and from the labels by the class
    token.
    """

    model_config = ConfigDict(populate_by_name=True)

    from_: str = Field("", alias="from")
    """The teacher: a run directory, a checkpoint in one, a file or folder of `karat export`, or `timm:NAME`. Empty
    means no distillation. A run keeps a copy of its teacher."""
    kind: Literal["soft", "hard"] = "soft"
    """`soft`: the divergence from the teacher's probabilities (Hinton et al.). `hard`: the cross-entropy with the
    teacher's most probable class (DeiT)."""
    temperature: Positive = 3.0
    """The logits are divided by it before the soft probabilities are taken."""
    weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """The teacher's part of the loss; the labels have the rest."""
