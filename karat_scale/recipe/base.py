"""The base of a recipe: the class of its sections, kinds of numbers, what a key may change, and sections of every run.

The sections are `checkpoint`, `resume` and `log`: what a run saves, resumes from and reports.
"""

import json
import re
import typing
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, core_schema
from typing_extensions import Self

from karat_scale.foundation.errors import did_you_mean
from karat_scale.foundation.stores import check_url, check_writable, is_url
from karat_scale.foundation.tables import TRACKERS


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
# frozen, or another optimizer, has no state that it could resume with; and a run keeps the teacher that it began with.
NEVER_ALLOWED = ("train.global_batch", "train.freeze", "optim.name", "distill.from", "attention.transfer_from")


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
        if isinstance(value, str) and (hint := did_you_mean(value, self.names)):
            text += f"; {hint}"
        raise PydanticCustomError("literal_error", "should be {expected}", {"expected": text})


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
# At most four months, as clocks do not hold what some type for "never".
Duration = Annotated[float, Field(gt=0.0, le=1e7)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]
Triple = tuple[float, float, float]
# For a tuple: a single text counts as a list of one.
ONE_IS_A_LIST = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


# What a pydantic error of a type wants, in our words.
_WANTED = {
    **dict.fromkeys(("bool_type", "bool_parsing"), "should be true or false"),
    **dict.fromkeys(
        ("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "should be a whole number, such as 12"
    ),
    **dict.fromkeys(("float_type", "float_parsing"), "should be a number"),
    "greater_than": "should be above {gt:.12g}",
    "greater_than_equal": "should be at least {ge:.12g}",
    "less_than": "should be below {lt:.12g}",
    "less_than_equal": "should be at most {le:.12g}",
    "literal_error": "should be {expected}",
    "string_too_long": "should have at most {max_length} characters",
    "string_too_short": "should not be empty",
    "string_type": "should be a text; put it in quotes, on a command line in two pairs: \"'...'\"",
    **dict.fromkeys(("list_type", "tuple_type"), "should be a list, such as [a, b]"),
    **dict.fromkeys(("dict_type", "model_type"), "should be a section of keys"),
    "missing": "is missing",
    "extra_forbidden": "unknown key; remove it",
}


def wanted_by(error: Any) -> str:
    """Return the values that a key may have, after a pydantic error of it: `should be ...`, perhaps with a hint."""
    kind, given = error["type"], error.get("input")
    if kind not in _WANTED:
        text: str = error["msg"]
        return text.removeprefix("Value error, ").removeprefix("Input ")
    message = _WANTED[kind].format(**error.get("ctx", {}))
    if kind == "string_type" and isinstance(given, bool):
        message += " (YAML reads yes, no, on and off as true or false)"
    if kind == "literal_error":
        message = message.replace("False", "false")
        names = re.findall(r"'([^']*)'", message)
        if isinstance(given, str) and "did you mean" not in message and (meant := did_you_mean(given, names)):
            message += f"; {meant}"
    return message


def key_of(error: Any) -> str:
    """Return the key of a pydantic error, with the number of an item as in `log.trackers[0]`."""
    parts = [*error["loc"]]
    unknown = [parts.pop()] if error["type"] == "extra_forbidden" else []  # as it was written
    named = [*(part for part in parts if not _TYPE.fullmatch(str(part))), *unknown]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named).removeprefix(".")


def first_mistake(error: ValidationError) -> str:
    """Return the first mistake in a file of our own: its key, if it has one, and what its value should be."""
    first = error.errors()[0]
    return f"{key_of(first)}: {wanted_by(first)}".removeprefix(": ")


# What pydantic adds to a key for a type among several that the key may have.
_TYPE = re.compile(r"function-.*|bool|int|float|str|none|(literal|constrained|tuple|list|dict)\W.*")


LONGEST = 200  # characters of a value in a message


def as_written(value: Any) -> str:
    """Return a value as a recipe has it, cut to `LONGEST` characters."""
    is_plain = isinstance(value, str | float)
    return (repr(value) if is_plain else json.dumps(value, default=str, ensure_ascii=False))[:LONGEST]


def setting_text(value: Any) -> str:
    """Return the value of a leaf as a recipe has it."""
    return value or "''" if isinstance(value, str) else json.dumps(value)


