"""Runs whose checkpoints are copied to an S3 server, and runs that go on from there."""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from karat_scale.checkpoint.remote import RemoteCheckpoints
from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.engine.distributed import ALONE
from karat_scale.engine.reporting.progress import MetricsLog
from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.stores import WritableStore
from karat_scale.recipe import Recipe
from karat_scale.training.run_copy import RunCopy, RunUrl, follow
from karat_scale.training.run_directory import RunDirectory
from tests.conftest import events, karat, karat_done, karat_refuses, summary
from tests.servers import Asked, Fault, FaultyProxy, s3, s3_port
from tests.small_engines import equal
from tests.training.runs import STEPS, final_tensors, kill_all, losses, start, wait_for_checkpoint

__all__ = ["s3", "s3_port"]
EVERY_STEP = ("checkpoint.every_steps=1", "checkpoint.keep_last=2", "deepspeed.config=zero1")


def names(url: str) -> list[str]:
    remote = RemoteCheckpoints(WritableStore(url))
    remote.look()
    return remote.names()


@pytest.fixture
def url(s3: Callable[[Path], str], tmp_path: Path) -> str:
    """A place on the server where nothing is."""
    return s3(tmp_path / "nothing")


def test_what_cannot_be_a_url_of_checkpoints(small_recipe: Callable[..., Recipe]) -> None:
    for value, line in {
        "https://host/run": "https://host/run cannot be written; use s3:// or gs://",
        "hf://datasets/user/set": "cannot be written; use s3:// or gs://",
        "ftp://host/run": "ftp:// is not supported",
        "s3://key:secret@bucket/run": "s3://bucket/run has a user",
        "/scratch/run": "is no URL; use s3:// or gs://, or run.dir for a directory",
    }.items():
        with pytest.raises(RecipeError, match=re.escape(line)) as error:
            small_recipe(f"checkpoint.url={value}")
        assert "secret" not in str(error.value)
    for key in ("run.dir", "resume.from", "init_from"):
        with pytest.raises(RecipeError, match=rf"{key} is a URL; "):
            small_recipe(f"{key}=s3://key:secret@bucket/run")


@pytest.mark.parametrize("command", ["eval", "analyze", "export", "predict", "status", "replay", "compare", "track"])
def test_a_url_in_place_of_a_run_names_the_command_that_fetches_it(command: str) -> None:
    line = karat_refuses(command, "s3://bucket/run", "1")
    assert "it is a URL; `karat fetch URL DIR` makes a directory of the run there" in line


