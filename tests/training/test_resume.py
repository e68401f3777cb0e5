"""A run that is stopped and resumed ends with the same weights as one that is not."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import termios
from pathlib import Path

import psutil
import pytest

from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.commands.analyze.history import achieved
from karat_scale.commands.analyze.trained_run import open_run
from karat_scale.engine.heartbeat import read_signs
from karat_scale.engine.optimizers import build_schedule
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.tasks.classification.task import TrainState
from tests.conftest import events, karat_command, karat_done, karat_environment, karat_here, karat_refuses, summary
from tests.small_engines import CONVIT, SWIN
from tests.training.harm import HARMS
from tests.training.runs import (
    STEPS,
    assert_a_kill_changes_nothing,
    assert_same_run,
    losses,
    start,
    start_torchrun,
    stopped_by,
    wait_for_checkpoint,
    wait_in_run,
)

ON_DEVICE = ("augment.run_on=device", "augment.erasing=0.5")
DROPS = "model.proj_drop=0.1"
LAYERS = ("deepspeed.config=zero1", "train.recompute.policy=attention", "optim.layer_decay=0.8")
FROZEN = ("deepspeed.config=zero3", "train.recompute.policy=every", "train.freeze=patch_embed.*")
RUNS = {
    "one rank": (1, (DROPS,)),
    "two ranks at stage 1": (2, (DROPS, "deepspeed.config=zero1")),
    "images augmented on the device": (1, ON_DEVICE),
    "ConViT": (1, (*CONVIT, *LAYERS, "model.drop_path=0.1")),
    "Swin": (1, (*SWIN, *FROZEN, "model.drop_path=0.1")),
}
CASES = [pytest.param(name, marks=() if name == "two ranks at stage 1" else pytest.mark.slow) for name in RUNS]
ENDLESS = ("train.epochs=500", "checkpoint.every_steps=4")


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_resumes_to_the_bits_of_an_uninterrupted_one(recipe_file, tmp_path, name) -> None:
    processes, overrides = RUNS[name]
    assert_a_kill_changes_nothing(recipe_file, tmp_path, *overrides, processes=processes)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGUSR2))],
    ids=lambda number: number.name,
)
def test_a_signal_saves_at_the_next_step_and_exits_75(recipe_file, tmp_path, number) -> None:
    run = tmp_path / "run"
    process = start(recipe_file, run, *ENDLESS)
    wait_for_checkpoint(run, 4, process)
    assert number.name in stopped_by(process, number)
    store = CheckpointStore(run / "checkpoints")
    latest = store.pointed("latest")
    assert store.damage(latest) is None
    assert summary(run)["exit"] == 75
    assert summary(run)["steps"] == store.state(latest)["step"]


def test_a_killed_data_worker_ends_the_run_with_one_line_and_exit_code_2(recipe_file, tmp_path) -> None:
    run = tmp_path / "run"
    process = start(recipe_file, run, *ENDLESS, "checkpoint.asynchronous=false")  # so the worker is the only child
    wait_for_checkpoint(run, 4, process)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    output, _ = process.communicate(timeout=90)
    assert process.returncode == summary(run)["exit"] == 2, output
    *_, line = output.splitlines()
    assert line.startswith("error: a data worker died"), output
    assert "Traceback" not in output
    latest = CheckpointStore(run / "checkpoints").pointed("latest")
    assert CheckpointStore(run / "checkpoints").damage(latest) is None


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("launched", [(), ("launch", "--ranks", "2")], ids=["alone", "launched"])
def test_a_run_saves_and_stops_when_its_terminal_is_closed(recipe_file, tmp_path, launched) -> None:
    run = tmp_path / "run"
    line = karat_command([*launched, "train", str(recipe_file), f"run.dir={run}", *ENDLESS, "data.workers=1"])
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        line,
        env=karat_environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    while not (run / "checkpoints" / "latest").exists():
        os.read(ours, 10**6)
    os.close(ours)
    assert process.wait(60) == 75
    latest = CheckpointStore(run / "checkpoints").pointed("latest")
    assert (summary(run)["exit"], latest) == (75, f"step-{summary(run)['steps']:08d}")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_signal_to_one_of_two_ranks_stops_both_at_the_same_step(recipe_file, tmp_path) -> None:
    run = tmp_path / "run"
    process = start_torchrun(recipe_file, run, *ENDLESS)
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
def test_a_signal_during_evaluation_evaluates_after_the_resume(recipe_file, trained, image_folder, tmp_path) -> None:
    images, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(image_folder, images)
    for image in list((images / "val").rglob("*.*")):
        for copy in range(100):  # one by one they take longer than two heartbeats
            os.link(image, image.with_stem(f"{image.stem}-{copy}"))
    folder = ("data.backend=folder", f"data.path={images}", "train.eval_batch=1", "train.epochs=1")
    process = start(recipe_file, run, *folder)
    wait_in_run(lambda: any(sign.doing == "evaluating" for sign in read_signs(run)), process)
    stopped_by(process, signal.SIGTERM)
    assert events(run, "eval") == []
    trained("run", *folder)
    assert [event["step"] for event in events(run, "eval")] == [8]
    assert summary(run)["last_top1"] is not None
    assert_same_run(run, trained("whole", *folder))  # the learning rate of the last step, too


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("overrides", [(), ON_DEVICE], ids=["workers", "device"])
def test_one_and_two_processes_see_the_same_loss(trained, overrides) -> None:
    one, two = trained("one", *overrides), trained("two", *overrides, processes=2)
    first, second = losses(one), losses(two)
    assert first.keys() == second.keys() == set(range(1, STEPS + 1))
    assert second[1] == pytest.approx(first[1], rel=1e-6)
    assert second == pytest.approx(first, rel=1e-5)
    assert summary(one)["data_digest"] == summary(two)["data_digest"] != 0
    top1 = [[event["top1"] for event in events(run, "eval")] for run in (one, two)]
    assert top1[0] == top1[1]
    assert all(event["images"] == 28 for event in events(two, "eval"))


def test_micro_batches_do_not_change_the_loss(trained) -> None:
    whole, pieces = (trained(name, "train.epochs=1", f"train.micro_batch={name}") for name in ("8", "2"))
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-5)


def test_a_finished_run_stays_finished(train_recipe, trained) -> None:
    run = trained("run", "train.epochs=1")
    before = summary(run)
    again = train_recipe("train.epochs=1")
    assert "nothing is left to do: the run has trained its train.epochs = 1" in again.stdout
    assert len(events(run, "eval")) == 1
    assert summary(run) == before
    shorter = train_recipe("train.epochs=1", "train.max_steps=3")
    assert "the run has taken 8 steps, more than train.max_steps = 3; raise it to go on" in shorter.stdout
    recipe = (run / "recipe.yaml").read_bytes()
    train_recipe("train.epochs=1", "optim.lr=1", "resume.allow=optim.lr")
    assert (run / "recipe.yaml").read_bytes() == recipe  # nothing was trained at that rate
    assert summary(run) == before
    branch = run.with_name("branch")
    train_recipe("train.epochs=1", f"run.dir={branch}", f"resume.from={run}")
    assert (branch / "recipe.yaml").is_file()
    assert (branch / "classes.json").is_file()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(train_recipe, trained) -> None:
    own = ("train.max_steps=6", "checkpoint.every_steps=2", "train.eval_every_epochs=50", "checkpoint.keep_last=3")
    run = trained("run", *own)
    HARMS["one bit flipped"](run / "checkpoints" / "step-00000006" / "mp_rank_00_model_states.pt")
    again = train_recipe(*own)
    assert "step-00000006 cannot be used: mp_rank_00_model_states.pt has changed" in again.stdout
    assert events(run, "resume")[0]["step"] == 4
    assert CheckpointStore(run / "checkpoints").damage("step-00000006") is None  # written anew
    for manifest in (run / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    again = train_recipe(*own)  # an error, not a fresh start
    assert again.returncode == 2
    assert f"error: run.dir = {run} has no checkpoint that can be used (manifest.json is missing); " in again.stderr
    assert "Traceback" not in again.stderr
    branch = train_recipe(*own, f"run.dir={run}-branch", f"resume.from={run}")
    why = "has no checkpoint that can be used (manifest.json is missing); name another run or checkpoint"
    assert branch.stderr == f"error: resume.from = {run} {why}\n"


@pytest.mark.slow
def test_a_branch_starts_from_another_runs_checkpoint(recipe_file, trained) -> None:
    trunk = trained("trunk", "train.max_steps=8")
    source = trunk / "checkpoints" / "step-00000008"
    branch = trained("branch", f"resume.from={source}", "optim.lr=1e-4")
    assert json.loads((source / "state.json").read_text())["step"] == events(branch, "resume")[0]["step"] == 8
    assert summary(branch)["steps"] == STEPS
    again = karat_done("train", str(recipe_file), f"run.dir={branch}", f"resume.from={trunk}", "optim.lr=1e-4")
    assert events(branch, "resume")[1]["step"] == STEPS, again.stdout  # its own checkpoint, not the trunk's
    assert summary(branch)["best_step"] == STEPS
    assert "is gone" not in again.stdout + again.stderr


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_line_of_the_log_has_the_loss_of_all_its_steps_after_a_resume_between(trained, processes) -> None:
    own = ("log.every_steps=4", "checkpoint.every_steps=3", "checkpoint.keep_last=9", "train.max_steps=8")
    whole = trained("whole", *own, processes=processes)
    resumed = trained("resumed", *own, f"resume.from={whole}/checkpoints/step-00000003", processes=processes)
    expected = losses(whole)
    assert losses(resumed) == {step: expected[step] for step in (4, 8)}
    assert CheckpointStore(whole / "checkpoints").state("step-00000003")["unreported_steps"] == 2


def test_a_branch_never_has_its_trunks_best(small_recipe, make_checkpoints, tmp_path) -> None:
    trunk, branch = (make_checkpoints(small_recipe(), tmp_path / name) for name in ("trunk", "branch"))
    state = TrainState(step=1, samples=8)
    state.record({"top1": 99.0, "top5": 99.5})
    state.timed_samples, state.timed_seconds, state.peak_memory_mb = 8, 1.0, 99.0
    assert trunk.save(state)
    begun = branch.load(str(trunk.store.root / "step-00000001"))
    assert (begun.best_step, begun.best_top1, begun.last_top1) == (None, None, 99.0)
    assert (begun.images_per_second, begun.peak_memory_mb) == (None, 0.0)


def test_a_branch_of_another_image_size_or_from_nowhere_is_one_line(recipe_file, tmp_path) -> None:
    recipe, trunk = str(recipe_file), tmp_path / "trunk"
    karat_here("train", recipe, f"run.dir={trunk}", "train.max_steps=1")
    branch = ("train", recipe, f"run.dir={tmp_path / 'branch'}")
    for source in (trunk, trunk / "checkpoints" / "step-00000001"):
        line = karat_refuses(*branch, f"resume.from={source}", "model.image_size=24", "attention.rank=5")
        differ = "model.image_size (16 -> 24), attention.rank (4 -> 5); set the keys as it has them"
        assert line == f"error: resume.from = {source} is of another model: {differ}"
    checkpoints = trunk / "checkpoints"
    there = f" of step-00000001 in {checkpoints}"
    for source, names in {"~/nowhere": "", tmp_path: "", checkpoints: there, checkpoints / "nosuch": there}.items():
        line = karat_refuses(*branch, f"resume.from={source}")
        what = f"neither a run's directory nor a checkpoint in one; name one{names}"
        assert line == f"error: resume.from = {source}: {what}"


@pytest.mark.slow
def test_a_finished_run_is_extended_on_the_longer_runs_schedule(train_recipe, trained) -> None:
    run = trained("run", "train.epochs=1")
    longer = train_recipe("train.epochs=3")
    assert "differs from that of the earlier start: train.epochs (1 -> 3)" in longer.stdout
    _, facts, _ = achieved(open_run(run))
    assert facts["recipe changed"].endswith(": train.epochs (1 -> 3)")
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.train.epochs == 3
    schedule = build_schedule(recipe, 8)
    rates = {event["step"]: event["lr"] for event in events(run, "train") if event["step"] > 8}
    assert rates == {step: schedule.lr(step - 1) for step in range(9, 25)}
    assert [event["step"] for event in events(run, "eval")] == [8, 16, 24]
    # A branch may be named by its trunk's directory, and goes on from the newest checkpoint.
    branch = trained("branch", f"resume.from={run}", "train.epochs=4")
    assert events(branch, "resume")[0]["step"] == 24
