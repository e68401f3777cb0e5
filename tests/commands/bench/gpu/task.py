"""A section's task that keeps its events in this process."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from karat_scale.commands.bench.gpu.worker import Budget, Channel, Task


@dataclass
class Kept(Channel):
    """A channel that keeps what was sent, by kind."""

    events: dict[str, list[Any]] = field(default_factory=dict)

    def send(self, kind: str, content: Any = None) -> None:
        self.events.setdefault(kind, []).append(content)


class FullSizeTask(Task):
    """A task that takes a card's code path on a CPU."""

    @property
    def toy(self) -> bool:
        return False

    @property
    def implementation(self) -> str:
        return "streaming"


def make_task(
    seconds: float = 100.0, kind: type[Task] = Task, scratch: Path = Path("unused")
) -> tuple[Task, dict[str, list[Any]]]:
    kept = Kept()
    return kind("cpu", Budget(seconds), kept, scratch), kept.events
