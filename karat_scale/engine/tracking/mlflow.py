"""MLflow: a run of an experiment, on the server that MLFLOW_TRACKING_URI names.

A metric is sent with the time of its event, so a server takes one that is sent twice as the same.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

# Of MLflow itself. The follower tries again, too, and at the end of a run somebody waits.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from karat_scale.engine.tracking.tracker import Event, TrackedRun, figures, numbers
from karat_scale.foundation.errors import EXIT_STOPPED
from karat_scale.foundation.tables import is_installed

# Of one request, by the server's rules.
_MOST_METRICS, _MOST_PARAMETERS, _LONGEST_VALUE = 1000, 100, 500
_STATES = {0: "FINISHED", EXIT_STOPPED: "KILLED"}
_TAG = "karat.id"
T = TypeVar("T")


class MLflow:
    """Writes to a run that has the id as a tag. See Tracker."""

    def __init__(self, run: TrackedRun) -> None:
        address = mlflow.get_tracking_uri()
        if address.startswith("sqlite:") and not is_installed("sqlalchemy"):
            raise ValueError("set MLFLOW_TRACKING_URI to a server, or install mlflow, which has a database of its own")
        self._client = MlflowClient()
        self._summary_file = run.directory / "summary.json"
        experiment = self._experiment(run.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "karat")
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
            Metric(_name(name), value, round(1000 * event["time"]), event["step"])
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
            metrics = [Metric(_name(name), value, when, summary.get("steps", 0)) for name, value in numbers(summary)]
            self._client.log_batch(self._id, metrics=metrics)
            self._client.set_terminated(self._id, _STATES.get(summary["exit"], "FAILED"))

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        identifier: str = found.experiment_id if found is not None else self._client.create_experiment(name)
        return identifier

    def _describe(self, settings: Mapping[str, Any], known: Mapping[str, str]) -> None:
        """Log the settings. A parameter of MLflow cannot change, so what a later start changes becomes a tag."""
        texts = {_name(key): str(value)[:_LONGEST_VALUE] for key, value in settings.items()}
        for some in _pieces([Param(key, text) for key, text in texts.items() if key not in known], _MOST_PARAMETERS):
            self._client.log_batch(self._id, params=some)
        changed = [RunTag(f"now.{key}", text) for key, text in texts.items() if known.get(key, text) != text]
        for tags in _pieces(changed, _MOST_PARAMETERS):
            self._client.log_batch(self._id, tags=tags)


def _name(text: str) -> str:
    return re.sub(r"[^\w\-. :/]", "", text)


def _pieces(items: Sequence[T], size: int) -> Iterator[list[T]]:
    left = iter(items)
    while some := list(islice(left, size)):
        yield some
