"""The same run, in one piece or in many, ends in the same weights."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.data.shards.folder import FolderSplit
from karat_scale.engine.optimizers import build_schedule
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.tasks.classification.task import TrainState
from tests.checkpoint.lies import tell
from tests.conftest import events, karat, karat_done, karat_here, summary
from tests.small_engines import equal
from tests.training.runs import STEPS, final_tensors, kill_all, losses, start, wait_for_checkpoint

EVERY_STEP = ("checkpoint.every_steps=1", "checkpoint.keep_last=2")


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("processes", "config"),
    [
        *(pytest.param(processes, "zero0", marks=pytest.mark.slow) for processes in (1, 2)),
        pytest.param(1, "zero1", marks=pytest.mark.slow),
        (2, "zero1"),
    ],
)
def test_a_killed_run_resumes_to_the_bits_of_an_uninterrupted_one(
    recipe_file: Path, tmp_path: Path, processes: int, config: str
) -> None:
    overrides = (f"deepspeed.config={config}", "model.proj_drop=0.1", *EVERY_STEP)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    karat_done("train", str(recipe_file), f"run.dir={whole}", *overrides, processes=processes)

    killed = start(recipe_file, cut, *overrides, processes=processes)
    wait_for_checkpoint(cut, 3, killed)
    kill_all(killed)
    karat_done("train", str(recipe_file), f"run.dir={cut}", *overrides, processes=processes)

    (resume,) = events(cut, "resume")
    assert 3 <= resume["step"] < STEPS
    assert losses(cut) == losses(whole)
    assert summary(cut)["data_digest"] == summary(whole)["data_digest"] != 0
    assert equal(final_tensors(cut), final_tensors(whole))
    assert summary(cut)["restarts"] == 1


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGUSR2))],
    ids=lambda number: number.name,
)
def test_a_signal_saves_at_the_next_step_and_exits_75(
    recipe_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = start(recipe_file, run, "train.epochs=500", "checkpoint.every_steps=4")
    wait_for_checkpoint(run, 4, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert number.name in output
    store = CheckpointStore(run / "checkpoints")
    latest = store.pointed("latest")
    assert latest is not None
    assert store.damage(latest) is None
    assert summary(run)["exit"] == 75
    assert summary(run)["steps"] == store.state(latest)["step"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(recipe_file, run, "train.epochs=500", "checkpoint.every_steps=4", processes=2)
    wait_for_checkpoint(run, 4, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    os.kill(int(ranks[0]), signal.SIGUSR2)
    process.communicate(timeout=60)
    assert summary(run)["exit"] == 75  # torchrun turns a rank's code into 1
    latest = CheckpointStore(run / "checkpoints").pointed("latest")
    assert latest == f"step-{summary(run)['steps']:08d}"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_signal_during_evaluation_evaluates_after_the_resume(
    recipe_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    images, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(image_folder, images)
    split = FolderSplit(images, "val", 4)
    held = Path(split.file_of(len(split) - 2))  # one more image follows it
    encoded = held.read_bytes()
    held.unlink()
    os.mkfifo(held)  # opening it for writing waits until the evaluation opens it for reading
    folder = ("data.backend=folder", f"data.path={images}", "train.eval_batch=1", "train.epochs=1")
    process = start(recipe_file, run, *folder)
    with held.open("wb") as pipe:
        process.send_signal(signal.SIGTERM)
        pipe.write(encoded)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert events(run, "eval") == []
    held.unlink()
    held.write_bytes(encoded)
    karat_done("train", str(recipe_file), f"run.dir={run}", *folder)
    assert [event["step"] for event in events(run, "eval")] == [8]
    assert summary(run)["last_top1"] is not None
    whole = tmp_path / "whole"
    karat_done("train", str(recipe_file), f"run.dir={whole}", *folder)
    assert equal(final_tensors(run, 8), final_tensors(whole, 8))  # the learning rate of the last step, too


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_and_two_processes_see_the_same_loss(recipe_file: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for run, processes in ((one, 1), (two, 2)):
        karat_done("train", str(recipe_file), f"run.dir={run}", processes=processes)
    first, second = losses(one), losses(two)
    assert first.keys() == second.keys() == set(range(1, STEPS + 1))
    assert second[1] == pytest.approx(first[1], rel=1e-6)
    assert list(second.values()) == pytest.approx(list(first.values()), rel=1e-5)
    top1 = [[event["top1"] for event in events(run, "eval")] for run in (one, two)]
    assert top1[0] == top1[1]
    assert all(event["images"] == 28 for event in events(two, "eval"))


def test_micro_batches_do_not_change_the_loss(recipe_file: Path, tmp_path: Path) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    karat("train", str(recipe_file), f"run.dir={whole}", "train.epochs=1")
    karat("train", str(recipe_file), f"run.dir={pieces}", "train.epochs=1", "train.micro_batch=2")
    assert list(losses(pieces).values()) == pytest.approx(list(losses(whole).values()), rel=1e-5)


def test_a_finished_run_stays_finished(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    karat("train", str(recipe_file), f"run.dir={run}", "train.epochs=1")
    before = summary(run)
    again = karat_done("train", str(recipe_file), f"run.dir={run}", "train.epochs=1")
    assert "nothing is left to do: the run has trained its train.epochs = 1" in again.stdout
    after = summary(run)
    assert len(events(run, "eval")) == 1
    assert {key: after[key] for key in ("steps", "best_top1", "images_per_second")} == {
        key: before[key] for key in ("steps", "best_top1", "images_per_second")
    }


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = (
        "train.max_steps=6",
        "checkpoint.every_steps=2",
        "train.eval_every_epochs=50",
        "checkpoint.keep_last=3",
    )
    karat("train", str(recipe_file), f"run.dir={run}", *overrides)
    victim = run / "checkpoints" / "step-00000006" / "mp_rank_00_model_states.pt"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    again = karat_done("train", str(recipe_file), f"run.dir={run}", *overrides)
    assert "step-00000006 is damaged: mp_rank_00_model_states.pt has changed" in again.stdout
    assert events(run, "resume")[0]["step"] == 4
    assert CheckpointStore(run / "checkpoints").damage("step-00000006") is None  # written anew


def test_no_intact_checkpoint_is_an_error_not_a_fresh_start(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    karat("train", str(recipe_file), f"run.dir={run}", "train.max_steps=2")
    for manifest in (run / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    again = karat("train", str(recipe_file), f"run.dir={run}", "train.max_steps=2")
    assert again.returncode == 2
    assert "none of 1 checkpoints is intact" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.slow
def test_a_branch_starts_from_another_runs_checkpoint(recipe_file: Path, tmp_path: Path) -> None:
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    karat("train", str(recipe_file), f"run.dir={trunk}", "train.max_steps=8")
    source = trunk / "checkpoints" / "step-00000008"
    karat_done("train", str(recipe_file), f"run.dir={branch}", f"resume.from={source}", "optim.lr=1e-4")
    assert json.loads((source / "state.json").read_text())["step"] == events(branch, "resume")[0]["step"] == 8
    assert summary(branch)["steps"] == STEPS
    again = karat("train", str(recipe_file), f"run.dir={branch}", f"resume.from={trunk}", "optim.lr=1e-4")
    assert events(branch, "resume")[1]["step"] == STEPS, again.stdout  # its own checkpoint, not the trunk's
    assert summary(branch)["best_step"] == STEPS
    assert "is gone" not in again.stdout + again.stderr


def test_a_branch_never_has_its_trunks_best(small_recipe, make_checkpoints, tmp_path: Path) -> None:
    trunk, branch = (make_checkpoints(small_recipe(), tmp_path / name) for name in ("trunk", "branch"))
    state = TrainState(step=1, samples=8)
    state.record({"top1": 99.0, "top5": 99.5})
    assert trunk.save(state)
    begun = branch.load(str(trunk.store.root / "step-00000001"))
    assert (begun.best_step, begun.best_top1, begun.last_top1) == (None, None, 99.0)


def test_a_branch_of_another_image_size_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    trunk = tmp_path / "trunk"
    karat_here("train", str(recipe_file), f"run.dir={trunk}", "train.max_steps=1")
    done = karat(
        "train", str(recipe_file), f"run.dir={tmp_path / 'branch'}", f"resume.from={trunk}", "model.image_size=24"
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: checkpoint {trunk / 'checkpoints/step-00000001'}: ")


def test_a_branch_from_nowhere_is_one_line(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = karat("train", str(recipe_file), f"run.dir={tmp_path / 'branch'}", "resume.from=~/nowhere")
    assert (done.returncode, done.stderr) == (
        2,
        "error: resume.from = ~/nowhere is no directory; name a checkpoint's or a run's\n",
    )


@pytest.mark.slow
def test_a_finished_run_is_extended_on_the_longer_runs_schedule(recipe_file: Path, tmp_path: Path) -> None:
    run, branch = tmp_path / "run", tmp_path / "branch"
    karat("train", str(recipe_file), f"run.dir={run}", "train.epochs=1")
    longer = karat_done("train", str(recipe_file), f"run.dir={run}", "train.epochs=3")
    assert "differs from that of the earlier start: train.epochs (1 -> 3)" in longer.stdout
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.train.epochs == 3
    schedule = build_schedule(recipe, 8)
    rates = {event["step"]: event["lr"] for event in events(run, "train")}
    assert {step: rates[step] for step in range(9, 25)} == {step: schedule.lr(step - 1) for step in range(9, 25)}
    assert [event["step"] for event in events(run, "eval")] == [8, 16, 24]
    # A branch may be named by its trunk's directory, and goes on from the newest checkpoint.
    branched = karat("train", str(recipe_file), f"run.dir={branch}", f"resume.from={run}", "train.epochs=4")
    assert events(branch, "resume")[0]["step"] == 24, branched.stdout + branched.stderr


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_same_command_resumes_at_another_world_size_and_stage(recipe_file: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    one_epoch = ("train.epochs=1", "train.eval_every_epochs=1")
    karat_done(
        "train",
        str(recipe_file),
        f"run.dir={run}",
        *one_epoch,
        "deepspeed.config=zero1",
        "train.max_steps=4",
        processes=2,
    )
    karat_done("train", str(recipe_file), f"run.dir={run}", *one_epoch, "deepspeed.config=zero3")
    assert events(run, "resume")[0]["step"] == 4
    karat("train", str(recipe_file), f"run.dir={whole}", *one_epoch)
    assert losses(run).keys() == losses(whole).keys() == set(range(1, 9))
    assert list(losses(run).values()) == pytest.approx(list(losses(whole).values()), rel=1e-5)
    assert summary(run)["data_digest"] == summary(whole)["data_digest"]
    # What was written at stage 3 is evaluated like any other.
    evaluated = karat_done("eval", str(run), "--checkpoint", "latest")
    assert f"top-1 {events(run, 'eval')[-1]['top1']:.2f} %" in evaluated.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_checkpoint_that_lies_is_named_and_the_one_before_is_used(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ("train.max_steps=4", "checkpoint.every_steps=2", "deepspeed.config=zero2")
    karat_done("train", str(recipe_file), f"run.dir={run}", *overrides, processes=2)
    last = run / "checkpoints" / "step-00000004"
    tell(last, "rank-00001.pt", "layout.0.0", ("nothing", 0, 0, 1))
    read = karat_done("eval", str(run))
    assert "step-00000002 is taken instead" in read.stderr
    again = karat_done("train", str(recipe_file), f"run.dir={run}", *overrides, processes=2)
    assert "step-00000004 is damaged: rank-00001.pt: a layout with more of nothing" in again.stdout
    assert events(run, "resume")[0]["step"] == 2
    assert RunDirectory(run).store.damage("step-00000004") is None  # written anew
