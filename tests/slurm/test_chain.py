"""Tests of jobs that depend on each other, from images to an evaluated model, and of sweeps."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

from karat_scale.commands.status.status import read_standing
from karat_scale.data.shards.shard_format import read_dataset_record
from tests.conftest import SMALL, events, summary, wait_until
from tests.data.prepare.images import write_official
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, submit
from tests.slurm.test_submit import karat


def test_prepare_train_finetune_evaluate_follow_each_other(cluster, image_folder, recipe, tmp_path) -> None:
    shards, base, tuned = tmp_path / "shards", tmp_path / "base", tmp_path / "tuned"

    def after(job_id: str) -> tuple[str, ...]:
        return (f"--dependency=afterok:{job_id}", "--kill-on-invalid-dep=yes")

    prepare = submit(
        cluster, "prepare_imagenet.sh", "--shard-samples", "20", cwd=tmp_path / "1", IMAGES=image_folder,
        SHARDS=shards,
    )  # fmt: skip
    train = submit(
        cluster, "imagenet_fourier_karat.sh", *SMALL, options=after(prepare.id), cwd=tmp_path / "2",
        RECIPE=recipe, SHARDS=shards, RUN=base,
    )  # fmt: skip
    finetune = submit(
        cluster, "finetune.sh", "train.epochs=3", "optim.lr=1e-4", "train.freeze=patch_embed.*",
        options=after(train.id), cwd=tmp_path / "3", FROM=base, SHARDS=shards, RUN=tuned,
    )  # fmt: skip
    moved = tmp_path / "moved"
    moved.symlink_to(shards)
    evaluate = submit(
        cluster, "evaluate.sh", "train.eval_batch=4", options=after(finetune.id), cwd=tmp_path / "4",
        RUN=tuned, CHECKPOINT="latest", SHARDS=moved,
    )  # fmt: skip
    assert evaluate.wait() == "COMPLETED 0", "\n".join(job.log for job in (prepare, train, finetune, evaluate))
    samples = {name: split.samples for name, split in read_dataset_record(shards).splits.items()}
    assert samples == {"train": 64, "val": 28}
    assert summary(base)["steps"] == 16
    assert summary(tuned)["steps"] == 24
    result = json.loads((tuned / "eval-latest.json").read_text())
    assert result["images"] == 28
    assert result["checkpoint"] == "step-00000024"


def submit_sweep(
    cluster: Cluster, shards: Path, recipe: Path, tmp_path: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run `karat sweep --slurm` below tmp_path, for CPU nodes."""
    options = ("--slurm", "--yes", "--nodes=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10")
    data = (f"data.path={shards}", "schedule.warmup_epochs=0", "--out", str(tmp_path / "sweep"))
    return karat(cluster, "sweep", str(recipe), *SMALL, *arguments, *data, *options)


def job_of(cluster: Cluster, submitted: subprocess.CompletedProcess[str], tmp_path: Path) -> Job:
    found = re.search(r"job (\d+) is submitted", submitted.stdout)
    assert found is not None, submitted.stdout + submitted.stderr
    return Job(cluster, found[1], tmp_path / "none")


def test_a_sweep_trains_each_point_and_the_same_command_compares_them(cluster, shards, recipe, tmp_path) -> None:
    grid = ("train.epochs=1", "attention.rank=2,4", "augment.scale=[0.5,1.0],[0.2,1.0]", "--at-once=2")
    submitted = submit_sweep(cluster, shards, recipe, tmp_path, *grid)
    assert "#SBATCH --array=0-3%2" in submitted.stdout
    assert job_of(cluster, submitted, tmp_path).wait() == "COMPLETED 0", logs(tmp_path)
    runs = {path.parent.name: summary(path.parent)["exit"] for path in (tmp_path / "sweep").glob("*/summary.json")}
    assert runs == {f"rank-{rank}_scale-{low}-1.0": 0 for rank in (2, 4) for low in (0.5, 0.2)}

    again = submit_sweep(cluster, shards, recipe, tmp_path, *grid)
    assert again.returncode == 0, again.stderr
    assert "4 finished" in again.stdout
    assert "\nDifference from " in again.stdout
    assert "submitted" not in again.stdout

    more = submit_sweep(cluster, shards, recipe, tmp_path, *grid, "attention.rank=2,4,8")
    assert "#SBATCH --array=4-5%2" in more.stdout
    assert job_of(cluster, more, tmp_path).wait() == "COMPLETED 0", logs(tmp_path)


def logs(tmp_path: Path) -> str:
    return "\n".join(path.read_text() for path in (tmp_path / "sweep" / "logs").glob("*"))


def test_each_element_of_an_array_comes_back_by_itself(cluster, shards, recipe, tmp_path) -> None:
    long = ("train.epochs=40", "train.eval_every_epochs=40")
    job = job_of(cluster, submit_sweep(cluster, shards, recipe, tmp_path, *long, "attention.rank=2,4"), tmp_path)
    runs = [tmp_path / "sweep" / f"rank-{rank}" for rank in (2, 4)]
    undisturbed = dict(enumerate(runs))

    def disturb() -> bool:
        for element, run in tuple(undisturbed.items()):
            if (run / "metrics.jsonl").is_file() and events(run, "train"):
                replace(job, id=f"{job.id}_{element}").signal_batch()
                del undisturbed[element]
        return not undisturbed

    wait_until(disturb, 120, "both elements train")
    assert job.wait() == "COMPLETED 0", job.log
    assert job.fields("Restarts") == ["1", "1"]
    for element, run in enumerate(runs):
        assert [event["restarts"] for event in events(run, "resume")] == [1]
        assert summary(run)["steps"] == 40 * 8
        assert read_standing(run).job == f"{job.id}_{element}"


def test_imagenet_from_its_tars_trains_at_224_pixels(cluster, tmp_path) -> None:
    images, shards, run = tmp_path / "images", tmp_path / "shards", tmp_path / "run"
    write_official(images)
    prepare = submit(cluster, "prepare_imagenet.sh", cwd=tmp_path / "1", IMAGES=images, SHARDS=shards)
    overrides = (
        "model.embed_dim=48", "model.depth=2", "model.num_heads=2", "train.global_batch=8", "train.max_steps=4",
        "model.num_classes=3", "data.workers=1", "train.precision=fp32", "deepspeed.config=zero0", "log.trackers=[]",
    )  # fmt: skip
    train = submit(
        cluster, "imagenet_fourier_karat.sh", *overrides, options=("--nodes=2", f"--dependency=afterok:{prepare.id}"),
        cwd=tmp_path / "2", SHARDS=shards, RUN=run, RECIPE="imagenet_vit_tiny_g3b",
    )  # fmt: skip
    assert train.wait() == "COMPLETED 0", prepare.log + train.log
    assert summary(run)["steps"] == 4
    assert summary(run)["world_size"] == 2
    assert summary(run)["last_top1"] is not None
