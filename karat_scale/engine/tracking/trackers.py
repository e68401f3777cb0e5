"""The interface of a tracker, what it gets of a run, and the trackers: TensorBoard, W&B, MLflow and trackio.

This package imports no torch: it works in separate processes during training. Each process has one tracker, and imports
only the library of this tracker.
"""

import errno
import io
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from karat_scale.foundation.errors import EXIT_STOPPED
from karat_scale.foundation.files import make_folder
from karat_scale.foundation.tables import is_installed

Event = Mapping[str, Any]
T = TypeVar("T")

KINDS = ("train", "eval", "histograms")
"""The kinds of events that have figures; a step has one event of each kind."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker sees it.

    Attributes:
        id: an id, made at the run's first start and kept in its directory. The tracker continues what it began under
            it.
        name: a name for people.
        project: the project or experiment that the recipe names; empty if it names none.
        directory: the run's directory.
        settings: the keys of the recipe, dotted, and the versions of the libraries.
    """

    id: str
    name: str
    project: str
    directory: Path
    settings: Mapping[str, Any]


class Tracker(Protocol):
    """Shows a run's figures elsewhere. Its class takes a `TrackedRun`.

    Any error means: try again later, with a new tracker. A tracker that knows what has arrived may have an attribute
    `steps`, the last step of each of `KINDS`. Then everything after these steps is sent again. None means that it does
    not know.
    """

    url: str
    """The address where a person finds the run; empty if there is none."""

    def write(self, events: Sequence[Event]) -> None:
        """Take events of `metrics.jsonl` and `histograms.jsonl`. They are sent, or safe on disk, when this returns."""

    def upload(self, file: Path, name: str) -> None:
        """Take a file of the run; `name` is its path in the run's directory. A newer one replaces it."""

    def close(self, summary: Event) -> None:
        """Take `summary.json`, which is empty while the run has none, and send what is left."""


def figures(event: Event) -> dict[str, float]:
    """Return the numbers of a "train" or "eval" event by the names that trackers show, such as `train/loss`."""
    if event.get("event") not in ("train", "eval"):
        return {}
    found = {f"{event['event']}/{name}": value for name, value in numbers(event) if name not in ("step", "time")}
    for block, share in (event.get("beyond_reach_by_block") or {}).items():
        found[f"scores beyond the reach of the functions/block {block}"] = share
    for name, blocks in (event.get("content") or {}).items():
        found |= {f"content, {name}/block {block}": x for block, x in enumerate(blocks) if x is not None}
    return found


def _with_histograms(event: Event, histogram: Any) -> dict[str, Any]:
    """Return an event's figures, and its histograms as the library's class, which is alike in W&B and trackio."""
    found: dict[str, Any] = dict(figures(event))
    for name, one in event.get("histograms", {}).items():
        found[f"{event['event']}/{name}"] = histogram(np_histogram=(one["counts"], one["edges"]))
    return found


def numbers(event: Event) -> Iterator[tuple[str, float]]:
    """Yield the values of an event or a summary that are numbers."""
    for name, value in event.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


class TensorBoard:
    """Event files in `tensorboard/` of the run's directory, a new one at each start. See Tracker."""

    url = ""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._values, self._writer = event_pb2.Event, summary_pb2.Summary, RecordWriter
        directory = run.directory / "tensorboard"
        make_folder(directory)
        # The cursor may have come with a copy of the run without these files: then everything is sent again.
        self.steps: dict[str, int] | None = None if any(directory.glob("events.out.tfevents.*")) else {}
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        # Without a buffer: what a full disk refused must not come later.
        self._file = (directory / name).open("wb", buffering=0)
        self._append([self._event(wall_time=time.time(), file_version="brain.Event:2")])

    def write(self, events: Sequence[Event]) -> None:
        """Add scalars and histograms."""
        records = []
        for event in events:
            scalars = [self._values.Value(tag=tag, simple_value=value) for tag, value in figures(event).items()]
            if values := [*scalars, *self._histograms(event)]:
                summary = self._values(value=values)
                records.append(self._event(wall_time=event["time"], step=event["step"], summary=summary))
        self._append(records)

    def upload(self, file: Path, name: str) -> None:
        """Do nothing: the event file lies next to the run's files."""

    def close(self, summary: Event) -> None:
        """Close the event file."""
        self._file.close()

    def _append(self, records: Sequence[Any]) -> None:
        """Write all records, or none of them."""
        buffer, before = io.BytesIO(), self._file.tell()
        writer = self._writer(buffer)
        for record in records:
            writer.write(record.SerializeToString())
        try:
            if self._file.write(buffer.getvalue()) != buffer.tell():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)
        except OSError:
            self._file.truncate(before)
            raise

    def _histograms(self, event: Event) -> Iterator[Any]:
        for name, one in event.get("histograms", {}).items():
            edges, counts = one["edges"], one["counts"]
            sums = {key: one[key] for key in ("sum", "sum_squares")}
            histogram = {"min": edges[0], "max": edges[-1], "num": sum(counts), **sums}
            yield self._values.Value(tag=name, histo={**histogram, "bucket_limit": edges[1:], "bucket": counts})


