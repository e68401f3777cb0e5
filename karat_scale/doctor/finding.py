"""One line of the doctor's report, and how an examination that fails becomes one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from karat_scale.errors import DataError, UserError

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What was found out about one thing.

    level: "ok", "note" (works, but worth knowing) or "problem" (training fails or goes wrong). fix: what to do about
    it. figures: the same as numbers, for the JSON.
    """

    name: str
    level: Level
    value: str
    fix: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"name": self.name, "level": self.level, "value": self.value, "mend": self.fix, **self.figures}


def found(name: str, value: str, fix: str = "", *, wrong: bool = False, **figures: Any) -> Finding:
    """A finding whose level follows: a problem where `wrong`, else a note where there is something to fix."""
    return Finding(name, "problem" if wrong else "note" if fix else "ok", value, fix, figures)


def plural(number: int, noun: str) -> str:
    """A count with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def examine(name: str, examination: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings, or a problem in their place: a doctor must not fall ill of what it examines.

    A recipe that is wrong is the caller's mistake, and passes.
    """
    try:
        return list(examination())
    except DataError as error:
        return [Finding(name, "problem", str(error))]
    except UserError:
        raise
    except Exception as error:  # whatever a broken library or driver raises
        reason = " ".join(str(error).split()) or "no reason given"
        return [Finding(name, "problem", f"cannot be examined: {type(error).__name__}: {reason}")]
