"""The base class of recipe sections, the kinds of numbers in them, and what a key may change."""

import typing
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, field_validator
from pydantic_core import PydanticCustomError, core_schema
from typing_extensions import Self


class Effect(Enum):
    """What another value of a key may change in a run. It stands in the annotation of each key.

    A key without one may change the model that is learned, such as `optim.lr`. A section's effect holds for its keys.
    """

    NOTHING = "nothing that is learned"
    SPEED = "speed or memory"
    ROUNDING = "rounding or pixels"
    MODEL = "the model that is learned"
    SHAPES = "the names or shapes of the model's tensors"


# No `resume.allow` helps: the data cursor counts global batches, so another size would train on other samples; what was
# frozen has no optimizer state that it could resume with; and a run keeps the teacher that it began with.
NEVER_ALLOWED = ("train.global_batch", "train.freeze", "distill.from", "attention.transfer_from")


def is_place(text: str) -> bool:
    """True for the place of a class: `package.module:Class`."""
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(map(str.isidentifier, module.split(".")))


class OneOf:
    """An annotation of a text: one of the names in a table of `karat_scale.foundation.tables`, or one of `also`.

    If `places`, it may also be the place of a class of the user's.
    """

    def __init__(self, table: Mapping[str, Any], *also: str, places: bool = False) -> None:
        self._table, self._also, self._places = table, also, places

    @property
    def names(self) -> list[str]:
        """All names, in the table's order after `also`."""
        return [*self._also, *self._table]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        return {"enum": self.names, "type": "string"}

    def _check(self, value: Any) -> str:
        if isinstance(value, str) and (value in self.names or (self._places and is_place(value))):
            return value
        *others, last = [*map(repr, self.names), *(["package.module:Class"] if self._places else [])]
        text = f"{', '.join(others)} or {last}" if others else last
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": text})


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

    _found_in: str = ""

    @property
    def found_in(self) -> str:
        """The file of somebody else's that says this section; empty for what the user says."""
        return self._found_in

    def of(self, file: object) -> Self:
        """Return the same as a file says it that somebody else may have written."""
        copied = self.model_copy()
        copied._found_in = str(file)
        return copied

    def changed(self, **values: Any) -> Self:
        """Return a copy with other values. They are not validated. `section__key` is a key of a section."""
        update: dict[str, Any] = {}
        for name, value in values.items():
            section, _, key = name.partition("__")
            update[section] = update.get(section, getattr(self, section)).changed(**{key: value}) if key else value
        return self.model_copy(update=update)

    @field_validator("*", mode="before")
    @classmethod
    def _nothing_is_an_empty_text(cls, value: Any, info: Any) -> Any:
        # `key=` on the command line, which is null in YAML and an empty section at the top of a file.
        return "" if value in (None, {}) and cls.model_fields[info.field_name].annotation is str else value

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: Any) -> Any:
        # pydantic reads `true` as 1, which hides a mistake.
        kinds = _kinds(cls.model_fields[info.field_name].annotation)
        values = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(one, bool) for one in values) and kinds & {int, float} and bool not in kinds:
            raise ValueError("should be a number, not true or false")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """Return the plain types that an annotation is made of."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return {type(value) for value in inner}
    if origin is typing.Annotated:
        return _kinds(inner[0])
    return set().union(*map(_kinds, inner)) if inner else {annotation}
