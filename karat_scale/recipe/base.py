"""The base class of recipe sections, the kinds of numbers in them, and what a key may change."""

import types
import typing
from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Effect(Enum):
    """What another value of a key may change in a run. It stands in the annotation of each key.

    A key without one may change the model that is learned, such as `optim.lr`. A section's effect holds for its keys.
    """

    NOTHING = "nothing that is learned"
    SPEED = "speed or memory"
    ROUNDING = "rounding or pixels"
    MODEL = "the model that is learned"
    SHAPES = "the names or shapes of the model's tensors"


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Triple = tuple[float, float, float]


class Section(BaseModel):
    """A part of a recipe. It refuses unknown keys and numbers that are not finite, and it is immutable.

    The docstring below a field is its description in the documentation.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _nothing_is_an_empty_text(cls, value: Any, info: Any) -> Any:
        # `key=` on the command line, which is null in YAML.
        return "" if value is None and cls.model_fields[info.field_name].annotation is str else value

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: Any) -> Any:
        # pydantic reads `true` as 1, which hides a mistake.
        annotation = cls.model_fields[info.field_name].annotation
        is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
        choices = typing.get_args(annotation) if is_union else (annotation,)
        if isinstance(value, bool) and (int in choices or float in choices) and bool not in choices:
            raise ValueError("should be a number, not true or false")
        return value
