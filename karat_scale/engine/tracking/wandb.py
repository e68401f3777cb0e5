"""Weights & Biases: a run in the user's account, or files of WANDB_MODE=offline in `wandb/` of the run's directory."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb

from karat_scale.engine.tracking.tracker import KINDS, Event, TrackedRun, figures, numbers
from karat_scale.foundation.errors import EXIT_STOPPED


class WandB:
    """Writes to the run with this id, over all starts. See Tracker.

    W&B writes what it is given to `wandb/` first, and sends it from there by a process of its own. So the cursor says
    what was given; what has arrived is known from W&B's own summary when a later start resumes the run.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._directory = run.directory
        self._run: Any = wandb.init(
            id=run.id,
            resume="allow",
            name=run.name,
            project=run.project or os.environ.get("WANDB_PROJECT") or "karat",
            dir=str(run.directory),
            config=dict(run.settings),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.url: str = "" if self._run.offline else self._run.url
        for kind in KINDS:
            self._run.define_metric(f"{kind}/step", hidden=True)
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
        self._run.define_metric("content, *", step_metric="eval/step")
        self.steps = None if self._run.offline else self._arrived()

    def _arrived(self) -> dict[str, int]:
        """Return the last step of each kind that W&B has; nothing of a run that it does not know yet."""
        if not self._run.resumed:
            return {}
        return {kind: int(self._run.summary.get(f"{kind}/step", -1)) for kind in KINDS}

    def write(self, events: Sequence[Event]) -> None:
        """Log figures and histograms, each kind over its own steps: a resumed run of W&B does not go back a step."""
        for event in events:
            kind = event["event"]
            values: dict[str, Any] = dict(figures(event))
            for name, one in event.get("histograms", {}).items():
                values[f"{kind}/{name}"] = wandb.Histogram(np_histogram=(one["counts"], one["edges"]))
            if values:
                self._run.log({**values, f"{kind}/step": event["step"]})

    def upload(self, file: Path, name: str) -> None:
        """Save a file of the run."""
        self._run.save(str(file), base_path=str(self._directory), policy="now")

    def close(self, summary: Event) -> None:
        """Set the numbers of the summary, and wait until W&B has got everything."""
        self._run.summary.update(dict(numbers(summary)))
        code = summary.get("exit", 0)
        self._run.finish(exit_code=0 if code == EXIT_STOPPED else code)