def test_what_cannot_be_fetched_is_one_line(url: str, tmp_path: Path) -> None:
    for place, line in {
        url: f"{url} has no run (it has no owner.json)",
        "https://host/run": "cannot be written",
    }.items():
        assert line in karat_refuses("fetch", place, str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_a_damaged_recipe_at_a_url_is_named_by_its_place(
    recipe_file: Path, s3: Callable[[Path], str], tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    owner = {"run": "id", "name": recipe_file.stem, "start": "s", "host": "h", "time": 0.0}
    (there / "owner.json").write_text(json.dumps(owner))
    (there / "recipe.yaml").write_text("model: {depth: deep}\n")
    url = s3(there)
    line = karat_refuses("train", str(recipe_file), f"checkpoint.url={url}")
    assert line.startswith(f"error: checkpoint.url = {url}: recipe.yaml: model.depth = 'deep'")
    assert line.endswith("put it right, or use another checkpoint.url")


def test_ranks_beat_while_a_store_moves() -> None:
    class Slow:
        moved, left = 0, 5

        def wait(self, seconds: float) -> bool:
            self.left -= 1
            self.moved += self.left % 2
            return self.left == 0

    beats: list[str] = []
    assert follow(ALONE, Slow(), lambda: beats.append("beat"))
    assert len(beats) == 3  # at first, and when something came
    assert not follow(ALONE, Slow(), lambda: None, lambda: True)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_signal_while_a_checkpoint_is_fetched_ends_the_start(
    recipe_file: Path, s3: Callable[..., str], s3_port: int, tmp_path: Path
) -> None:
    url, run = s3(tmp_path / "nothing"), tmp_path / "run"
    overrides = ("train.max_steps=2", f"checkpoint.url={url}")
    karat_done("train", str(recipe_file), f"run.dir={run}", *overrides)
    shutil.rmtree(run)
    asked = threading.Event()

    def stall(number: int, request: Asked) -> Fault | None:
        if request.method != "GET" or not request.path.endswith(".pt"):
            return None
        asked.set()
        return "stall"

    with FaultyProxy(s3_port, spoil=stall) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        process = start(recipe_file, run, *overrides)
        assert asked.wait(60)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped before the checkpoint was fetched; run the same command to resume" in output
    assert CheckpointStore(run / "checkpoints").names() == []
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{s3_port}"
    done = karat_done("train", str(recipe_file), f"run.dir={run}", *overrides)
    assert "resumed from step-00000002" in done.stdout


def test_no_checkpoint_at_the_url_is_newer_than_the_log_there(
    small_recipe: Callable[..., Recipe], s3: Callable[..., str], s3_port: int, tmp_path: Path
) -> None:
    url, directory = s3(tmp_path / "nothing"), RunDirectory(tmp_path / "run")
    directory.open(small_recipe())
    directory.begin(small_recipe())

    def save(step: int) -> None:
        log = MetricsLog(directory.metrics_file)
        log.write("train", step)
        log.close()
        directory.store.commit(directory.store.begin(step), {"step": step}, {})

    def save_meanwhile(number: int, request: Asked) -> Fault | None:
        if request.method != "PUT" or not request.path.endswith("metrics.jsonl"):
            return None
        if directory.store.names() == ["step-00000001"]:
            save(2)  # after the log was read
            return None
        return "403"  # the next copy of the log never arrives

    save(1)
    with FaultyProxy(s3_port, spoil=save_meanwhile) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        there = RunUrl(url, timeout=20)
        there.take("run", "run")
        copy = RunCopy(there, directory, 2, [])
        copy.begin()
        assert copy.wait(60)
        copy.end()
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{s3_port}"
    assert directory.store.names() == ["step-00000002", "step-00000001"]
    RunUrl(url).download_files(elsewhere := tmp_path / "elsewhere", lambda size: None)
    assert [event["step"] for event in events(elsewhere, "train")] == [1]
    assert names(url) == ["step-00000001"]


@pytest.mark.slow
def test_a_run_is_copied_and_fetched(recipe_file: Path, url: str, tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    done = karat_done("train", str(recipe_file), f"run.dir={run}", f"checkpoint.url={url}", "checkpoint.every_steps=3")
    assert "warning" not in done.stdout
    store = CheckpointStore(run / "checkpoints")
    assert names(url) == store.names()
    copy = json.loads((run / "copy.json").read_text())
    assert copy["url"] == url
    assert copy["problem"] == ""
    assert copy["checkpoint"] == store.pointed("latest")
    status = karat("status", str(run), "--once")
    assert f"{store.pointed('latest')} at {url}" in status.stdout.replace("\n", "")

    karat_done("fetch", url, str(again), "--checkpoint", "all")
    fetched = CheckpointStore(again / "checkpoints")
    for name in store.names():
        assert fetched.damage(name) is None
    assert fetched.names() == store.names()
    assert [fetched.pointed(which) for which in ("latest", "best")] == [store.pointed(w) for w in ("latest", "best")]
    for file in ("recipe.yaml", "classes.json", "metrics.jsonl", "summary.json", "run_id"):
        assert (again / file).read_bytes() == (run / file).read_bytes()
    here, there = (karat("eval", str(place)).stdout.rpartition("step-")[2] for place in (run, again))
    assert here == there
    assert "top-1" in there
    # A directory that has this run keeps what it has; another run's is refused.
    karat_done("fetch", url, str(again))
    # What it has beyond the copy stays, its log and pointer too.
    newer = again / "checkpoints" / "step-99999999"
    shutil.copytree(again / "checkpoints" / fetched.names()[0], newer)
    (again / "checkpoints" / "latest").write_text(f"{newer.name}\n")
    (again / "metrics.jsonl").write_text("newer\n")
    behind = karat_done("fetch", url, str(again))
    assert f"{again} has {newer.name}, which {url} does not have yet" in behind.stdout
    assert (again / "metrics.jsonl").read_text() == "newer\n"
    assert fetched.pointed("latest") == newer.name
    (again / "run_id").write_text("another\n")
    refused = karat("fetch", url, str(again))
    assert refused.returncode == 2
    assert f"{again} has another run than {url}" in refused.stderr


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_elsewhere_with_the_same_bits(
    recipe_file: Path, url: str, tmp_path: Path, processes: int
) -> None:
    whole, cut, elsewhere = tmp_path / "whole", tmp_path / "cut", tmp_path / "elsewhere"
    overrides = (*EVERY_STEP, "model.proj_drop=0.1")
    karat_done("train", str(recipe_file), f"run.dir={whole}", *overrides, processes=processes)

    killed = start(recipe_file, cut, *overrides, f"checkpoint.url={url}", processes=processes)
    wait_for_checkpoint(cut, 3, killed)
    deadline = time.monotonic() + 60
    while not names(url):
        assert time.monotonic() < deadline
    kill_all(killed)
    there = names(url)
    shutil.rmtree(cut)

    arguments = (str(recipe_file), f"run.dir={elsewhere}", *overrides, f"checkpoint.url={url}")
    resumed = karat_done("train", *arguments, processes=processes)
    (resume,) = events(elsewhere, "resume")
    assert resume["name"] == there[0]
    assert f"{there[0]} and the log were fetched from {url}" in resumed.stdout
    assert losses(elsewhere) == losses(whole)
    assert summary(elsewhere)["data_digest"] == summary(whole)["data_digest"] != 0
    assert equal(final_tensors(elsewhere), final_tensors(whole))
    assert names(url) == CheckpointStore(elsewhere / "checkpoints").names()


@pytest.mark.slow
def test_the_best_checkpoint_comes_along(recipe_file: Path, url: str, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    overrides = (f"checkpoint.url={url}", "checkpoint.every_steps=2", "train.epochs=2")
    karat_done("train", str(recipe_file), f"run.dir={run}", *overrides)
    best = f"step-{summary(run)['best_step']:08d}"
    WritableStore(f"{url}/checkpoints").remove(["best"])  # as if a kill had been before it
    shutil.rmtree(run)
    done = karat_done("train", str(recipe_file), f"run.dir={elsewhere}", *overrides)
    store = CheckpointStore(elsewhere / "checkpoints")
    assert set(store.names()) == {best, f"step-{STEPS:08d}"}
    assert store.pointed("best") == best
    assert "is gone" not in done.stdout
    # A start that is cut off after the newest one, before the best.
    shutil.rmtree(store.root / best)
    (store.root / "best").unlink()
    done = karat_done("train", str(recipe_file), f"run.dir={elsewhere}", *overrides)
    assert store.pointed("best") == best
    assert "is gone" not in done.stdout


@pytest.mark.slow
def test_damage_at_the_url_is_named_and_the_one_before_is_taken(recipe_file: Path, url: str, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    overrides = (f"checkpoint.url={url}", "checkpoint.every_steps=3")
    karat_done("train", str(recipe_file), f"run.dir={run}", *overrides)
    newest, before = names(url)[:2]
    raw = WritableStore(f"{url}/checkpoints/{newest}")
    raw.write("rank-00000.pt", b"damaged")
    shutil.rmtree(run)
    done = karat_done("train", str(recipe_file), f"run.dir={elsewhere}", *overrides)
    assert f"warning: checkpoint {newest} at {url} is damaged: " in done.stdout
    assert f"resumed from {before}" in done.stdout
    # The run has written it anew.
    karat_done("fetch", url, str(tmp_path / "fetched"), "--checkpoint", "latest")

    for name in names(url):
        WritableStore(f"{url}/checkpoints/{name}").write("state.json", b"{}")
    refused = karat("train", str(recipe_file), f"run.dir={tmp_path / 'third'}", *overrides)
    assert refused.returncode == 2
    assert re.search(r"error: checkpoint\.url = \S+: none of \d checkpoints is intact", refused.stderr)
    assert refused.stderr.count("error:") == 1


@pytest.mark.slow
def test_two_runs_do_not_mix(recipe_file: Path, url: str, tmp_path: Path) -> None:
    arguments = ("train", str(recipe_file), f"checkpoint.url={url}", "train.max_steps=2", "checkpoint.keep_best=false")
    karat_done(*arguments, f"run.dir={tmp_path / 'first'}")
    cases = {
        "run.seed": ("run.seed=1",),
        "run.name = other": ("run.name=other",),
    }
    for line, overrides in cases.items():
        refused = karat(*arguments, f"run.dir={tmp_path / line}", *overrides)
        assert refused.returncode == 2
        assert f"error: checkpoint.url = {url} belongs to another run, " in refused.stderr
        assert line in refused.stderr
        assert not (tmp_path / line / "recipe.yaml").exists()
    never = karat(*arguments, f"run.dir={tmp_path / 'never'}", "resume.mode=never")
    assert never.returncode == 2
    assert "has checkpoints and resume.mode = never" in never.stderr
    # Another run's directory, with an id and without.
    plain = ("train", str(recipe_file), "train.max_steps=2", f"run.dir={tmp_path / 'plain'}")
    karat_done(*plain)
    refused = karat(*plain, f"checkpoint.url={url}")
    assert "has checkpoints that were never copied there" in refused.stderr
    (tmp_path / "plain" / "run_id").write_text("0123\n")
    refused = karat(*plain, f"checkpoint.url={url}")
    assert "has another run_id" in refused.stderr
    assert len(names(url)) == 1


@pytest.mark.slow
def test_a_store_that_is_down_at_the_start_is_one_line(
    recipe_file: Path, s3: Callable[..., str], s3_port: int, tmp_path: Path
) -> None:
    with FaultyProxy(s3_port, spoil=lambda number, asked: "503") as proxy:
        url = s3(tmp_path / "nothing", proxy.port)
        done = karat("train", str(recipe_file), f"checkpoint.url={url}", "checkpoint.timeout=3")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: checkpoint\.url: s3://\S+: .* or go on without it by checkpoint\.url= \(from the b", line)
    assert not events_file(tmp_path).exists()


def events_file(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["403", "stall"])
def test_a_store_that_fails_meanwhile_does_not_end_the_run(
    fault: Fault, recipe_file: Path, s3: Callable[..., str], s3_port: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def spoil(number: int, asked: Asked) -> Fault | None:
        return fault if asked.method == "PUT" and "checkpoints" in asked.path else None

    with FaultyProxy(s3_port, spoil=spoil) as proxy:
        url = s3(tmp_path / "nothing", proxy.port)
        own = (f"run.dir={run}", f"checkpoint.url={url}", "checkpoint.every_steps=4", "checkpoint.timeout=5")
        arguments = ("train", str(recipe_file), *own)
        done = karat(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"warning: the last copy to {url} is not complete: ") == 1
    assert "the next start copies what is missing" in done.stdout
    status = karat("status", str(run), "--once").stdout.replace("\n", " ")
    assert re.search(r"copied\s+none yet at s3://", status)
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{s3_port}"
    assert names(url) == []
    karat_done(*arguments)  # nothing is left to train
    assert names(url) == CheckpointStore(run / "checkpoints").names()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_stopped_run_has_its_last_checkpoint_at_the_url(recipe_file: Path, url: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(recipe_file, run, "train.epochs=500", "checkpoint.every_steps=4", f"checkpoint.url={url}")
    wait_for_checkpoint(run, 4, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 75, output
    assert names(url)[0] == CheckpointStore(run / "checkpoints").pointed("latest")
    assert names(url)[0] == f"step-{summary(run)['steps']:08d}"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_kills_at_many_moments_of_the_copy(
    recipe_file: Path, s3: Callable[..., str], s3_port: int, tmp_path: Path
) -> None:
    """A run that saves at each step is killed again and again, each time in a new directory: what is there is whole."""
    with FaultyProxy(s3_port, latency=0.01) as proxy:
        url, seen = s3(tmp_path / "nothing", proxy.port), ""
        for number in range(4):
            run = tmp_path / f"run-{number}"
            process = start(recipe_file, run, "train.epochs=50", *EVERY_STEP, f"checkpoint.url={url}")
            reached = len(proxy.requests) + 60 + 17 * number
            deadline = time.monotonic() + 120
            while len(proxy.requests) < reached or (names(url) or [""])[0] <= seen:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline
            kill_all(process)
            seen = names(url)[0]
            fetched = tmp_path / f"fetched-{number}"
            karat_done("fetch", url, str(fetched), "--checkpoint", "all")
            shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_later_start_takes_the_url_over(recipe_file: Path, url: str, tmp_path: Path) -> None:
    """A run that goes on elsewhere while the first still trains: the first copies nothing more, and says so."""
    overrides = ("checkpoint.every_steps=2", f"checkpoint.url={url}")
    first = start(recipe_file, tmp_path / "first", "train.epochs=500", *overrides)
    wait_for_checkpoint(tmp_path / "first", 4, first)
    while not names(url):
        assert first.poll() is None
    second = karat(
        "train",
        str(recipe_file),
        f"run.dir={tmp_path / 'second'}",
        "train.epochs=500",
        *overrides,
        "train.max_steps=400",
    )
    first.send_signal(signal.SIGTERM)
    output, _ = first.communicate(timeout=90)
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"{url} belongs to another start by now" in output
    assert names(url) == CheckpointStore(tmp_path / "second" / "checkpoints").names()
