"""What a run prints at its end, and leaves in summary.json."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from karat_scale.engine.reporting.progress import PlainDisplay, Reporter
from karat_scale.foundation.errors import PeerError, RunDirectoryError, UserError
from karat_scale.foundation.machine import this_node
from karat_scale.training.outcome import Outcome, concluded
from karat_scale.training.run import train
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.classification.task import ClassificationTask, TrainState
from tests.conftest import events, karat_here, karat_says, summary
from tests.small_engines import make_trainer


def _fill(disk: Path, but: int) -> None:
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - but))


def test_a_disk_without_room_for_a_checkpoint_is_refused_at_the_start(train_recipe, small_disk) -> None:
    run = small_disk / "run"
    _fill(small_disk, but=200_000)
    done = train_recipe("train.max_steps=1", f"run.dir={run}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: run.dir = {run}: there is no room for a checkpoint: it needs 0.")
    assert line.endswith("MB free; make room, or choose another run.dir")
    assert events(run, "train") == []
    assert summary(run)["exit"] == 2


def test_a_run_whose_first_save_fails_ends_there_and_a_later_failure_is_told_once_a_step(
    small_recipe, world, small_disk, capsys
) -> None:
    own = ("checkpoint.every_steps=2", "data.workers=0", f"run.dir={small_disk / 'run'}")
    trainer = make_trainer(small_recipe(*own), world)
    trainer.checkpoints.check_room()
    _fill(small_disk, but=200_000)
    with pytest.raises(RunDirectoryError, match=r"no checkpoint could be saved: .* starts from the beginning$"):
        trainer.run()
    trainer.task.close()
    assert trainer.state.step == 2

    (small_disk / "filler").unlink()
    trainer = make_trainer(small_recipe(*own), world)
    assert trainer.run(stop_step=4)
    capsys.readouterr()
    _fill(small_disk, but=200_000)
    with pytest.raises(RunDirectoryError, match=r"the last checkpoint could not be saved: .* from step-00000004$"):
        trainer.run()
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert [line.split()[3] for line in warnings] == ["step-00000006", "step-00000008"]
    trainer.task.close()


def test_a_disk_that_takes_not_even_the_figures_is_one_line(train_recipe, small_disk) -> None:
    (small_disk / "run").mkdir()
    _fill(small_disk, but=0)
    done = train_recipe(f"run.dir={small_disk / 'run'}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line


def test_a_start_that_fails_leaves_the_outcome_of_a_finished_run(train_recipe, shards, tmp_path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    assert train_recipe("train.epochs=1").returncode == 0
    finished, ends = summary(run), events(run, "end")
    assert train_recipe("train.epochs=1", "data.path=nowhere").returncode == 2
    shutil.copytree(shards, other)
    record = other / "dataset.json"
    record.write_text(record.read_text().replace("class3", "class4"))
    refused = train_recipe("train.epochs=1", f"data.path={other}")  # after it was resumed
    assert refused.returncode == 2
    assert "data.path has other classes; correct data.path, add 'resume.allow=[data.path]'" in refused.stderr
    assert summary(run) == finished
    assert events(run, "end") == ends
    assert "class4" not in (run / "classes.json").read_text()
    shown = karat_says("status", str(run), "--once")
    assert "finished (exit 0)" in shown
    assert "'starting'" not in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_job_with_gpus_that_torch_does_not_see_is_refused(small_recipe, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    recipe = small_recipe()
    with pytest.raises(UserError, match=rf"the job has GPUs, but torch on {this_node()} sees none; run karat doctor"):
        train(ClassificationTask, recipe)
    assert not Path(recipe.run.dir).exists()


def test_a_start_that_fails_is_told_of_a_run_that_is_not_finished(train_recipe, shards, tmp_path) -> None:
    damaged = Path(shutil.copytree(shards, tmp_path / "damaged"))
    os.truncate(damaged / "train-000001.tar", 1000)
    assert train_recipe(f"data.path={damaged}").returncode == 2
    assert summary(tmp_path / "run")["exit"] == 2
    (damaged / "train-000001.tar").unlink()
    assert train_recipe(f"data.path={damaged}").returncode == 2
    assert "train-000001.tar is missing" in summary(tmp_path / "run")["reason"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PeerError("rank 1 is gone"), 76),
        (OSError(errno.EACCES, "Permission denied", "a.tar"), 2),
        (OSError(errno.ESTALE, "Stale file handle", "a.tar"), 1),
        (KeyError("a"), 1),
    ],
)
def test_the_summary_has_the_exit_code_of_the_command(small_recipe, world, tmp_path, error, code) -> None:
    recipe, directory = small_recipe(), RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    outcome, reporter = Outcome(recipe, world, TrainState(), begun=True), Reporter(PlainDisplay(), None)
    with pytest.raises(type(error)), concluded(outcome, directory, SimpleNamespace(received=None), reporter, None):
        raise error
    assert summary(directory.path)["exit"] == code


def test_a_file_server_that_fails_at_the_end_does_not_hide_what_ended_the_run(
    small_recipe, world, tmp_path, monkeypatch
) -> None:
    def fail(path: Path, text: str) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr("karat_scale.training.run_directory.replace_file", fail)
    directory, reporter = RunDirectory(tmp_path / "run"), Reporter(PlainDisplay(), None)
    outcome = Outcome(small_recipe(), world, TrainState(), begun=True)
    with pytest.raises(PeerError), concluded(outcome, directory, SimpleNamespace(received=None), reporter, None):
        raise PeerError("rank 1 is gone")


def test_notices_are_told_once_and_a_damaged_summary_is_written_anew(train_recipe, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text("")
    done = train_recipe("train.max_steps=1", "model.num_classes=5")
    assert done.returncode == 0
    assert done.stdout.count("notice: the data has 4 classes, but model.num_classes = 5") == 1
    assert done.stdout.count("summary.json is damaged; it will be written again") == 1
    assert summary(tmp_path / "run")["exit"] == 0


def test_an_implementation_that_cannot_run_is_refused_before_the_first_step(train_recipe) -> None:
    done = train_recipe("attention.implementation=triton", "attention.base=silu", "train.max_steps=1")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: attention.implementation = triton cannot run here: ")


def test_the_first_step_and_the_last_are_logged_however_seldom_others_are(recipe_file, tmp_path) -> None:
    assert karat_here("train", str(recipe_file), "log.every_steps=1000", "train.max_steps=3") == 0
    logged = events(tmp_path / "run", "train")
    assert [event["step"] for event in logged] == [1, 3]
    assert logged[0]["images_per_second"] is None  # the first step is not timed
