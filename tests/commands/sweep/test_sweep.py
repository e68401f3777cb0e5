"""A sweep on this machine: its runs are processes of their own, which fail, stop and resume."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from karat_scale.commands.sweep.command import PlannedRun, State, _why, plan_sweep, run_sweep
from karat_scale.engine.heartbeat import Sign, heartbeat_file
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.machine import this_node
from karat_scale.recipe.loading import dump_recipe
from tests.conftest import SMALL, karat_command, karat_environment, karat_here, run_to_end, summary, wait_until

QUICK = ("train.epochs=1", "schedule.warmup_epochs=0", "checkpoint.every_minutes=null")


@pytest.fixture
def recipe(tmp_path: Path, shards: Path) -> Path:
    path = tmp_path / "owls.yaml"
    path.write_text(f"data: {{path: {shards}}}\nattention: {{kind: karat}}\n")
    return path


def sweep(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["sweep", str(recipe), *SMALL, *QUICK, *arguments, "--out", str(recipe.parent / "out")]
    return run_to_end(*karat_command(command))


def test_print_shows_the_runs_and_writes_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = recipe.parent / "out"
    grid = ("attention.grid=1,2", "run.seed=0..1")
    assert karat_here("sweep", str(recipe), *SMALL, *QUICK, *grid, "--out", str(out), "--print") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["grid-2_seed-1", "2", "1", "new"] for line in lines)
    assert f"4 runs of {recipe} in {out}: 4 new" in lines
    assert not out.exists()


def test_each_run_is_copied_to_a_url_of_its_own(recipe: Path) -> None:
    for seed, run in enumerate(planned(recipe, "checkpoint.url=s3://bucket/sweep", "run.seed=0,1")):
        assert run.recipe.checkpoint.url == f"s3://bucket/sweep/seed-{seed}"
        assert run.overrides[-1] == f"checkpoint.url=s3://bucket/sweep/seed-{seed}"


def end(run: PlannedRun) -> None:
    """Write to the run's directory what a finished run leaves there."""
    run.directory.mkdir(parents=True)
    (run.directory / "recipe.yaml").write_text(dump_recipe(run.recipe))
    (run.directory / "metrics.jsonl").write_text('{"event": "end", "exit": 0, "reason": "finished"}\n')
    (run.directory / "summary.json").write_text('{"exit": 0}')


def planned(recipe: Path, *arguments: str) -> tuple[PlannedRun, ...]:
    return plan_sweep(str(recipe), [*SMALL, *QUICK, *arguments], str(recipe.parent / "out")).runs


def test_a_finished_run_of_fewer_steps_or_that_began_again_trains_on(recipe: Path) -> None:
    for run in planned(recipe, "run.seed=0,1", "train.max_steps=2"):
        end(run)
        assert run.state is State.FINISHED
    for longer in ("train.max_steps=4", "train.max_steps=null"):
        assert [run.state for run in planned(recipe, "run.seed=0,1", longer)] == [State.UNFINISHED] * 2
    with (run.directory / "metrics.jsonl").open("a") as file:
        file.write('{"event": "resume", "step": 2, "restarts": 0}\n')
    assert run.state is State.UNFINISHED


def test_a_run_that_has_trained_all_its_epochs_is_finished_with_any_limit_of_steps(recipe: Path) -> None:
    run, _ = planned(recipe, "run.seed=0,1", "train.max_steps=8")  # of the 8 steps of an epoch
    end(run)
    for steps, unfinished in ((8, []), (4, ["train.max_steps=5", "train.max_steps=1000", "train.max_steps=null"])):
        (run.directory / "summary.json").write_text(f'{{"exit": 0, "steps": {steps}, "train_images": 71}}')
        for limit in ("train.max_steps=3", "train.max_steps=5", "train.max_steps=1000", "train.max_steps=null"):
            again, _ = planned(recipe, "run.seed=0,1", limit)
            assert again.state is (State.UNFINISHED if limit in unfinished else State.FINISHED), (steps, limit)


def test_a_run_whose_process_is_gone_is_unfinished(recipe: Path) -> None:
    run, _ = planned(recipe, "run.seed=0,1")
    end(run)
    (run.directory / "metrics.jsonl").write_text("")
    with subprocess.Popen(["true"]) as gone:
        pass
    for pid, state in ((os.getpid(), State.RUNNING), (gone.pid, State.UNFINISHED)):
        sign = Sign(0, this_node(), pid, "", written=time.time() - 10)
        heartbeat_file(run.directory, 0).parent.mkdir(exist_ok=True)
        heartbeat_file(run.directory, 0).write_text(json.dumps(asdict(sign)))
        assert run.state is state


