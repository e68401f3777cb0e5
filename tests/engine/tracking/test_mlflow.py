"""Tests with a real MLflow server on this machine, which is also down for a while."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest

from karat_scale.engine.tracking.follow import Trackers
from tests.conftest import free_port, wait_until

pytestmark = pytest.mark.slow
pytest.importorskip("mlflow")
pytest.importorskip("flask", reason="the extra mlflow has no server; the package mlflow has one")


class Server:
    """MLflow's server with a database in a directory; it can be stopped and started."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        store = f"sqlite:///{directory / 'mlflow.db'}"
        address = ("--host", "127.0.0.1", "--port", str(self.port), "--workers", "1")
        places = ("--backend-store-uri", store, "--artifacts-destination", str(directory / "artifacts"))
        self._command = [sys.executable, "-m", "mlflow", "server", *address, *places]
        self._log = directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        wait_until(self._answers, 180)

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except (URLError, OSError):
            time.sleep(0.5)
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("mlflow"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture
def client(server, monkeypatch):
    """Return MLflow's client; the trackers' processes find the server by the same variable."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"owls-{time.time_ns()}")
    return MlflowClient(tracking_uri=server.url)


def the_run(client):
    """Return the only run of the test's experiment."""
    experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def steps(client, key: str = "train/loss") -> list[int]:
    history = client.get_metric_history(the_run(client).info.run_id, key)
    return [metric.step for metric in sorted(history, key=lambda metric: (metric.step, metric.timestamp))]


def test_two_starts_are_one_run_without_gap_or_repetition(written, server, client) -> None:
    (written.path / "analysis").mkdir()
    (written.path / "analysis" / "report.html").write_text("<p>")
    said = written.send_two_starts("mlflow")
    assert said[0].startswith(f"mlflow: the run is at {server.url}/#/experiments/")
    assert steps(client) == [1, 2, 3, 4]
    assert steps(client, "eval/top1") == [3]
    run = the_run(client)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "written owls")
    assert (run.data.params["run.seed"], run.data.metrics["best_top1"]) == ("0", 61.5)
    assert run.data.params["versions.torch"]
    artifacts = [artifact.path for artifact in client.list_artifacts(run.info.run_id)]
    assert artifacts == ["analysis", "recipe.yaml", "summary.json"]
    assert [artifact.path for artifact in client.list_artifacts(run.info.run_id, "analysis")] == [
        "analysis/report.html"
    ]


def test_a_kill_before_the_cursor_was_written_repeats_nothing(written, client) -> None:
    written.train(1, 2)
    written.send("mlflow")
    file = written.path / "trackers" / "mlflow.json"
    before = file.read_text()
    written.train(3)
    written.send("mlflow")
    file.write_text(before)
    written.train(4)
    assert written.send("mlflow")[0] == []
    assert steps(client) == [1, 2, 3, 4]


def test_a_setting_that_a_later_start_changes_is_a_tag(written, client) -> None:
    written.send("mlflow")
    recipe = written.path / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("workers: 1", "workers: 2"))
    assert written.send("mlflow")[0] == []
    run = the_run(client)
    assert (run.data.params["data.workers"], run.data.tags["now.data.workers"]) == ("1", "2")


def test_a_server_that_is_down_for_a_while_gets_everything_once(written, server, client) -> None:
    written.train(1)
    trackers = Trackers(written.path, ["mlflow"])
    try:
        wait_until(lambda: bool(client.search_experiments()) and _has(client, [1]), 120)
        server.stop()
        written.train(2, 3)
        wait_until(lambda: any("gets no figures" in one for one in trackers.messages()), 120)
        server.start()
        written.train(4)
        assert trackers.finish(120) == []
    finally:
        trackers.finish(0)
    assert steps(client) == [1, 2, 3, 4]


def _has(client, expected: list[int]) -> bool:
    try:
        return steps(client) == expected
    except (ValueError, AttributeError):  # no experiment or no run yet
        return False