class Section(BaseModel):
    """A part of a recipe. It refuses unknown keys and numbers that are not finite, and it is immutable.

    The docstring below a field is its description in the documentation.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, use_attribute_docstrings=True
    )

    _found_in: str = ""

    @property
    def found_in(self) -> str:
        """The file of somebody else that this section comes from; empty if it comes from the user."""
        return self._found_in

    def of(self, file: object) -> Self:
        """Return a copy that is marked as coming from a file that somebody else may have written."""
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

    def _refusals(self) -> Iterator[str]:
        """Yield a line for each combination of values that do not fit together; only the first is reported."""
        yield from ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for line in self._refusals():
            raise ValueError(line)
        return self

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


class SaveConfig(Section):
    """When to save, and what to keep. A checkpoint is always written at the end."""

    every_steps: Count | None = None
    """Save every this many steps. Null does not save by steps."""
    every_minutes: Positive | None = 15.0
    """Save every this many minutes. Null does not save by time."""
    every: Literal["auto"] | None = None
    """`auto` chooses the minutes between two saves, in place of `every_minutes`, by Young's and Daly's rule from what a
    save costs and how often the run has failed, and says what it chose."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Number of the last checkpoints to keep. At least 2, so that there is another one if the last is damaged."""
    keep_best: bool = True
    """Also keep the checkpoint with the best top-1 (mask AP for detection) of `train.eval_weights`."""
    local: str = ""
    """A directory on a disk of each node, or below /dev/shm, that gets the newest state ten times as often, so that a
    restart on the same nodes loses less work. The state is removed once the run has ended in order."""
    asynchronous: bool = True
    """Training pauses only for a copy to host memory, and continues while the copy is written."""
    url: str = ""
    """A URL of this run alone, s3:// or gs://, where its checkpoints and log are copied. A start resumes from there if
    the run directory has an older checkpoint or none."""
    timeout: Duration = 300.0
    """Seconds that the store at `checkpoint.url` may take for a request or a part of a file."""

    @field_validator("local")
    @classmethod
    def _local_is_no_url(cls, value: str) -> str:
        if is_url(value):
            raise ValueError("should be a directory of each node, such as /dev/shm")
        return value

    def _refusals(self) -> Iterator[str]:
        if self.url and not is_url(self.url):
            yield f"checkpoint.url = {self.url} is not a URL; use s3:// or gs://, or run.dir for a directory"
        elif self.url:
            try:
                check_writable(check_url(self.url))
            except ValueError as error:
                yield f"checkpoint.url: {error}"


class CheckpointConfig(SaveConfig):
    __doc__ = SaveConfig.__doc__

    snapshots: Annotated[int, Field(ge=0)] = 0
    """Keep the weights, without optimizer states, at the start and at the end of each of this many equal parts of
    training."""


class ResumeConfig(Section):
    """Resume, or branch from, an earlier run."""

    model_config = ConfigDict(populate_by_name=True)

    mode: Literal["auto", "never"] = "auto"
    """`auto` resumes from the last intact checkpoint of the run. `never` refuses to start if there is one."""
    from_: str = Field("", alias="from")
    """The run directory or the checkpoint that a new run branches from. It is used only at the first start."""
    allow: Annotated[tuple[str, ...], ONE_IS_A_LIST] = ()
    """Keys or sections in which the recipe may differ from the recipe in the run directory."""


class LogConfig(Section):
    """What to report, and how often."""

    every_steps: Count = 50
    """Print and record the metrics every this many steps, and after the first and the last step."""
    trackers: Annotated[tuple[Annotated[str, OneOf(TRACKERS, places=True)], ...], ONE_IS_A_LIST] = ("tensorboard",)
    """Trackers that show the metrics: names, or `package.module:Class` for your own. `[]` is none."""
    project: str = ""
    """The project of W&B and trackio, and the experiment of MLflow. Empty: what the library's own variable names, or
    else `karat`."""
    track_checkpoints: bool = False
    """Also send the last and the best checkpoint to the trackers, when the run has finished."""
    histogram_every_steps: Count | None = 1000
    """Steps between the trackers' histograms of each head's coefficients and projector. Null turns them off."""
    profile_steps: tuple[Count, Count] | None = None
    """The first and the last step to trace into the run's `profile/`. Null traces nothing."""

    memory_history: bool = False
    """Record where each allocation on the GPU was made, for the snapshot that a run leaves when it runs out of memory.
    It costs some speed."""

    @field_validator("profile_steps")
    @classmethod
    def _first_is_not_after_last(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("should be [first step, last step]; swap the two")
        return value
