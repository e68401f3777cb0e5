"""The files for containers, Kubernetes and SkyPilot: they fit their schemas, and what they start is accepted."""

import re
import shlex

import pytest
import yaml

from karat_scale.commands.cli import build_parser
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


def test_the_skypilot_task_fits_the_schema() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    schemas = pytest.importorskip("sky.utils.schemas", reason="skypilot is not among what make test installs")
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())


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
