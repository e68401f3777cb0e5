import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from karat_scale.data.prepare import make_webdataset
from karat_scale.data.shards import shard_format
from karat_scale.foundation.errors import DataError
from tests.conftest import wait_until
from tests.data.backends.helpers import flip
from tests.data.prepare.conftest import SCRIPTS
from tests.data.prepare.images import contents, write_folders
from tests.data.prepare.making import make_shards, shard_samples


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    write_folders(root, per_class=40)
    return root


def make(src, out, *options):
    return make_shards(src, out, "--split", "train", *options).splits["train"]


def start(src, out, *options):
    command = [sys.executable, str(SCRIPTS / "make_webdataset.py"), "--src", str(src), "--out", str(out), *options]
    environment = {"PYTHONPATH": str(SCRIPTS.parent), "PATH": os.environ["PATH"]}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_run_resumes_at_the_same_shard(folders, tmp_path, workers):
    options = ("--split", "train", "--shard-samples", "2", "--workers", workers)
    make(folders, tmp_path / "whole", "--shard-samples", "2")
    out = tmp_path / "out"
    run = start(folders, out, *options)
    wait_until(lambda: len(list(out.glob(".*.made.json"))) >= 3, 240)
    at_work = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not psutil.wait_procs(at_work, timeout=30)[1]  # no worker is left to write
    assert not (out / "dataset.json").exists()
    before = contents(out, ".*.made.json").keys()
    finished = {name[1:].split(".")[0] for name in before}
    times = {name: (out / f"{name}.tar").stat().st_mtime_ns for name in finished}
    again = start(folders, out, *options)
    said, _ = again.communicate()
    assert again.returncode == 0, said
    assert f"{len(finished)} of 60 shards were finished before; resuming" in said
    assert contents(out) == contents(tmp_path / "whole")
    assert times == {name: (out / f"{name}.tar").stat().st_mtime_ns for name in finished}


def interrupted(folders, out, monkeypatch, after=3):
    """Make shards, and interrupt the run when it has written `after` of them."""
    real, counter = make_webdataset.write_shard, itertools.count()

    def write(*arguments):
        if next(counter) == after:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(make_webdataset, "write_shard", write)
        with pytest.raises(KeyboardInterrupt):
            make(folders, out, "--shard-samples", "20")


def test_a_finished_shard_that_was_damaged_since_is_made_again(folders, tmp_path, monkeypatch, capsys):
    make(folders, tmp_path / "whole", "--shard-samples", "20")
    out = tmp_path / "out"
    interrupted(folders, out, monkeypatch)
    flip(out / "train-000001.tar", 2000)
    (out / ".train-000002.made.json").write_text("{")
    for name in (".train-000001.tar.a1b2", ".train-000003.index.npz.a1b2", "..train-000003.made.json.a1b2"):
        (out / name).write_text("what a kill leaves")
    capsys.readouterr()
    make(folders, out, "--shard-samples", "20")
    assert "1 of 6 shards were finished before" in capsys.readouterr().out
    assert contents(out) == contents(tmp_path / "whole")


@pytest.fixture
def hashed_together(monkeypatch):
    """Let each tar wait until two are hashed at the same time; return a list of the names for which that happened."""
    real, both, met = shard_format.check_file, threading.Barrier(2), []

    def check(path, record, **more):
        if record.name.endswith(".tar"):
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(timeout=20)
                met.append(record.name)
        real(path, record, **more)

    monkeypatch.setattr(shard_format, "check_file", check)
    return met


def test_each_worker_hashes_a_shard_at_the_same_time(folders, tmp_path, monkeypatch, hashed_together, capsys):
    out = tmp_path / "out"
    interrupted(folders, out, monkeypatch, after=4)
    make(folders, out, "--shard-samples", "20", "--workers", "2")
    assert "4 of 6 shards were finished before" in capsys.readouterr().out
    assert len(hashed_together) == 4
    make(folders, out, "--shard-samples", "20", "--workers", "2")
    assert "120 samples in 6 shards are complete and correct" in capsys.readouterr().out
    assert len(hashed_together) == 4 + 6


def test_shards_of_other_settings_are_not_taken_over(folders, tmp_path, monkeypatch, capsys):
    make(folders, tmp_path / "whole", "--shard-samples", "20", "--seed", "5")
    interrupted(folders, tmp_path / "out", monkeypatch)
    make(folders, tmp_path / "out", "--shard-samples", "20", "--seed", "5")
    assert "were finished before" not in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_subset_takes_so_many_of_each_class_and_resized_ones_have_their_quality(folders, tmp_path):
    record = make(folders, tmp_path / "out", "--subset", "5")
    assert (record.samples, record.per_class) == (15, [5, 5, 5])
    make(folders, tmp_path / "other", "--subset", "5", "--seed", "1")
    found, other = ({key for key, _, _ in shard_samples(tmp_path / name)} for name in ("out", "other"))
    assert found != other
    with pytest.raises(DataError, match="made with subset = 5, now 6"):
        make(folders, tmp_path / "out", "--subset", "6")
    record = make(folders, tmp_path / "small", "--subset", "5", "--resize", "16", "--quality", "80")
    assert (record.samples, record.made["quality"]) == (15, 80)
