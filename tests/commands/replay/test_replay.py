"""`karat replay`: steps that diverge, steps that spike, and steps that are fine, taken again from a checkpoint."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from karat_scale.checkpoint.store import CheckpointStore, checkpoint_name
from karat_scale.commands.replay.command import refuse_unshared, watched
from karat_scale.data.plan import TrainPlan
from karat_scale.engine.distributed import World
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.tables import VARIABLE
from karat_scale.training.outcome import KEPT_CHECKPOINTS, LEAST, MOST, Incidents, Spikes
from tests.conftest import SMALL, events, karat_done, karat_here

QUICK = ("schedule.warmup_epochs=0", "data.workers=0", "train.ema_decay=0", "log.every_steps=1")
EXPLODES = ("optim.lr=1000", "optim.clip_grad=0", "optim.lr_batch=null", "model.drop_path=0.3")
Train = Callable[..., tuple[Path, int]]


@pytest.fixture(scope="module")
def train(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that trains a small model on real shards in this process.

    It returns the run's directory and the exit code.
    """
    recipe = tmp_path_factory.mktemp("recipes") / "small.yaml"
    recipe.write_text(f"data: {{path: {shards}}}\nattention: {{kind: karat}}\n")

    def run(*overrides: str) -> tuple[Path, int]:
        directory = tmp_path_factory.mktemp("runs") / "run"
        return directory, karat_here("train", str(recipe), *SMALL, *QUICK, f"run.dir={directory}", *overrides)

    return run


@pytest.fixture(scope="module")
def exploded(train: Train) -> Path:
    """Return a run that skips steps because its learning rate is far too large."""
    run, code = train(*EXPLODES, "checkpoint.every_steps=1", "train.max_skipped_steps=1000")
    assert code == 0
    return run


def noted(run: Path) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in sorted((run / "incidents").glob("*.json"))]


def test_nodes_that_do_not_see_the_temporary_directory_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^TMPDIR = {tmp_path}: not seen by all nodes; set TMPDIR to a directory"):
        refuse_unshared(tmp_path / "of another node", World(0, 1, 0, torch.device("cpu")))


def test_a_picture_that_cannot_be_written_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert karat_here("replay", "run", "3", "--out", "nodir/x.png") == 2
    assert "argument --out: 'nodir/x.png': its directory does not exist" in capsys.readouterr().err


