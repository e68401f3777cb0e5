"""One line of the doctor's report. A check that fails with an error becomes such a line, too."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from karat_scale.errors import DataError, UserError

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    level: "ok", "note" (works, but worth knowing) or "problem" (training fails or goes wrong). fix: how to fix
    it. figures: the same as numbers, for the JSON file.
    """

    name: str
    level: Level
    value: str
    fix: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data. The key `mend` has the fix."""
        return {"name": self.name, "level": self.level, "value": self.value, "mend": self.fix, **self.figures}


def found(name: str, value: str, fix: str = "", *, wrong: bool = False, **figures: Any) -> Finding:
    """Return a finding with its level: a problem if `wrong`, else a note if there is something to fix."""
    return Finding(name, "problem" if wrong else "note" if fix else "ok", value, fix, figures)


def examine(name: str, examination: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return the findings, or a problem if the check fails: a broken library must not stop the doctor.

    A wrong recipe is the caller's mistake, so its error is raised.
    """
    try:
        return list(examination())
    except DataError as error:
        return [Finding(name, "problem", str(error))]
    except UserError:
        raise
    except Exception as error:  # any error of a broken library or driver
        reason = " ".join(str(error).split()) or "no reason given"
        return [Finding(name, "problem", f"cannot be examined: {type(error).__name__}: {reason}")]
