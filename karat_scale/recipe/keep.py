"""The sections of a recipe that say what a run keeps, goes on from and reports: `checkpoint`, `resume` and `log`."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from karat_scale.recipe.base import Count, Positive, Section


class SaveConfig(Section):
    """When to save and what to keep. A last checkpoint is always written at the end."""

    every_steps: Count | None = None
    every_minutes: Positive | None = 15.0
    # One kept checkpoint leaves nothing to fall back on when it turns out damaged.
    keep_last: Annotated[int, Field(ge=2)] = 2
    keep_best: bool = True


class CheckpointConfig(SaveConfig):
    """When to save and what to keep. A last checkpoint is always written at the end.

    `asynchronous`: training stands still for a copy to host memory alone, and goes on while the copy is written.
    `snapshots`: keep the weights alone at the start and at the end of each of that many equal parts of training.
    """

    asynchronous: bool = True
    snapshots: Annotated[int, Field(ge=0)] = 0


class ResumeConfig(Section):
    """How to go on from an earlier run.

    `from` is the run directory or the checkpoint a new run branches from, at its first start only. `allow` names keys
    or sections in which the recipe may differ from that of the run here.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    mode: Literal["auto", "never"] = "auto"
    from_: str = Field("", alias="from")
    allow: tuple[str, ...] = ()

    @field_validator("allow", mode="before")
    @classmethod
    def _one_key_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class ReportConfig(Section):
    """What to report, and how often."""

    every_steps: Count = 50
    tensorboard: bool = True


class LogConfig(ReportConfig):
    """What to report, and how often. `profile_steps` [first, last] are traced into the run's `profile/`.

    TensorBoard also gets histograms of each head's coefficients and projector.
    """

    histogram_every_steps: Count | None = 1000
    profile_steps: tuple[Count, Count] | None = None

    @field_validator("profile_steps")
    @classmethod
    def _first_is_not_after_last(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("should be [first step, last step]; swap the two")
        return value
