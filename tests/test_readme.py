"""Tests that run the README's commands as they stand, on data that is small enough for a test."""

import itertools
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml

from karat_scale import __version__
from karat_scale.recipe.files import shipped_recipes
from tests.commands.test_completion import COMPLETION
from tests.conftest import ROOT, SMALL, events, karat_environment, output_of
from tests.warm import run_program

README = (ROOT / "README.md").read_text()

OURS = ("eval", "train", "launch", "plan", "export", "prepare", "recipes", "explain")


def blocks(language: str) -> list[str]:
    """Return the README's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.strip().splitlines()]


def run(command: str, cwd: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    """Run a `karat` command with more arguments, on two ranks where it has `--ranks`; it must succeed."""
    words = shlex.split(command, comments=True)
    arguments = ["2" if before == "--ranks" else word for before, word in itertools.pairwise(words)]
    done = run_program("karat_scale", [*arguments, *more], [karat_environment()], timeout=300, directory=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def find(start: str) -> str:
    (command,) = [line for line in COMMANDS if line.startswith(start)]
    return command


def test_every_command_is_run_here_or_by_the_ci_script() -> None:
    ours = (*(f"karat {name}" for name in OURS), COMPLETION)
    # By .ci/run (tests/test_ci.py); the extras of `all` by the Makefile, with uv, and by .ci/newest.
    elsewhere = ("make demo", "make test", "make release", "pip install -e .", "pip install -e '.[all]'")
    elsewhere += ("pip install dist/karat_scale-*_x86_64.whl",)  # `make release` does
    # tests/slurm submits these scripts to a SLURM of its own.
    submitted = "".join(path.read_text() for path in (ROOT / "tests" / "slurm").glob("test_*.py"))
    assert COMMANDS
    for command in COMMANDS:
        script = re.search(r" sbatch .*slurm/(\w+\.sh)$", command)
        if script:
            assert (ROOT / "slurm" / script[1]).is_file(), command
            assert f'"{script[1]}"' in submitted, command
        else:
            assert command.partition("#")[0].strip() in elsewhere or command.startswith(ours), command


def test_the_citation_names_this_version_and_the_papers_number() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["references"][0]["identifiers"][0]["value"].removeprefix("arXiv:") in README


def test_the_extra_all_is_what_the_tests_install_but_ffcv() -> None:
    # As text: even a dry run of make runs the lines that call make, which install.
    (made,) = re.findall(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    (everything,) = re.findall(
        r'^all = \["karat-scale\[(.*?)\]"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert set(everything.split(",")) == set(made.split()) - {"ffcv", "mlflow-server"}


def link_the_clone(here: Path) -> None:
    for name in ("data_prep", "karat_scale", "ds_configs"):
        (here / name).symlink_to(ROOT / name)


@pytest.mark.multiprocess
def test_imagenet_in_three_steps(image_folder: Path, tmp_path: Path) -> None:
    link_the_clone(tmp_path)
    (tmp_path / "data").mkdir()
    run(find("karat prepare webdataset --src /").replace("/path/to/imagenet", str(image_folder)), tmp_path)
    small = [*SMALL, "schedule.warmup_epochs=0", "train.precision=fp32"]
    for steps in (8, 10):  # the second call is the resume
        run(find("karat launch").replace("launch", "launch --ranks 2", 1), tmp_path, *small, f"train.max_steps={steps}")
    assert [event["step"] for event in events(tmp_path / "runs/tiny_g3b", "resume")] == [8]
    assert "on 28 images" in run(find("karat eval runs/tiny"), tmp_path).stdout


@pytest.mark.slow
def test_train_your_own(image_folder: Path, tmp_path: Path) -> None:
    link_the_clone(tmp_path)
    (tmp_path / "photos").symlink_to(image_folder)
    (recipe,) = blocks("yaml")
    (tmp_path / "photos.yaml").write_text(recipe)
    small = [*SMALL, "schedule.warmup_epochs=0", "train.precision=fp32"]
    for start in ("karat train photos", "karat eval runs/photos"):
        run(find(start), tmp_path, *(small if "train" in start else ()))
    run(find("karat export"), tmp_path)
    (loading,) = blocks("python")
    loading = loading.replace("photos/val/owl/1.jpg", "photos/val/class3/000.jpg")
    assert output_of(sys.executable, "-c", loading, cwd=tmp_path) in {f"class{number}\n" for number in range(4)}


def test_other_commands_by_example(image_folder: Path, tmp_path: Path) -> None:
    small = (*SMALL, "data.backend=folder", f"data.path={image_folder}", "train.global_batch=16")
    for part, more, said in (
        ("karat train imagenet", (), "grid: 5"),
        ("karat recipes", (), "imagenet_vit_small_g3b"),
        ("karat explain", (), "forward pass of a rank"),
        (
            "--gpu h100",
            ("model.depth=1", "model.image_size=64"),
            "recommended: deepspeed.config=zero0 train.micro_batch=",
        ),
        ("--dry-run", (*small, "schedule.warmup_epochs=0", "train.precision=fp32"), "64 training and 28 validation"),
        ("karat train cifar10", (*small, "train.epochs=1"), "finished"),
    ):
        (command,) = [line for line in COMMANDS if part in line]
        assert said in run(command, tmp_path, *more).stdout


def test_the_recipes_of_the_table_exist() -> None:
    section = README.split("## Recipes")[1].split("\n##")[0]
    rows = [re.findall(r"`(.*?)`", line.split("|")[1]) for line in section.splitlines() if line.startswith("| `")]
    for pattern in itertools.chain(*rows):
        assert any(fnmatchcase(name, pattern) for name in shipped_recipes()), pattern
