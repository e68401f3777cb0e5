"""The files for containers, Kubernetes and SkyPilot: their fields are known, and what they start is accepted."""

import re
import shlex

import pytest
import yaml

from karat_scale.commands.cli import build_parser
from karat_scale.foundation.errors import EXIT_STOPPED
from karat_scale.recipe.loading import load_recipe
from tests.conftest import ROOT, run_to_end

KUBERNETES, SKYPILOT = (ROOT / "slurm" / f"{name}.yaml" for name in ("kubernetes", "skypilot"))
INSTALL = ROOT / "containers" / "install.sh"


def check_training(words: list[str]) -> None:
    launched = build_parser().parse_args(words)
    options = build_parser().parse_args(launched.arguments)
    load_recipe(options.recipe, options.overrides)


def test_the_kubernetes_job_fits_the_schema_and_trains_a_recipe() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs the extra dev")
    job = yaml.safe_load(KUBERNETES.read_text())
    validate.validate(job, validate.latest_version(), strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in job["spec"]["template"]["spec"]["volumes"]
    }
    check_training(container["args"])


def test_the_skypilot_task_has_fields_of_skypilot_and_a_stopped_run_goes_on() -> None:
    """The fields are of docs.skypilot.co/en/latest/reference/yaml-spec.html; skypilot itself is not installed."""
    task = yaml.safe_load(SKYPILOT.read_text())
    assert task.keys() <= {"name", "workdir", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
    assert task["resources"].keys() <= {"infra", "accelerators", "cpus", "use_spot", "disk_size", "job_recovery"}
    assert task["resources"]["job_recovery"] == {"max_restarts_on_errors": 3, "recover_on_exit_codes": [EXIT_STOPPED]}
    assert {*re.findall(r"\$(\w+)", task["run"])} == {*task["envs"], "HOME"}
    assert [name for name, value in task["envs"].items() if value is None] == ["BUCKET", "SHARDS"]  # must be given


def test_what_skypilot_runs_is_accepted() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    given = {
        "RECIPE": task["envs"]["RECIPE"],
        "BUCKET": "s3://mine/karat",
        "SHARDS": "s3://mine/imagenet",
        "HOME": "/root",
    }
    command = re.sub(r"\$(\w+)", lambda name: given[name[1]], task["run"])
    check_training(shlex.split(command.replace("\\\n", ""))[1:])
    left_out = [line for line in (ROOT / ".skyignore").read_text().splitlines() if not line.startswith("#")]
    assert "ls dist/karat_scale-" in task["setup"]
    assert not {"dist", "dist/", "/dist", "/dist/"} & {*left_out}


@pytest.mark.parametrize("name", ["Dockerfile", "karat.def"])
def test_an_image_runs_the_script_with_the_wheels(name: str) -> None:
    text = (ROOT / "containers" / name).read_text()
    assert all(part in text for part in ("containers/install.sh", "dist/*.whl", "debian:bookworm-slim"))


def test_apptainer_keeps_nothing_in_tmp() -> None:
    """In %post, the host's /tmp hides the image's."""
    lines = (ROOT / "containers" / "karat.def").read_text().splitlines()
    assert not [line for line in lines if "/tmp" in line and not line.startswith("#")]


def test_an_unknown_kind_of_image_is_named() -> None:
    done = run_to_end("sh", INSTALL, "rocm", "/nowhere")
    assert (done.returncode, done.stderr) == (2, "error: rocm is not cpu, cuda12 or cuda13\n")
