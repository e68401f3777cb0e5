"""Runs whose checkpoints are copied to an S3 server, and runs that go on from there."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from karat_scale.checkpoint.remote import RemoteCheckpoints
from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.commands.elsewhere import fetch_run
from karat_scale.engine.distributed import ALONE
from karat_scale.engine.reporting.progress import MetricsLog, Reporter, SilentDisplay
from karat_scale.foundation.errors import EXIT_LOST_PEER, EXIT_STOPPED, RecipeError
from karat_scale.foundation.files import open_to_read
from karat_scale.foundation.stores import WritableStore
from karat_scale.training.run_copy import RunCopy, RunUrl, _bring, finish_copy, follow
from karat_scale.training.run_directory import RunDirectory
from tests.clock import Clock
from tests.conftest import events, karat, karat_done, karat_refuses, summary
from tests.servers import Asked, Fault, FaultyProxy, s3, s3_port
from tests.training.runs import STEPS, assert_same_run, kill_all, start, stopped_by, wait_for_checkpoint, wait_in_run

__all__ = ["s3", "s3_port"]
EVERY_STEP = ("checkpoint.every_steps=1", "checkpoint.keep_last=2", "deepspeed.config=zero1")


def names(url: str) -> list[str]:
    remote = RemoteCheckpoints(WritableStore(url))
    remote.look()
    return remote.names()


@pytest.fixture
def url(s3, tmp_path) -> str:
    """Return the URL of an empty place on the server."""
    return s3(tmp_path / "nothing")


@pytest.fixture
def train(recipe_file, url, tmp_path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Return a function that trains the small recipe in the directory of a name, with a copy at the URL."""

    def run(name: str, *overrides: str, code: int = 0, processes: int = 1) -> "subprocess.CompletedProcess[str]":
        arguments = ("train", str(recipe_file), f"run.dir={tmp_path / name}", f"checkpoint.url={url}", *overrides)
        done = karat(*arguments, processes=processes)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@contextmanager
def spoiling(port: int, spoil: Callable[[int, Asked], Fault | None]) -> Iterator[None]:
    """Inside the block, let clients ask a proxy of the server, which spoils answers."""
    with FaultyProxy(port, spoil=spoil) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield


def test_what_cannot_be_a_url_of_checkpoints(small_recipe) -> None:
    for value, line in {
        "https://host/run": "nothing can be written to https://; use s3:// or gs://",
        "hf://datasets/user/set": "nothing can be written to hf://; use s3:// or gs://",
        "ftp://host/run": "ftp:// is not supported",
        "s3://key:secret@bucket/run": "s3://bucket/run has a user",
        "/scratch/run": "is not a URL; use s3:// or gs://, or run.dir for a directory",
    }.items():
        with pytest.raises(RecipeError, match=re.escape(line)) as error:
            small_recipe(f"checkpoint.url={value}")
        assert "secret" not in str(error.value)
    for key in ("run.dir", "resume.from", "init_from"):
        with pytest.raises(RecipeError, match=rf"{key} is a URL; "):
            small_recipe(f"{key}=s3://key:secret@bucket/run")


@pytest.mark.parametrize("command", ["eval", "analyze", "export", "predict", "status", "replay", "compare", "track"])
def test_a_url_in_place_of_a_run_names_the_command_that_fetches_it(command) -> None:
    line = karat_refuses(command, "s3://bucket/run", "1")
    assert "it is a URL; `karat fetch URL DIR` makes a directory of the run there" in line