def test_a_run_that_another_process_begins_meanwhile_is_left_alone(recipe: Path, monkeypatch) -> None:
    started = recipe.parent / "started"
    first, second = planned(recipe, "run.seed=0,1")
    end(second)
    second.directory.rename(recipe.parent / "ended elsewhere")
    karat = recipe.parent / "karat"  # while it trains the first run, the second one ends
    karat.write_text(f"#!/bin/sh\necho $* >>'{started}'\nmv '{recipe.parent}/ended elsewhere' '{second.directory}'\n")
    karat.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(karat))
    assert run_sweep(plan_sweep(str(recipe), [*SMALL, *QUICK, "run.seed=0,1"], str(first.directory.parent))) == {}
    assert f"run.dir={first.directory}" in started.read_text()
    assert len(started.read_text().splitlines()) == 1


@pytest.mark.parametrize("ends", ["kill -TERM $$", "exit 130", "exit 143"])
def test_a_signal_before_the_run_listens_counts_as_a_stop(recipe: Path, monkeypatch, capsys, ends: str) -> None:
    karat = recipe.parent / "karat"  # as a run that a signal ends while it imports, alone and by karat launch
    karat.write_text(f"#!/bin/sh\nkill -TERM $PPID\n{ends}\n")
    karat.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(karat))
    out = ("--out", str(recipe.parent / "out"))
    assert karat_here("sweep", str(recipe), *SMALL, *QUICK, "run.seed=0,1", *out) == 75
    assert "stopped after 0 of 2 runs; run the same command to resume" in capsys.readouterr().err


def test_how_much_of_all_runs_is_done_is_said(recipe: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, second = planned(recipe, "run.seed=0,1")
    end(second)  # but for what its log says
    (second.directory / "metrics.jsonl").write_text('{"event": "train", "step": 3, "total_steps": 4}\n')
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    monkeypatch.setattr("karat_scale.commands.sweep.command._LINE_SECONDS", 0.0)
    run_sweep(plan_sweep(str(recipe), [*SMALL, *QUICK, "run.seed=0,1"], str(second.directory.parent)))
    assert "run 2 of 2: seed-1: 88 % of all\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a #1", "a: b", "[a]", " a", "{a}", "*a", "- a", "a\nb"])
def test_a_directory_that_yaml_reads_as_another_is_refused(recipe: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"(?s)^--out .*: YAML reads it as another text; choose one"):
        plan_sweep(str(recipe), [*SMALL, *QUICK, "run.seed=0,1"], name)


def test_a_directory_within_a_run_is_refused(recipe: Path) -> None:
    run = recipe.parent / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    for out, said in ((run, "is a run"), (run / "x", f"lies in {run}, a run"), (run / "recipe.yaml", "is a file")):
        with pytest.raises(UserError, match=f"^--out {out} {said}; choose another directory"):
            plan_sweep(str(recipe), [*SMALL, *QUICK, "run.seed=0,1"], str(out))


def test_values_that_are_the_same_are_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"^optim.lr=1e-3 and optim.lr=0.001 are the same recipe; leave one out$"):
        planned(recipe, "optim.lr=1e-3,2e-3,0.001")


