"""trackio: a project in its database on this machine (TRACKIO_DIR), on a server or in a Space, as its variables say.

trackio writes in a thread of its own and drops what that fails to write. So with the database on this machine, it is
asked what has arrived: at the start of a process, and at its end.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trackio
from trackio.sqlite_storage import SQLiteStorage

from karat_scale.engine.tracking.tracker import KINDS, Event, TrackedRun, figures


class Trackio:
    """Writes to the run whose name ends in the first digits of the id. See Tracker."""

    url = ""

    def __init__(self, run: TrackedRun) -> None:
        self._id = run.id[:6]
        project = run.project or os.environ.get("TRACKIO_PROJECT") or "karat"
        self._run: Any = trackio.init(
            project=project,
            name=f"{run.name} {self._id}",
            resume="allow",
            config=dict(run.settings),
            embed=False,
            auto_log_cpu=False,
        )
        self._is_local = self._run.url is None
        self.steps = self._arrived() if self._is_local else None
        self._given = dict(self.steps or {})

    def write(self, events: Sequence[Event]) -> None:
        """Log figures and histograms."""
        for event in events:
            values: dict[str, Any] = dict(figures(event))
            for name, one in event.get("histograms", {}).items():
                values[f"{event['event']}/{name}"] = trackio.Histogram(np_histogram=(one["counts"], one["edges"]))
            if values:
                self._run.log(values, step=event["step"])
                self._given[event["event"]] = event["step"]

    def upload(self, file: Path, name: str) -> None:
        """Log a file as an artifact."""
        artifact = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{self._id}-{name}")
        self._run.log_artifact(str(file), name=artifact, type="karat")

    def close(self, summary: Event) -> None:
        """Write what is left. Raises OSError if trackio's database has not got everything."""
        self._run.finish()
        if self._is_local and self._arrived() != self._given:
            raise OSError("trackio has not written everything to its database")

    def _arrived(self) -> dict[str, int]:
        logs = SQLiteStorage.get_logs(self._run.project, self._run.name)
        steps: dict[str, int] = {}
        for log in logs:
            kinds = {key.partition("/")[0] for key in log} & {*KINDS}
            steps |= {kind: max(log["step"], steps.get(kind, -1)) for kind in kinds}
        return steps
