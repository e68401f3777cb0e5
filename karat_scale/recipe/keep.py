"""The sections `checkpoint`, `resume` and `log`: what a run saves, resumes from and reports."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from karat_scale.foundation.stores import check_url, check_writable, is_url
from karat_scale.foundation.tables import TRACKERS
from karat_scale.recipe.base import Count, OneOf, Positive, Section


class SaveConfig(Section):
    """When to save, and what to keep. A checkpoint is always written at the end."""

    every_steps: Count | None = None
    """Save every this many steps. Null does not save by steps."""
    every_minutes: Positive | None = 15.0
    """Save every this many minutes. Null does not save by time."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Number of the last checkpoints to keep. At least 2, so that there is another one if the last is damaged."""
    keep_best: bool = True
    """Also keep the checkpoint with the best evaluation."""
    asynchronous: bool = True
    """Training pauses only for a copy to host memory, and continues while the copy is written."""
    url: str = ""
    """A URL of this run alone, s3:// or gs://, where its checkpoints and log are copied. A start with an older
    checkpoint in its run directory, or none, resumes from there."""
    timeout: Positive = 300.0
    """Seconds that the store at `checkpoint.url` may take for a request or a part of a file."""

    @model_validator(mode="after")
    def _url_can_be_written(self) -> Self:
        if self.url and not is_url(self.url):
            raise ValueError(f"checkpoint.url = {self.url} is no URL; use s3:// or gs://, or run.dir for a directory")
        if self.url:
            check_writable(check_url(self.url))
        return self


class CheckpointConfig(SaveConfig):
    """When to save, and what to keep. A checkpoint is always written at the end."""

    snapshots: Annotated[int, Field(ge=0)] = 0
    """Keep the weights, without optimizer states, at the start and at the end of each of this many equal parts of
    training."""


class ResumeConfig(Section):
    """Resume, or branch from, an earlier run."""

    model_config = ConfigDict(populate_by_name=True)

    mode: Literal["auto", "never"] = "auto"
    """`auto` resumes from the last intact checkpoint of the run. `never` starts from the beginning."""
    from_: str = Field("", alias="from")
    """The run directory or the checkpoint that a new run branches from. It is used only at the first start."""
    allow: tuple[str, ...] = ()
    """Keys or sections in which the recipe may differ from the recipe in the run directory."""

    @field_validator("allow", mode="before")
    @classmethod
    def _one_key_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class LogConfig(Section):
    """What to report, and how often."""

    every_steps: Count = 50
    """Print and record the metrics every this many steps, and after the first step."""
    trackers: tuple[Annotated[str, OneOf(TRACKERS, places=True)], ...] = ("tensorboard",)
    """What shows the metrics, beside `metrics.jsonl`: names, or `package.module:Class` for your own. `[]` is none."""
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
    """Record where each allocation on the GPU was made, for the snapshot that a run out of memory leaves. It costs some
    speed."""

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_tracker_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("profile_steps")
    @classmethod
    def _first_is_not_after_last(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("should be [first step, last step]; swap the two")
        return value
