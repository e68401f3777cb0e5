"""Tests of whether recipes fit the machine, run in this process."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from karat_scale.commands.doctor import recipe as fit
from karat_scale.commands.doctor.recipe import Subject
from karat_scale.commands.doctor.report import Finding, examine
from karat_scale.commands.measure.loading import find_data_files
from karat_scale.data.backends import ImageSpec, open_backend
from karat_scale.engine.distributed import World
from karat_scale.foundation.stores import Store
from karat_scale.recipe.loading import dump_recipe, load_recipe
from tests.servers import FaultyProxy, s3, s3_port

__all__ = ["s3", "s3_port"]
MakeSubject = Callable[..., Subject]


@pytest.fixture
def subject(recipe_file: Path) -> MakeSubject:
    def make(*overrides: str) -> Subject:
        return Subject(load_recipe(recipe_file, overrides), World(0, 1, 0, torch.device("cpu")), 8, 50_000)

    return make


def by_name(findings: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_one_process_in_a_job_of_more_tasks_is_one_rank(subject: MakeSubject, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    assert subject().local_ranks == 1


def test_the_data_is_measured_against_memory(subject: MakeSubject, shards: Path) -> None:
    one = subject()
    backend = open_backend(ImageSpec(one.recipe.data, one.recipe.augment, 16, 4, 0))
    findings = by_name([*fit.examine_data(one, backend), *fit.examine_batches(one, backend)])
    assert (findings["data"].figures["train"], findings["data"].figures["val"]) == (64, 28)
    on_disk = sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert findings["page cache"].figures["data_bytes"] == on_disk
    assert findings["page cache"].figures["stays"]
    assert findings["global batch"].figures["world_sizes"] == [1, 2, 4]  # 8 samples mixed in pairs


def test_each_backend_with_files_finds_them(subject: MakeSubject, image_folder: Path) -> None:
    files = find_data_files(subject("data.backend=folder", f"data.path={image_folder}").recipe, 64)
    assert files is not None
    train = [path.stat().st_size for path in image_folder.glob("train/*/*.jpg")]
    assert files.image_bytes == pytest.approx(sum(train) / len(train))
    assert all(path.is_file() for path in files.paths)
    assert find_data_files(subject("data.backend=synthetic").recipe, 64) is None


def test_batches_that_memory_cannot_hold_are_a_problem(subject: MakeSubject) -> None:
    few = by_name(fit.examine_workers(subject()))
    assert few["memory for batches"].level == "ok"
    many = by_name(fit.examine_workers(subject("data.workers=64", "data.prefetch=100000000")))
    assert many["memory for batches"].level == "problem"
    assert "data.prefetch" in many["memory for batches"].fix
    assert many["workers"].level == "note"
    assert not list(fit.examine_workers(subject("data.workers=0")))


def test_ranks_of_a_launcher_inside_srun_share_the_cores(subject: MakeSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    alone = subject().cores_of_a_rank
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert subject().cores_of_a_rank == max(1, alone // 2)


def test_checkpoints_that_the_disk_cannot_hold_are_a_problem(subject: MakeSubject, tmp_path: Path) -> None:
    small = by_name(fit.examine_run_directory(subject()))
    assert small["room for checkpoints"].level == "ok"
    assert small["room for checkpoints"].figures["checkpoint_bytes"] == 16 * 50_000
    apart = by_name(fit.examine_run_directory(subject("deepspeed.config=zero1", "train.precision=bf16_weights")))
    assert apart["room for checkpoints"].figures["checkpoint_bytes"] == 18 * 50_000
    several = by_name(fit.examine_run_directory(subject("checkpoint.snapshots=10")))
    assert "and 11 snapshots of " in several["room for checkpoints"].value
    huge = dataclasses.replace(subject(), parameters=10**15)
    assert by_name(fit.examine_run_directory(huge))["room for checkpoints"].level == "problem"
    assert not (tmp_path / "run").exists()


def test_the_checkpoints_of_a_resumed_run_need_no_more_room(subject: MakeSubject, tmp_path: Path, monkeypatch) -> None:
    one = 16 * 50_000
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda _: SimpleNamespace(free=one + 1))
    new = by_name(fit.examine_run_directory(subject("checkpoint.snapshots=0")))["room for checkpoints"]
    assert new.level == "problem"
    for step in range(new.figures["kept"] - 1):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(bytes(one))
    resumed = by_name(fit.examine_run_directory(subject("checkpoint.snapshots=0")))["room for checkpoints"]
    assert resumed.level == "ok"
    assert "are there" in resumed.value


def test_a_run_directory_of_another_recipe_or_below_a_file_is_a_problem(subject: MakeSubject, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump_recipe(subject("train.epochs=2").recipe))
    (run / "summary.json").write_text('{"exit": 0, "steps": 4}')
    (run / "checkpoints" / "latest").write_text("step-00000004\n")
    for epochs in (2, 3):  # more of them lengthen a finished run
        assert by_name(fit.examine_run_directory(subject(f"train.epochs={epochs}")))["run.dir"].level == "ok"
    other = by_name(fit.examine_run_directory(subject("optim.lr=0.5")))["run.dir"]
    assert other.level == "problem"
    assert all(part in other.value for part in ("optim.lr", "resume.allow"))
    never = by_name(fit.examine_run_directory(subject("resume.mode=never")))["run.dir"]
    assert (never.level, "has checkpoints and resume.mode = never" in never.value) == ("problem", True)
    (run / "checkpoints" / "step-00000004").rmdir()
    anew = by_name(fit.examine_run_directory(subject("optim.lr=0.5")))["run.dir"]  # as training does
    assert (anew.level, anew.value) == ("ok", f"{run} has a start that left no checkpoint: karat train begins anew")
    (below_a_file,) = fit.examine_run_directory(subject(f"run.dir={run / 'recipe.yaml' / 'run'}"))
    assert below_a_file.level == "problem"


def test_a_url_of_checkpoints_is_written_and_read(subject, s3, s3_port, tmp_path) -> None:
    assert not list(fit.examine_checkpoint_url(subject()))
    url = s3(tmp_path / "nothing")
    (finding,) = fit.examine_checkpoint_url(subject(f"checkpoint.url={url}"))
    assert finding.level == "ok"
    assert f"{url} can be written and read; each checkpoint copies about 0.80 MB there" in finding.value
    assert Store(url).files() == {}
    with FaultyProxy(s3_port, spoil=lambda number, asked: "403") as proxy:
        url = s3(tmp_path / "nothing", proxy.port)
        (finding,) = examine("url", lambda: fit.examine_checkpoint_url(subject(f"checkpoint.url={url}")))
    assert finding.level == "problem"
    assert "access is refused" in finding.value