def test_what_cannot_be_fetched_is_one_line(url, tmp_path) -> None:
    for place, line in {
        url: f"{url} has no run (it has no owner.json)",
        "https://host/run": "nothing can be written to https://; use s3:// or gs://",
        "file:///scratch/run": "nothing can be written to file://; use s3:// or gs://",
    }.items():
        assert line in karat_refuses("fetch", place, str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_what_was_cut_off_is_fetched_again(s3, tmp_path) -> None:
    there, run = tmp_path / "there", tmp_path / "run"
    (there / "snapshots").mkdir(parents=True)
    owner = {"run": "id", "name": "tiny", "start": "s", "host": "h", "time": 0.0}
    for name in ("recipe.yaml", "snapshots/step-00000000.safetensors"):
        (there / name).write_text("{}")
    (there / "owner.json").write_text(json.dumps(owner))
    too_long = f"snapshots/{'s' * 240}.safetensors"  # for the name of a temporary file
    (there / too_long).touch()
    url = s3(there)
    with pytest.raises(OSError, match="File name too long"):
        fetch_run(url, str(run), ["latest"])
    assert (run / "recipe.yaml").is_file()
    WritableStore(url).remove([too_long])
    assert fetch_run(url, str(run), ["latest"]) == 0
    assert (run / "snapshots" / "step-00000000.safetensors").read_text() == "{}"


def test_a_directory_of_other_files_is_left_as_it_is(s3, tmp_path) -> None:
    there, mine = tmp_path / "there", tmp_path / "mine"
    there.mkdir()
    mine.mkdir()
    owner = {"run": "id", "name": "tiny", "start": "s", "host": "h", "time": 0.0}
    (there / "owner.json").write_text(json.dumps(owner))
    for directory in (there, mine):
        (directory / "summary.json").write_text(json.dumps(directory.name))
    said = f"{mine} has files, but no run; name a new directory"
    assert said in karat_refuses("fetch", s3(there), str(mine))
    assert [path.name for path in mine.iterdir()] == ["summary.json"]
    assert (mine / "summary.json").read_text() == '"mine"'
    (mine / "summary.json").unlink()
    assert fetch_run(s3(there), str(mine), ["latest"]) == 0


def test_a_damaged_recipe_at_a_url_is_named_by_its_place(recipe_file, s3, tmp_path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    owner = {"run": "id", "name": recipe_file.stem, "start": "s", "host": "h", "time": 0.0}
    (there / "owner.json").write_text(json.dumps(owner))
    (there / "recipe.yaml").write_text("model: {depth: deep}\n")
    url = s3(there)
    line = karat_refuses("train", str(recipe_file), f"checkpoint.url={url}")
    assert line.startswith(f"error: checkpoint.url = {url}: recipe.yaml: model.depth = 'deep'")
    assert line.endswith("fix it, or use another checkpoint.url")


def test_ranks_beat_while_a_store_moves() -> None:
    class Slow:
        moved, left = 0, 5

        def wait(self, seconds: float) -> bool:
            self.left -= 1
            self.moved += self.left % 2
            return self.left == 0

    beats: list[str] = []
    assert follow(ALONE, Slow(), lambda: beats.append("beat"))
    assert len(beats) == 3  # at first, and when data came
    assert not follow(ALONE, Slow(), lambda: None, lambda: True)


@pytest.mark.parametrize(
    ("code", "signal_after", "seconds"),
    [
        (0, 1000, 1060),  # a run that has finished waits, until a signal
        (EXIT_STOPPED, 0, 60),
        (2, math.inf, 20),
        (1, math.inf, 5),
        (EXIT_LOST_PEER, math.inf, 5),
        (2, 1, 20),  # a signal gives no more time
    ],
)
def test_the_last_copy_may_take_as_long_as_the_exit_code_allows(
    code, signal_after, seconds, tmp_path, monkeypatch
) -> None:
    clock = Clock()
    begun, signals = clock.now, SimpleNamespace(received=None)
    monkeypatch.setattr("karat_scale.training.run_copy.time", SimpleNamespace(monotonic=clock, time=time.time))

    class Stuck(RunCopy):
        def wait(self, seconds: float) -> bool:
            clock.go(seconds)
            if clock.now - begun > signal_after:
                signals.received = signal.SIGTERM
            return False

    (tmp_path / "run").mkdir()
    copy = Stuck(SimpleNamespace(url="s3://bucket/run"), RunDirectory(tmp_path / "run"), 1, [])
    finish_copy(copy, ALONE, Reporter(SilentDisplay(), None), signals, code)
    assert seconds < clock.now - begun < seconds + 3
    waiting, warning = copy.messages()
    assert waiting == "waiting for the last copy to s3://bucket/run"
    assert "the last copy to s3://bucket/run is not complete: there was no time to finish it; the next start" in warning


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_signal_while_a_checkpoint_is_fetched_ends_the_start(recipe_file, train, url, s3_port, tmp_path) -> None:
    run = tmp_path / "run"
    train("run", "train.max_steps=2")
    shutil.rmtree(run)
    asked = threading.Event()

    def stall(number: int, request: Asked) -> Fault | None:
        if request.method != "GET" or not request.path.endswith(".pt"):
            return None
        asked.set()
        return "stall"

    with spoiling(s3_port, stall):
        process = start(recipe_file, run, "train.max_steps=2", f"checkpoint.url={url}")
        assert asked.wait(60)
        output = stopped_by(process, signal.SIGTERM)
    assert "stopped before training began; run the same command to resume" in output
    assert CheckpointStore(run / "checkpoints").names() == []
    assert "resumed from step-00000002" in train("run", "train.max_steps=2").stdout


def test_no_checkpoint_at_the_url_is_newer_than_the_log_there(small_recipe, url, s3_port, tmp_path) -> None:
    directory = RunDirectory(tmp_path / "run")
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
    with spoiling(s3_port, save_meanwhile):
        there = RunUrl(url, timeout=20)
        there.take("run", "run")
        copy = RunCopy(there, directory, 2, [])
        copy.begin()
        assert copy.wait(60)
        copy.end()
    assert directory.store.names() == ["step-00000002", "step-00000001"]
    RunUrl(url).download_files(elsewhere := tmp_path / "elsewhere", lambda size: None)
    assert [event["step"] for event in events(elsewhere, "train")] == [1]
    assert names(url) == ["step-00000001"]


@pytest.fixture
def begun(small_recipe, tmp_path) -> Callable[..., RunDirectory]:
    """Return a function that begins a run in a directory of a name, with a checkpoint of nothing for each step."""

    def begin(name: str, *steps: int) -> RunDirectory:
        directory = RunDirectory(tmp_path / name)
        directory.store = CheckpointStore(directory.store.root)  # which looks at hashes alone
        directory.open(small_recipe())
        directory.begin(small_recipe())
        for step in steps:
            directory.store.commit(directory.store.begin(step), {"step": step}, {})
        return directory

    return begin


def copied(url: RunUrl, directory: RunDirectory, keep_last: int) -> list[str]:
    """Copy a run once, and return the lines."""
    url.take("run", "run")
    copy = RunCopy(url, directory, keep_last, [])
    copy.begin()
    assert copy.wait(60)
    copy.end()
    return copy.messages()


def test_a_checkpoint_that_cannot_be_opened_counts_as_not_copied(begun, url, monkeypatch) -> None:
    def unreadable(path: Path) -> BinaryIO:
        if path.parent.name == "step-00000001":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open_to_read(path)

    directory = begun("run", 1, 2)
    monkeypatch.setattr("karat_scale.checkpoint.store.open_to_read", unreadable)
    said = f"warning: not copied: {directory.store.root / 'step-00000001'} cannot be read; the next save tries again"
    assert said in copied(RunUrl(url), directory, keep_last=2)
    assert names(url) == ["step-00000002"]


def test_a_checkpoint_that_is_damaged_at_the_url_does_not_count_there(begun, small_recipe, url) -> None:
    assert copied(RunUrl(url), begun("run", 1, 2, 3), keep_last=3) == []
    WritableStore(f"{url}/checkpoints/step-00000003").write("state.json", b"{}")
    there, directory = RunUrl(url), begun("elsewhere")
    there.checkpoints.look()
    assert len(_bring(small_recipe(), directory, there, lambda size: None)) == 2
    assert directory.store.names() == ["step-00000002"]
    assert copied(there, directory, keep_last=2) == []
    assert names(url) == ["step-00000002", "step-00000001"]
    assert json.loads(directory.copy_file.read_text())["checkpoint"] == "step-00000002"
    directory.store.commit(directory.store.begin(3), {"step": 3}, {})  # the same as before
    assert copied(there, directory, keep_last=2) == []
    assert names(url) == ["step-00000003", "step-00000002"]
    assert there.checkpoints.download("step-00000003", begun("third").store, lambda size: None) is None


def test_weights_of_the_same_size_are_sent_where_another_recipe_made_them(url, tmp_path) -> None:
    run, sent = tmp_path / "run", 0

    def count(size: int) -> None:
        nonlocal sent
        sent += size

    run.mkdir()
    for recipe, bytes_sent in ((b"lr 1", 4), (b"lr 2", 8), (b"lr 2", 8)):
        (run / "teacher.safetensors").write_bytes(recipe)
        RunUrl(url).upload_files(run, count)  # as a new start does
        assert WritableStore(url).read_small("teacher.safetensors", 99) == recipe
        assert sent == bytes_sent


@pytest.mark.slow
def test_a_run_is_copied_and_fetched(train, url, tmp_path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    assert "warning" not in train("run", "checkpoint.every_steps=3", "schedule.min_lr=0").stdout
    store, fetched = (CheckpointStore(place / "checkpoints") for place in (run, again))
    assert names(url) == store.names()
    copy = json.loads((run / "copy.json").read_text())
    assert (copy["url"], copy["problem"], copy["checkpoint"]) == (url, "", store.pointed("latest"))
    status = karat("status", str(run), "--once")
    assert f"{store.pointed('latest')} at {url}" in status.stdout.replace("\n", "")

    karat_done("fetch", url, str(again), "--checkpoint", "all")
    assert fetched.names() == store.names()
    assert [fetched.damage(name) for name in store.names()] == [None] * len(store.names())
    assert [fetched.pointed(which) for which in ("latest", "best")] == [store.pointed(w) for w in ("latest", "best")]
    for file in ("recipe.yaml", "classes.json", "metrics.jsonl", "summary.json", "run_id"):
        assert (again / file).read_bytes() == (run / file).read_bytes()
    here, there = (karat("eval", str(place)).stdout.rpartition("step-")[2] for place in (run, again))
    assert here == there
    assert "top-1" in there
    # A directory that has this run keeps what it has; another run's is refused.
    karat_done("fetch", url, str(again))
    # What it has beyond the copy stays, also its log and pointer.
    newer = again / "checkpoints" / "step-99999999"
    shutil.copytree(again / "checkpoints" / fetched.names()[0], newer)
    (again / "checkpoints" / "latest").write_text(f"{newer.name}\n")
    (again / "metrics.jsonl").write_text("newer\n")
    behind = karat_done("fetch", url, str(again))
    assert f"{again} has {newer.name}, which {url} does not have yet" in behind.stdout
    assert (again / "metrics.jsonl").read_text() == "newer\n"
    assert fetched.pointed("latest") == newer.name
    (again / "run_id").write_text("another\n")
    assert f"{again} has another run than {url}" in karat_refuses("fetch", url, str(again))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_elsewhere_with_the_same_bits(recipe_file, trained, train, url, tmp_path, processes) -> None:
    cut, own = tmp_path / "cut", (*EVERY_STEP, "model.proj_drop=0.1")
    killed = start(recipe_file, cut, *own, f"checkpoint.url={url}", processes=processes)
    wait_for_checkpoint(cut, 3, killed)
    wait_in_run(lambda: bool(names(url)), killed)
    kill_all(killed)
    there = names(url)[0]
    shutil.rmtree(cut)

    resumed = train("elsewhere", *own, processes=processes)
    (resume,) = events(tmp_path / "elsewhere", "resume")
    assert resume["name"] == there
    assert f"{there} and the log were fetched from {url}" in resumed.stdout
    assert_same_run(tmp_path / "elsewhere", trained("whole", *own, processes=processes))
    assert names(url) == CheckpointStore(tmp_path / "elsewhere" / "checkpoints").names()


@pytest.mark.slow
def test_the_best_checkpoint_comes_along(train, url, tmp_path) -> None:
    train("run", "checkpoint.every_steps=2")
    best = f"step-{summary(tmp_path / 'run')['best_step']:08d}"
    WritableStore(f"{url}/checkpoints").remove(["best"])  # as if a kill had come before it
    shutil.rmtree(tmp_path / "run")
    store = CheckpointStore(tmp_path / "elsewhere" / "checkpoints")
    assert "is missing" not in train("elsewhere", "checkpoint.every_steps=2").stdout
    assert set(store.names()) == {best, f"step-{STEPS:08d}"}
    assert store.pointed("best") == best
    # As after a start that was killed between the newest checkpoint and the best.
    shutil.rmtree(store.root / best)
    (store.root / "best").unlink()
    assert "is missing" not in train("elsewhere", "checkpoint.every_steps=2").stdout
    assert store.pointed("best") == best


@pytest.mark.slow
def test_damage_at_the_url_is_named_and_the_one_before_is_taken(train, url, tmp_path) -> None:
    train("run", "checkpoint.every_steps=3")
    newest, before = names(url)[:2]
    WritableStore(f"{url}/checkpoints/{newest}").write("rank-00000.pt", b"damaged")
    done = train("elsewhere", "checkpoint.every_steps=3")
    assert f"warning: checkpoint {newest} at {url} cannot be used: " in done.stdout
    assert f"resumed from {before}" in done.stdout
    # The run has written the damaged checkpoint again.
    karat_done("fetch", url, str(tmp_path / "fetched"), "--checkpoint", "latest")

    for name in names(url):
        WritableStore(f"{url}/checkpoints/{name}").write("state.json", b"{}")
    refused = train("third", "checkpoint.every_steps=3", code=2)
    assert re.search(r"error: checkpoint\.url = \S+ has no checkpoint that can be used", refused.stderr)
    assert refused.stderr.count("error:") == 1


@pytest.mark.slow
def test_a_copy_takes_the_place_of_a_damaged_checkpoint(train, url, tmp_path) -> None:
    train("run", "checkpoint.every_steps=3", "train.max_steps=6")
    store = CheckpointStore(tmp_path / "run/checkpoints")
    newest = store.names()[0]
    for name in store.names():
        (store.root / name / "state.json").write_text("{}")
    done = train("run", "checkpoint.every_steps=3", "train.max_steps=8")
    assert f"{newest} and the log were fetched from {url}" in done.stdout
    assert f"resumed from {newest}" in done.stdout


@pytest.mark.slow
def test_two_runs_do_not_mix(train, trained, url, tmp_path) -> None:
    own = ("train.max_steps=2", "checkpoint.keep_best=false")
    train("first", *own)
    for override, line in {"run.seed=1": "run.seed", "run.name=other": "run.name = other"}.items():
        refused = train(override, *own, override, code=2)
        assert f"error: checkpoint.url = {url} belongs to another run, " in refused.stderr
        assert line in refused.stderr
        assert not (tmp_path / override / "recipe.yaml").exists()
    never = train("never", *own, "resume.mode=never", code=2)
    assert "has checkpoints and resume.mode = never" in never.stderr
    # Another run's directory, with an id and without.
    plain = trained("plain", "train.max_steps=2")
    assert "has checkpoints that were never copied there" in train("plain", "train.max_steps=2", code=2).stderr
    (plain / "run_id").write_text("0123\n")
    assert "has another run_id" in train("plain", "train.max_steps=2", code=2).stderr
    assert len(names(url)) == 1


@pytest.mark.slow
def test_a_store_that_is_down_at_the_start_is_one_line(train, s3_port, tmp_path) -> None:
    with spoiling(s3_port, lambda number, asked: "503"):
        (line,) = train("run", "checkpoint.timeout=3", code=2).stderr.splitlines()
    assert re.match(
        r"error: checkpoint\.url: s3://\S+: .* or train from the beginning without a copy by checkpoint\.url=$", line
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["403", "stall"])
def test_a_store_that_fails_meanwhile_does_not_end_the_run(fault, train, url, s3_port, tmp_path) -> None:
    def spoil(number: int, asked: Asked) -> Fault | None:
        return fault if asked.method == "PUT" and "checkpoints" in asked.path else None

    with spoiling(s3_port, spoil):
        done = train("run", "checkpoint.every_steps=4", "checkpoint.timeout=5")
    assert done.stdout.count(f"warning: the last copy to {url} is not complete: ") == 1
    assert "the next start copies what is missing" in done.stdout
    status = karat("status", str(tmp_path / "run"), "--once").stdout.replace("\n", " ")
    assert re.search(r"copied\s+none yet at s3://", status)
    assert names(url) == []
    train("run", "checkpoint.every_steps=4", "checkpoint.timeout=5")  # nothing is left to train
    assert names(url) == CheckpointStore(tmp_path / "run" / "checkpoints").names()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_stopped_run_has_its_last_checkpoint_at_the_url(recipe_file, url, tmp_path) -> None:
    run = tmp_path / "run"
    process = start(recipe_file, run, "train.epochs=500", "checkpoint.every_steps=4", f"checkpoint.url={url}")
    wait_for_checkpoint(run, 4, process)
    stopped_by(process, signal.SIGTERM)
    assert names(url)[0] == CheckpointStore(run / "checkpoints").pointed("latest")
    assert names(url)[0] == f"step-{summary(run)['steps']:08d}"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_kills_at_many_moments_of_the_copy(recipe_file, s3, s3_port, tmp_path) -> None:
    """Kills of a run that saves at each step leave whole checkpoints at the URL; each start has a new directory."""
    with FaultyProxy(s3_port, latency=0.01) as proxy:
        url, seen = s3(tmp_path / "nothing", proxy.port), ""
        for number in range(4):
            run = tmp_path / f"run-{number}"
            process = start(recipe_file, run, "train.epochs=50", *EVERY_STEP, f"checkpoint.url={url}")
            reached = len(proxy.requests) + 60 + 17 * number
            wait_in_run(lambda: len(proxy.requests) >= reached and (names(url) or [""])[0] > seen, process)  # noqa: B023
            kill_all(process)
            seen = names(url)[0]
            karat_done("fetch", url, str(tmp_path / f"fetched-{number}"), "--checkpoint", "all")
            shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_later_start_takes_the_url_over(recipe_file, train, url, tmp_path) -> None:
    """When a second start resumes the run while the first still trains, the first copies nothing more and says so."""
    own = ("train.epochs=500", "checkpoint.every_steps=2")
    first = start(recipe_file, tmp_path / "first", *own, f"checkpoint.url={url}")
    wait_for_checkpoint(tmp_path / "first", 4, first)
    wait_in_run(lambda: bool(names(url)), first)
    train("second", *own, "train.max_steps=400")
    assert f"{url} was taken over by another start" in stopped_by(first, signal.SIGTERM)
    assert names(url) == CheckpointStore(tmp_path / "second" / "checkpoints").names()
