"""The `summary.json` of a finished run, and fields of it with their types."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from karat_scale.foundation.errors import RunDirectoryError
from karat_scale.training.run_directory import RunDirectory

Percent = Annotated[float, Field(ge=0.0, le=100.0)]
Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
M = TypeVar("M", bound="Figures")


class Figures(BaseModel):
    """Some fields of a JSON object. Types are strict: a number in quotes is not a number."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    @classmethod
    def of(cls: type[M], content: Any, where: str) -> M:
        """Validate `content`. Raises RunDirectoryError, which begins with `where` and names the first wrong field."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "its content"
            value = "" if first["type"] == "missing" else f" = {str(first['input'])[:40]!r}"
            what = first["msg"].removeprefix("Input ")
            raise RunDirectoryError(f"{where}: damaged: {field}{value}: {what}; put back what the run wrote") from None


def read_summary(directory: RunDirectory) -> dict[str, Any]:
    """Return the summary of a finished run. Raises RunDirectoryError if there is none."""
    if directory.is_summary_damaged:
        raise RunDirectoryError(
            f"{directory.summary_file}: damaged, it is not a JSON object; put back the files that the run wrote"
        )
    summary = directory.summary()
    if summary is None:
        raise RunDirectoryError(f"{directory.path}: has no summary.json, so it has not finished; finish it first")
    if summary.get("exit") != 0:
        reason = summary.get("reason", "no reason given")
        raise RunDirectoryError(f"{directory.path}: has not finished ({reason}); finish it first")
    return summary