def test_a_failure_is_that_of_the_last_start(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    log.write_text("error: the disk is full\n")
    begin = log.stat().st_size
    with log.open("a") as file:
        file.write("RuntimeError: CUDA error\n")
    assert _why(1, log, begin) == f"RuntimeError: CUDA error ({log})"


def test_a_key_of_karat_does_not_vary_among_softmax_models(recipe: Path) -> None:
    softmax = "attention.kind=softmax"
    said = r"^attention.grid has no effect with attention.kind = softmax.* set attention.kind=karat$"
    with pytest.raises(UserError, match=said):
        planned(recipe, softmax, "run.seed=0,1", "attention.grid=1,2")
    morlet, full_rank = ("attention.kind=karat", "attention.basis=morlet"), ("attention.form=full_rank",)
    said = "^attention.grid has no effect with attention.basis = morlet and attention.form = modular, .*; leave it out$"
    with pytest.raises(UserError, match=said):
        planned(recipe, *morlet, "attention.grid=1,3")
    assert len(planned(recipe, "attention.kind=karat", "attention.basis=morlet,fourier", "attention.grid=1,3")) == 3
    with pytest.raises(UserError, match=r"^attention.rank has no effect with .* attention.form = full_rank"):
        planned(recipe, "attention.kind=karat", *full_rank, "attention.rank=4,12")
    assert len(planned(recipe, softmax, "attention.transfer_from=null,elsewhere")) == 2
    assert len(planned(recipe, softmax, "attention.transfer_from=x", "attention.transfer_heads=same,cycle")) == 2
    assert len(planned(recipe, softmax, "attention.grid=1", "run.seed=0,1")) == 2


def test_a_model_of_softmax_is_trained_once_for_all_values_of_a_key_of_karat(recipe: Path, capsys) -> None:
    grid = ("attention.kind=softmax,karat", "attention.grid=1,2", "run.seed=0,1")
    names = [run.point.name for run in planned(recipe, *grid)]
    assert names == [
        f"{point}_seed-{seed}"
        for point in ("grid-1_kind-softmax", "grid-1_kind-karat", "grid-2_kind-karat")
        for seed in (0, 1)
    ]
    (note,) = capsys.readouterr().err.splitlines()
    assert note == (
        "note: 2 runs left out, as a key has no effect with their attention: "
        "grid-2_kind-softmax_seed-0 is the same as grid-1_kind-softmax_seed-0, ..."
    )
    others = ("attention.kind=sigmoid,query_only,centred", "attention.base=zero,silu", "attention.grid=2,3")
    assert [len(planned(recipe, *others[:1], key)) for key in others[1:]] == [4, 5]
    with pytest.raises(UserError, match=r"^attention.base has no effect with attention.kind = static or sigmoid, "):
        planned(recipe, "attention.kind=static,sigmoid", "attention.base=zero,silu")
    blocks = "attention.blocks={0: {kind: karat}}"
    assert len(planned(recipe, "attention.kind=softmax", blocks, "attention.grid=1,2")) == 2


@pytest.mark.slow
def test_a_failed_run_is_named_the_rest_goes_on_and_the_same_command_finishes_it(recipe: Path) -> None:
    out = recipe.parent / "out"
    broken = out / "grid-1_seed-1"
    broken.mkdir(parents=True)
    (broken / "checkpoints").touch()  # a file where a directory must be
    grid = ("attention.grid=1,2", "run.seed=0..1")
    done = sweep(recipe, *grid)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = ("grid-1_seed-1: failed: run.dir =", "1 of 4 runs have not finished", "run 4 of 4: grid-2_seed-1")
    assert all(line in done.stderr for line in failed)
    assert "95 % interval" in done.stdout
    first = summary(out / "grid-2_seed-0")

    (broken / "checkpoints").unlink()
    again = sweep(recipe, *grid)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "3 runs of the sweep are finished or running now" in again.stderr
    assert "run 1 of 1: grid-1_seed-1" in again.stderr
    assert "attention.grid=2  seeds 0, 1" in again.stdout
    in_order = " ".join(str(out / f"grid-{grid}_seed-{seed}") for grid in (1, 2) for seed in (0, 1))
    assert f"for files and curves: karat compare {in_order} --out DIR" in again.stdout
    assert summary(out / "grid-2_seed-0") == first

    nothing = sweep(recipe, *grid)
    assert (nothing.returncode, "run 1 of" in nothing.stderr) == (0, False)


def until_it_trains(recipe: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start a sweep over seeds, wait until its first run logs steps, and return the sweep's process."""
    command = karat_command(["sweep", str(recipe), *SMALL, *QUICK, *arguments])
    process = subprocess.Popen(command, env=karat_environment(), stderr=subprocess.PIPE, text=True)
    metrics = recipe.parent / "out" / "seed-0" / "metrics.jsonl"

    def trains() -> bool:
        assert process.poll() is None, process.stderr.read()
        return metrics.is_file() and '"train"' in metrics.read_text()

    wait_until(trains, 120)
    return process


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_the_run_of_a_killed_sweep_saves_and_stops(recipe: Path, ranks: str) -> None:
    out = recipe.parent / "out"
    process = until_it_trains(recipe, "run.seed=0,1", "train.epochs=100000", "--out", str(out), "--ranks", ranks)
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(started, timeout=60)
    for left in alive:
        left.kill()
    assert not alive
    assert summary(out / "seed-0")["reason"] == "stopped by SIGTERM"
    assert not (out / "seed-1").exists()


@pytest.mark.slow
def test_a_signal_saves_the_run_and_the_same_command_resumes_it(recipe: Path) -> None:
    out = recipe.parent / "out"
    grid = ("run.seed=0..1", "train.epochs=24", "train.eval_every_epochs=24", "--out", str(out))
    metrics = out / "seed-0" / "metrics.jsonl"
    process = until_it_trains(recipe, *grid)
    ranks = psutil.Process(process.pid).children(recursive=True)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.suspend()  # small steps may take less time than the signal
    os.kill(process.pid, signal.SIGINT)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.resume()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "stopped after 0 of 2 runs; run the same command to resume" in said
    assert summary(out / "seed-0")["exit"] == 75

    done = sweep(recipe, *grid[:3], "--ranks", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = [json.loads(line)["event"] for line in metrics.read_text().splitlines()]
    assert "resume" in kinds
    assert {summary(out / f"seed-{seed}")["world_size"] for seed in (0, 1)} == {2}
    assert summary(out / "seed-0")["steps"] == summary(out / "seed-1")["steps"] == 24 * 8


def submit(out: Path, *grid: str) -> Path:
    """Write the script for a grid without submitting it, and return the folder that the script names."""
    data = ("data.backend=synthetic", "data.path=", "attention.kind=karat", "schedule.warmup_epochs=0")
    assert karat_here("sweep", "cifar10_vit_tiny", *SMALL, *data, *grid, "--slurm", "--out", str(out)) == 0
    found = re.search(r"^POINTS=(.*)$", (out / "sweep.sh").read_text(), flags=re.MULTILINE)
    assert found is not None
    return Path(found[1])


def test_jobs_of_an_earlier_grid_keep_their_points(tmp_path: Path) -> None:
    first = submit(tmp_path, "attention.grid=1,2", "run.seed=0,1")
    points = {path.name: path.read_text() for path in first.iterdir()}
    assert sorted(points) == ["0", "1", "2", "3"]
    assert points["2"].splitlines() == [f"run.dir={tmp_path / 'grid-2_seed-0'}", "attention.grid=2", "run.seed=0"]

    more = submit(tmp_path, "attention.grid=1,2", "run.seed=0..2")
    assert (more / "2").read_text().splitlines()[1:] == ["attention.grid=1", "run.seed=2"]
    assert {path.name: path.read_text() for path in first.iterdir()} == points
    assert submit(tmp_path, "attention.grid=1,2", "run.seed=0,1") == first


def test_print_says_that_the_script_alone_is_not_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep"
    data = (*SMALL, "data.backend=synthetic", "data.path=", "schedule.warmup_epochs=0")
    command = ("sweep", "cifar10_vit_tiny", *data, "run.seed=0,1", "--slurm", "--out", str(out))
    assert karat_here(*command, "--print") == 0
    assert f"answer n, and run: sbatch {out / 'sweep.sh'}" in capsys.readouterr().err
    assert not out.exists()
    assert karat_here(*command) == 0  # there is no terminal, which counts as n
    assert f"sbatch {out / 'sweep.sh'}" in capsys.readouterr().out
    assert (out / "logs").is_dir()


def test_data_that_vary_are_those_of_the_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("sweep", "cifar10_vit_tiny", *SMALL, "schedule.warmup_epochs=0", "data.path=/a,/b")
    assert karat_here(*command, "--slurm", "--out", str(tmp_path)) == 0
    script = (tmp_path / "sweep.sh").read_text()
    assert "SHARDS=''" in script.splitlines()
    (points,) = (tmp_path / "points").iterdir()
    assert "data.path=/b" in (points / "1").read_text().splitlines()
    assert karat_here(*command, "--slurm", "--stage=/disk", "--out", str(tmp_path)) == 2
    assert "--stage /disk copies one data set, but data.path varies" in capsys.readouterr().err


def test_data_that_are_nowhere_start_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert karat_here("sweep", "cifar10_vit_tiny", "run.seed=0,1", "data.path=/nowhere", "--out", str(out)) == 2
    assert capsys.readouterr().err.startswith("error: data.path = /nowhere is not a directory; set it to a directory")
    assert not out.exists()