def test_a_branch_is_replayed_from_its_trunk_if_that_is_trusted(train: Train, tmp_path, monkeypatch, capsys) -> None:
    trunk, _ = train("train.max_steps=4", "optim.lr=0.01")
    branch, code = train(f"resume.from={trunk}", "checkpoint.every_minutes=null", "train.max_steps=6")
    assert code == 0
    for path in (branch / "checkpoints").glob("step-*"):  # as before its first own checkpoint
        shutil.rmtree(path)
    found = tmp_path / "found.json"
    arguments = ("replay", str(branch), "6", "--out", str(tmp_path / "x.png"), "--json", str(found))
    assert karat_here(*arguments) == 2
    refused = f"{branch}/recipe.yaml: resume.from = {trunk} is outside the run, and no checkpoint before step 6 is left"
    assert refused in capsys.readouterr().err
    monkeypatch.setenv(VARIABLE, "1")
    assert karat_here(*arguments) == 0
    loss = next(event["loss"] for event in events(branch, "train") if event["step"] == 6)
    assert json.loads(found.read_text())["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_step_that_was_skipped_is_found_again(exploded: Path, tmp_path: Path, capsys) -> None:
    first = noted(exploded)[0]
    step = int(str(first["step"]))
    assert first["kind"] == "not finite"
    assert len(first["samples"]) == 8  # type: ignore[arg-type]
    picture, figures = tmp_path / "step.png", tmp_path / "found.json"
    assert karat_here("replay", str(exploded), str(step), "--out", str(picture), "--json", str(figures)) == 0
    printed = capsys.readouterr().out
    assert "first not finite: " in printed
    found = json.loads(figures.read_text())
    assert found["grad_norm"] is None
    assert found["checkpoint"] < checkpoint_name(step)
    assert found["ranks"][0].get("forward") or found["ranks"][0]["backward"]
    assert Image.open(picture).size[0] > 200


def test_the_picture_of_a_run_in_the_working_directory_is_beside_it(train: Train, monkeypatch) -> None:
    run, _ = train("train.max_steps=1")
    monkeypatch.chdir(run)
    before = {path.name for path in run.iterdir()}
    assert karat_here("replay", ".", "1") == 0
    assert (run.parent / "run-replay-1.png").is_file()
    assert {path.name for path in run.iterdir()} == before


def test_a_step_that_went_well_is_taken_bit_for_bit(train: Train, tmp_path: Path) -> None:
    run, code = train(
        "checkpoint.every_steps=5", "checkpoint.keep_last=9", "model.drop_path=0.3", "train.micro_batch=4"
    )
    assert code == 0
    figures = tmp_path / "found.json"
    for step, checkpoint in ((7, checkpoint_name(5)), (3, None)):
        if checkpoint is None:  # training can reach it only from the start
            for name in CheckpointStore(run / "checkpoints").names():
                (run / "checkpoints" / name).rename(tmp_path / name)
        assert karat_here("replay", str(run), str(step), "--out", str(tmp_path / "x.png"), "--json", str(figures)) == 0
        found, was = json.loads(figures.read_text()), events(run, "train")[step - 1]
        assert found["checkpoint"] == checkpoint
        assert found["grad_norm"] == was["grad_norm"]
        assert found["loss"] == pytest.approx(was["loss"], rel=1e-6)
        assert found["ranks"] == [{"weights": None}]


def test_a_weight_that_is_not_finite_before_the_step_is_named(train: Train, tmp_path: Path, capsys) -> None:
    run, _ = train(*EXPLODES, "optim.weight_decay=1e38", "train.max_steps=2")
    figures = tmp_path / "found.json"
    assert karat_here("replay", str(run), "2", "--out", str(tmp_path / "x.png"), "--json", str(figures)) == 0
    said = re.search(r"before the step: (weight (\S+): [\d,]+ of [\d,]+ values)\n", capsys.readouterr().out)
    assert said is not None
    assert json.loads(figures.read_text())["ranks"][0]["weights"] == said[1]


def test_a_damaged_checkpoint_before_the_step_is_named_and_an_older_one_serves(train: Train, tmp_path, capsys) -> None:
    run, code = train("checkpoint.every_steps=2", "checkpoint.keep_last=9", "train.max_steps=6")
    assert code == 0
    (run / "checkpoints" / checkpoint_name(4) / "state.json").write_text("{}")
    figures = tmp_path / "found.json"
    assert karat_here("replay", str(run), "6", "--out", str(tmp_path / "x.png"), "--json", str(figures)) == 0
    assert f"{checkpoint_name(4)} cannot be used" in capsys.readouterr().err
    assert json.loads(figures.read_text())["checkpoint"] == checkpoint_name(2)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_find_the_same_at_stage_3(exploded: Path, tmp_path: Path) -> None:
    step = noted(exploded)[0]["step"]
    done = karat_done("replay", str(exploded), str(step), "--out", str(tmp_path / "x.png"), processes=2)
    assert "rank 1: " in done.stdout


def test_a_run_that_diverges_says_how_to_look(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run, code = train(*EXPLODES, "train.on_nonfinite=stop")
    assert code == 2
    assert f"karat replay {run}" in capsys.readouterr().err


def test_a_spike_is_noted(train: Train) -> None:
    # The rate jumps at the end of a warm-up from almost nothing.
    rates = ("schedule.warmup_steps=40", "schedule.warmup_lr=0", "optim.lr=30", "optim.lr_batch=null")
    run, code = train(*rates, "train.epochs=8", "train.detect_spikes=4", "optim.clip_grad=0")
    assert code == 0
    spikes, losses = events(run, "spike"), [event["loss"] for event in events(run, "train")]
    assert spikes
    for spike in spikes:
        assert losses[spike["step"] - 1] == pytest.approx(spike["loss"], rel=1e-5)
        assert spike["loss"] > spike["limit"]
    kinds = {record["step"]: record["kind"] for record in noted(run)}
    assert all(kinds[spike["step"]] in ("spike", "not finite") for spike in spikes)


def test_spikes_are_those_above_mean_and_deviation() -> None:
    losses = list(np.random.default_rng(0).normal(2.0, 0.1, 60))
    losses[50], losses[55] = 5.0, math.nan
    finder = Spikes(6.0)
    found = finder.find(losses[:40]) + [(40 + place, loss, limit) for place, loss, limit in finder.find(losses[40:])]
    ((place, loss, limit),) = found
    assert (place, loss) == (50, 5.0)
    assert limit == pytest.approx(np.mean(losses[:50]) + 6 * np.std(losses[:50]))
    assert Spikes(1.0).find([1.0] * (LEAST - 1) + [100.0]) == []


def test_a_run_that_often_goes_wrong_does_not_fill_the_disk(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in range(1, 80):
        (store.root / checkpoint_name(step)).mkdir(parents=True)
    incidents = Incidents(tmp_path / "incidents", store, TrainPlan(0, 64, 8, 8, 0, 1), replays=True)
    said = [incidents.note(step, "not finite", grad_norm=math.inf) for step in range(2, 80)]
    assert len(list((tmp_path / "incidents").iterdir())) == MOST
    assert len(store.pinned()) == KEPT_CHECKPOINTS
    assert "50 such steps" in said[-1]
    assert not store.retain(2)
    assert set(store.names()) == {*store.pinned(), checkpoint_name(79), checkpoint_name(78)}


class Division(nn.Module):
    """A module that divides by 0 in one place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.tensor([1.0, 1.0, 0.0, 1.0])


class Root(nn.Module):
    """A module that takes a square root with an infinite gradient in one place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * torch.tensor([1.0, 1.0, 0.0, 1.0])).abs().sqrt()


def test_the_first_module_is_named() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), Division(), nn.Linear(4, 2))
    with watched(network) as found:
        network(torch.ones(3, 4)).sum().backward()
    before = "output of 1 (Division): 3 of 12 values; before it: output of 0 (Linear) within "
    assert found.found["forward"].startswith(before)
    network[1] = Root()
    with watched(network) as found:
        network(torch.ones(3, 4)).sum().backward()
    assert found.found.keys() == {"backward"}
    gradient, before = found.found["backward"].split("; before it: ")
    assert gradient.startswith("gradient of the output of 0 (Linear): ")
    assert before.startswith("gradient of the output of 1 (Root) within ")
    assert not network[0]._forward_hooks
