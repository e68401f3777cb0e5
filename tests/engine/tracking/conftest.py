"""A run directory for metrics that a test writes, and a tracker that writes lines and can lose its server."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from karat_scale.engine.reporting.progress import MetricsLog
from karat_scale.engine.tracking.follow import Trackers
from karat_scale.recipe.loading import dump_recipe, load_recipe
from tests.conftest import SMALL

LINES = '''
import json
from pathlib import Path


class Lines:
    """Writes all that it is told to `told.jsonl`; fails while there is a file `away`."""

    url = "file://user:secret@here"

    def __init__(self, run):
        self.run, self.file = run, run.directory.parent / "told.jsonl"
        self.tell({"open": run.id, "name": run.name, "lr": run.settings["optim.lr"]})

    def tell(self, what):
        if (self.file.parent / "away").exists():
            raise ConnectionError("no route to http://user:secret@host\\nmore")
        with self.file.open("a") as file:
            file.write(json.dumps(what) + "\\n")

    def write(self, events):
        for event in events:
            self.tell(dict(event))

    def upload(self, file, name):
        self.tell({"upload": name, "bytes": file.stat().st_size})

    def close(self, summary):
        self.tell({"close": summary.get("exit")})
'''
PLACE = "lines_of_mine:Lines"


class WrittenRun:
    """A run directory for metrics that a test writes."""

    def __init__(self, path: Path, *overrides: str) -> None:
        self.path = path
        path.mkdir()
        base = path.parent / "written.yaml"
        base.write_text("data: {backend: synthetic}\nschedule: {warmup_epochs: 0}\n")
        recipe = load_recipe(base, [*SMALL, f"run.dir={path}", *overrides])
        (path / "recipe.yaml").write_text(dump_recipe(recipe))

    def train(self, *steps: int, evaluate: tuple[int, ...] = ()) -> None:
        """Log steps as a start of the run would, with an evaluation after those in `evaluate`."""
        log = MetricsLog(self.path / "metrics.jsonl")
        for step in steps:
            log.write("train", step, loss=1 / step, lr=0.1, epoch=0, grad_norm=None)
            if step in evaluate:
                log.write("eval", step, top1=float(step), loss=2 / step, content={"by_query": [0.5, None, 0.25]})
        log.close()

    def event(self, kind: str, step: int, **figures: Any) -> None:
        log = MetricsLog(self.path / "metrics.jsonl")
        log.write(kind, step, **figures)
        log.close()

    def histogram(self, step: int) -> None:
        log = MetricsLog(self.path / "metrics.jsonl")
        log.histograms(step, {"W": {"counts": [1, 2], "edges": [0.0, 1.0, 2.0], "sum": 3.0, "sum_squares": 5.0}})
        log.close()

    def finish(self, code: int = 0) -> None:
        self.event("end", 0, exit=code)
        (self.path / "summary.json").write_text(json.dumps({"exit": code, "best_top1": 61.5}))

    def send(self, *names: str, seconds: float = 60, anew: bool = False) -> tuple[list[str], list[str]]:
        """Start the trackers and let them end; return the names of the late ones, and all messages."""
        trackers = Trackers(self.path, names, anew=anew)
        late = trackers.finish(seconds)
        return late, trackers.messages()

    def send_two_starts(self, tracker: str) -> list[str]:
        """Send a start of steps 1 to 3 and a second one that resumes after step 2; return the messages of the first."""
        self.train(1, 2, 3, evaluate=(3,))
        self.histogram(3)
        late, said = self.send(tracker)
        assert late == [], said
        self.event("resume", 2)
        self.train(3, 4)
        self.finish()
        assert self.send(tracker)[0] == []
        return said


@pytest.fixture
def written(tmp_path) -> WrittenRun:
    return WrittenRun(tmp_path / "owls")


@pytest.fixture
def lines(tmp_path, monkeypatch) -> Callable[[], list[dict[str, Any]]]:
    """Put the tracker `PLACE` on the path; return a function that returns what it was told so far."""
    (tmp_path / "lines_of_mine.py").write_text(LINES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    file = tmp_path / "told.jsonl"
    return lambda: [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