class WandB:
    """A run in the user's account, or files of WANDB_MODE=offline in `wandb/` of the run's directory. See Tracker.

    It writes to the run with this id, over all starts. W&B writes what it is given to `wandb/` first, and a separate
    process sends it from there. So the cursor says what was given; what has arrived is known from W&B's own summary
    when a later start resumes the run.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._directory, self._histogram = run.directory, wandb.Histogram
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
        """Return the last step of each kind that W&B has; none for a run that W&B does not know yet."""
        if not self._run.resumed:
            return {}
        return {kind: int(self._run.summary.get(f"{kind}/step", -1)) for kind in KINDS}

    def write(self, events: Sequence[Event]) -> None:
        """Log figures and histograms, each kind over its own steps: a resumed run of W&B does not go back a step."""
        for event in events:
            if values := _with_histograms(event, self._histogram):
                self._run.log({**values, f"{event['event']}/step": event["step"]})

    def upload(self, file: Path, name: str) -> None:
        """Save a file of the run."""
        self._run.save(str(file), base_path=str(self._directory), policy="now")

    def close(self, summary: Event) -> None:
        """Set the numbers of the summary, and wait until W&B has got everything."""
        self._run.summary.update(dict(numbers(summary)))
        code = summary.get("exit", 1)  # a run without a summary was killed
        self._run.finish(exit_code=0 if code == EXIT_STOPPED else code)


# The limits of one request to MLflow's server.
_MOST_METRICS, _MOST_PARAMETERS, _LONGEST_VALUE = 1000, 100, 500
_STATES = {0: "FINISHED", EXIT_STOPPED: "KILLED"}
_TAG = "karat.id"


class MLflow:
    """A run of an experiment, with the id as a tag, on the server that MLFLOW_TRACKING_URI names. See Tracker.

    A metric is sent with the time of its event, so the server recognises a metric that is sent twice.
    """

    def __init__(self, run: TrackedRun) -> None:
        # MLflow's own retries. The follower retries, too, and at the end of a run somebody waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow
        from mlflow import MlflowClient, entities

        self._entities = entities
        address = mlflow.get_tracking_uri()
        if address.startswith("sqlite:") and not is_installed("sqlalchemy"):
            raise ValueError("set MLFLOW_TRACKING_URI to a server, or install mlflow, which has a database of its own")
        self._client = MlflowClient()
        self._summary_file = run.directory / "summary.json"
        named = run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "karat"
        known = self._client.get_experiment_by_name(named)
        experiment = known.experiment_id if known is not None else self._client.create_experiment(named)
        found = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{run.id}'", max_results=1)
        one = found[0] if found else self._client.create_run(experiment, tags={_TAG: run.id}, run_name=run.name)
        self._id = one.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        self._describe(run.settings, one.data.params)
        is_server = address.startswith("http")
        self.url = f"{address.rstrip('/')}/#/experiments/{experiment}/runs/{self._id}" if is_server else ""

    def write(self, events: Sequence[Event]) -> None:
        """Log the figures as metrics. MLflow has no histograms."""
        metrics = [
            self._entities.Metric(_name(name), value, round(1000 * event["time"]), event["step"])
            for event in events
            for name, value in figures(event).items()
        ]
        for some in _pieces(metrics, _MOST_METRICS):
            self._client.log_batch(self._id, metrics=some)

    def upload(self, file: Path, name: str) -> None:
        """Log an artifact."""
        folder = name.rpartition("/")[0]
        self._client.log_artifact(self._id, str(file), folder or None)

    def close(self, summary: Event) -> None:
        """Log the numbers of the summary, and how the run ended."""
        if summary:
            when = round(1000 * self._summary_file.stat().st_mtime)
            steps, metric = summary.get("steps", 0), self._entities.Metric
            metrics = [metric(_name(name), value, when, steps) for name, value in numbers(summary)]
            self._client.log_batch(self._id, metrics=metrics)
            self._client.set_terminated(self._id, _STATES.get(summary["exit"], "FAILED"))

    def _describe(self, settings: Mapping[str, Any], known: Mapping[str, str]) -> None:
        """Log the settings. A parameter of MLflow cannot change, so what a later start changes becomes a tag."""
        texts = {_name(key): str(value)[:_LONGEST_VALUE] for key, value in settings.items()}
        new = [self._entities.Param(key, text) for key, text in texts.items() if key not in known]
        for some in _pieces(new, _MOST_PARAMETERS):
            self._client.log_batch(self._id, params=some)
        tag = self._entities.RunTag
        changed = [tag(f"now.{key}", text) for key, text in texts.items() if known.get(key, text) != text]
        for tags in _pieces(changed, _MOST_PARAMETERS):
            self._client.log_batch(self._id, tags=tags)


def _name(text: str) -> str:
    return re.sub(r"[^\w\-. :/]", "", text)


def _pieces(items: Sequence[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while some := list(islice(left, size)):
        yield some


class Trackio:
    """A project in its database on this machine (TRACKIO_DIR), on a server or in a Space, as its variables say.

    It writes to the run whose name ends in the first digits of the id. trackio writes in a separate thread and drops
    what that thread fails to write. So a database on this machine is asked what has arrived, at the start of a process
    and at its end. See Tracker.
    """

    url = ""

    def __init__(self, run: TrackedRun) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        self._id, self._histogram, self._storage = run.id[:6], trackio.Histogram, SQLiteStorage
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
            if values := _with_histograms(event, self._histogram):
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
        logs = self._storage.get_logs(self._run.project, self._run.name)
        steps: dict[str, int] = {}
        for log in logs:
            kinds = {key.partition("/")[0] for key in log} & {*KINDS}
            steps |= {kind: max(log["step"], steps.get(kind, -1)) for kind in kinds}
        return steps
