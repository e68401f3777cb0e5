"""A job that cannot work ends at once with one line that says why, and is not requeued."""

import pytest

from tests.conftest import ROOT, SMALL, output_of, run_to_end
from tests.slurm.jobs import SCRIPTS, submission, submit
from tests.slurm.packages import SHELLCHECK, missing_reason

SCRIPT = "imagenet_fourier_karat.sh"
RECIPE = (*SMALL, "schedule.warmup_epochs=0")


def test_every_script_passes_shellcheck() -> None:
    reason = missing_reason(SHELLCHECK)
    if reason:
        pytest.skip(reason)
    scripts = sorted(str(path.name) for path in (ROOT / "slurm").glob("*.sh"))
    output_of("shellcheck", "--external-sources", *scripts, cwd=ROOT / "slurm")


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_accepts_every_script_as_it_stands(cluster, script, tmp_path) -> None:
    done = submission(cluster, script, ("--test-only",), (), {}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


@pytest.mark.parametrize(
    ("settings", "arguments", "line"),
    [
        ({"RECIPE": "imagenet_vit_tinny"}, (), "did you mean imagenet_vit_tiny?"),
        ({}, ("optim.lrr=1",), "optim.lrr: unknown key; did you mean optim.lr?"),
        ({"STAGE": "/local"}, (), "STAGE = /local needs SHARDS, the directory to copy"),
    ],
    ids=["recipe", "override", "stage"],
)
def test_a_mistake_in_the_settings_is_one_line(cluster, tmp_path, settings, arguments, line) -> None:
    job = submit(cluster, SCRIPT, *arguments, cwd=tmp_path, RUN=tmp_path / "run", **settings)
    assert job.wait() == "FAILED 2", job.log
    (shown,) = job.log.splitlines()
    assert shown.startswith("error: ")
    assert line in shown
    assert job.starts == 1


@pytest.mark.parametrize("options", [(), ("--export=RUN,SHARDS,PATH",)], ids=["all variables", "some"])
def test_missing_data_is_named_last_and_not_retried(cluster, tmp_path, options) -> None:
    job = submit(cluster, SCRIPT, *RECIPE, options=options, cwd=tmp_path, RUN=tmp_path / "run", SHARDS="/nowhere")
    assert job.wait() == "FAILED 2", job.log
    assert "error: data.path = /nowhere is not a directory" in job.log.splitlines()[-1]
    assert "Traceback" not in job.log
    assert job.starts == 1


def test_without_shards_the_data_are_those_of_the_recipe(cluster, tmp_path) -> None:
    recipe = tmp_path / "photos.yaml"
    recipe.write_text("data: {path: /photos}\nschedule: {warmup_epochs: 0}\n")
    job = submit(cluster, SCRIPT, *SMALL, cwd=tmp_path, RUN=tmp_path / "run", RECIPE=recipe)
    assert job.wait() == "FAILED 2", job.log
    assert "error: data.path = /photos is not a directory" in job.log.splitlines()[-1]


def test_gpus_without_a_task_each_are_refused(cluster, tmp_path) -> None:
    if "Gres=gpu" not in cluster.configuration.read_text():
        pytest.skip("making devices is not permitted here, so the cluster has no GPUs")
    options = ("--gpus-per-node=2",)
    job = submit(cluster, SCRIPT, *RECIPE, options=options, cwd=tmp_path, RUN=tmp_path / "run", SHARDS="/nowhere")
    assert job.wait() == "FAILED 2", job.log
    assert job.log.splitlines()[-1].startswith("error: 2 GPUs but 1 tasks a node; set --ntasks-per-node")


def test_outside_a_job_the_script_says_how_to_run_it() -> None:
    done = run_to_end("bash", f"slurm/{SCRIPT}")
    assert done.returncode == 2
    assert done.stderr == "error: this is a batch script: run it by sbatch\n"
