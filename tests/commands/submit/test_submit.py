"""`karat submit` writes a script that sbatch takes as it is."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.commands.submit.sbatch import SCRIPT, Job, slurm_home
from karat_scale.commands.submit.within_job import most_nodes
from karat_scale.recipe.loading import load_recipe
from tests.commands.status.terminal import on_a_terminal
from tests.conftest import karat, output_of


def test_the_script_has_everything_filled_in(tmp_path: Path) -> None:
    run, venv = tmp_path / "my run", tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "activate").touch()
    shown = karat(
        "submit", "imagenet_vit_tiny_g3b", "optim.lr=1e-3", f"run.dir={run}", f"data.path={tmp_path}",
        "--nodes=2", "--gpus-per-node=8", "--account=physics", f"--venv={venv}",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    script = run / "submit.sh"
    text = script.read_text()
    assert text in shown.stdout
    assert f"not submitted; when you want to: sbatch {script}" in shown.stdout
    lines = text.splitlines()
    for line in ("--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--account=physics"):
        assert f"#SBATCH {line}" in lines
    assert f"VENV={venv}" in lines
    assert f"RUN='{run}'" in lines
    assert "RECIPE=imagenet_vit_tiny_g3b" in lines
    assert "set -- optim.lr=1e-3" in lines
    assert lines[-1] == f'source "$KARAT_HOME/slurm/{SCRIPT}"'
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


@pytest.mark.parametrize("answer", ["n\n", "\x04"], ids=["no", "Ctrl-D"])
def test_on_a_terminal_it_asks_and_a_no_submits_nothing(answer: str, tmp_path: Path) -> None:
    options = (f"run.dir={tmp_path / 'run'}", f"data.path={tmp_path}", "--qos=debug", "--constraint=gpu")
    with on_a_terminal("submit", "imagenet_vit_tiny_g3b", *options) as terminal:
        terminal.wait_for("submit this? [y/N]")
        assert "#SBATCH --qos=debug" in terminal.shown
        assert "#SBATCH --constraint=gpu" in terminal.shown
        terminal.type(answer)
        terminal.wait_for("not submitted; when you want to: sbatch")
        assert terminal.process.wait(60) == 0


def test_print_shows_the_script_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    more = ("--mem=64G", "--dependency=afterok:7", "--mail-type=END", "--account=a", "--partition=p")
    command = ["submit", "imagenet_vit_tiny_g3b", f"run.dir={run}", f"data.path={tmp_path / 'absent'}", "--print"]
    assert main([*command, *more]) == 0
    assert not run.exists()
    shown, notes = capsys.readouterr()
    lines = shown.splitlines()
    assert lines[0].startswith("#!")
    for option in more:
        assert f"#SBATCH {option}" in lines
    assert f"VENV={sys.prefix}" in lines  # the tests run in one
    assert "CONDA_ENV=''" in lines  # the shell of sbatch may export it
    assert "absent is not on this machine; the job needs it" in notes
    assert "Many sites" not in shown
    assert "key=value" not in shown
    assert main([*command, "--conda-env=other"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "CONDA_ENV=other" in lines
    assert [line for line in lines if line.startswith("VENV=")] == ["VENV=''"]


@pytest.mark.parametrize("command", ["submit", "sweep"])
def test_the_help_says_the_numbers_that_the_script_has(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    script = {"submit": SCRIPT, "sweep": "sweep_grid.sh"}[command]
    text = (slurm_home() / "slurm" / script).read_text()
    for option in ("nodes", "gpus-per-node", "cpus-per-task", "time"):
        (value,) = re.findall(rf"^#SBATCH --{option}=(.*)$", text, re.MULTILINE)
        assert re.findall(rf"--{option} [A-Z_]+ .*?\(default: (.*?)\)", out)[0] == value


def test_print_says_which_directory_slurm_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "my run"
    command = ["submit", "imagenet_vit_tiny_g3b", f"run.dir={run}", f"data.path={tmp_path}", "--print"]
    assert main(command) == 0
    shown, notes = capsys.readouterr()
    assert f'#SBATCH --output="{run}/%x-%j.out"' in shown.splitlines()
    (advice,) = [line for line in notes.splitlines() if "mkdir" in line]
    subprocess.run(["sh", "-c", advice.rpartition(": ")[2]], check=True)
    assert run.is_dir()
    assert main(command) == 0
    assert "mkdir" not in capsys.readouterr().err


def test_an_option_the_script_does_not_have_is_added_to_the_others() -> None:
    lines = Job({"qos": "debug", "nodes": "3"}, {}, "print").script(SCRIPT, {}, {}, []).splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert directives[-1] == "#SBATCH --qos=debug"
    assert [line for line in directives if "nodes" in line] == ["#SBATCH --nodes=3"]
    assert "#SBATCH --requeue" in directives
    assert "set --" in lines  # without it, a sourced script would get its caller's arguments


Capture = pytest.CaptureFixture[str]


def test_a_teacher_cannot_be_planned(tmp_path, capsys) -> None:
    own = (f"run.dir={tmp_path / 'run'}", f"data.path={tmp_path}", f"attention.transfer_from={tmp_path}")
    assert main(["submit", "cifar10_vit_tiny_transfer", *own, "--gpu=h100-80", "--print"]) == 2
    assert "error: --gpu: a teacher's memory is not known; leave --gpu out" in capsys.readouterr().err


SHAPE = ("model.depth=1", "model.image_size=64", "train.global_batch=256", "--nodes=2", "--gpus-per-node=4")


def script_of(tmp_path: Path, *arguments: str, recipe: str = "imagenet_vit_tiny_g3b") -> str:
    run = tmp_path / "run"
    places = (f"run.dir={run}", f"data.path={tmp_path}")
    assert main(["submit", recipe, *places, *arguments]) == 0
    return (run / "submit.sh").read_text()


SLOW = pytest.mark.slow
ZERO1 = "deepspeed: {config: zero1}"
OWN, FP16 = ("train.micro_batch=8", "deepspeed.config=zero2"), ("train.precision=fp16",)


@pytest.mark.parametrize(
    ("recipe", "overrides", "gpu", "settings"),
    [
        (ZERO1, (), "a100-40", "deepspeed.config=zero0 train.micro_batch=32"),
        pytest.param("", OWN, "a100-40", "deepspeed.config=zero2 train.micro_batch=8", marks=SLOW),  # are left alone
        pytest.param(ZERO1, FP16, "v100-32", "deepspeed.config=zero1 train.micro_batch=32", marks=SLOW),
    ],
)
def test_stage_and_micro_batch_come_from_the_plan(recipe, overrides, gpu, settings, tmp_path, capsys) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"extends: imagenet_vit_tiny_g3b\n{recipe}\n")
    script = script_of(tmp_path, *overrides, *SHAPE, f"--gpu={gpu}", recipe=str(file))
    assert f"recommended: {settings}" in capsys.readouterr().out
    stage, micro_batch = settings.split()
    assert script.count(micro_batch) == 1
    assert script.count(stage) == (stage != "deepspeed.config=zero1")  # which the recipe has


@SLOW
def test_the_plan_is_for_the_nodes_that_the_batch_divides(tmp_path: Path, capsys: Capture) -> None:
    script = script_of(tmp_path, "--nodes=3", "--gpus-per-node=4", "--gpu=h100-80", recipe="imagenet_vit_tiny_g3b")
    assert "--nodes=3" in script
    printed = capsys.readouterr()
    assert "train.micro_batch=16 (1 a step)" in printed.out  # of 128
    assert "note: takes 2 of 3 nodes" in printed.err


def test_spare_nodes_train_nothing(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARES", "1")
    lines = script_of(tmp_path, "--nodes=4", "--gpus-per-node=4").splitlines()
    assert "note: takes 2 of 3 nodes" in capsys.readouterr().err
    assert "SPARES=1" in lines
    assert "#SBATCH --no-kill" in lines
    for spares, line in {
        "4": "SPARES = 4 leaves none of --nodes=4 to train on",
        "one": "SPARES = one: should be",
    }.items():
        monkeypatch.setenv("SPARES", spares)
        assert main(["submit", RECIPE[0], "data.path=/shards", f"run.dir={tmp_path}", "--nodes=4", "--print"]) == 2
        assert line in capsys.readouterr().err


def test_the_scripts_own_nodes_and_spares_count(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(slurm_home() / "slurm", tmp_path / "slurm")
    script = tmp_path / "slurm" / SCRIPT
    script.write_text(script.read_text().replace("--nodes=1", "--nodes=1-4\nSPARES=${SPARES:-1}"))
    monkeypatch.setattr("karat_scale.commands.submit.sbatch.slurm_home", lambda: tmp_path)
    script_of(tmp_path, "--gpus-per-node=4")
    assert "note: takes 2 of 3 nodes" in capsys.readouterr().err


@SLOW
def test_an_evaluation_that_would_not_fit_gets_a_smaller_batch(tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "large.yaml"
    recipe.write_text("extends: imagenet_vit_tiny_g3b\ntrain: {eval_batch: 1024000}\n")
    script = script_of(tmp_path, *SHAPE, "--gpu=a100-40", recipe=str(recipe))
    (batch,) = set(re.findall(r"train\.eval_batch=(\d+)", script))
    assert f"train.eval_batch = 1024000 does not fit; {batch} does" in capsys.readouterr().out


def test_without_a_gpu_it_says_that_it_did_not_plan(tmp_path: Path, capsys: Capture) -> None:
    assert "train.micro_batch" not in script_of(tmp_path, *SHAPE)
    assert "not planned: " in capsys.readouterr().out
    odd = ("--nodes=1", "--gpus-per-node=3", f"run.dir={tmp_path / 'odd'}", f"data.path={tmp_path}")
    assert main(["submit", "imagenet_vit_tiny_g3b", *odd]) == 2
    assert "does not divide over 3 ranks" in capsys.readouterr().err


def test_submitting_without_a_plan_does_not_import_torch() -> None:
    code = "import sys, karat_scale.commands.submit.sbatch; print('torch' in sys.modules)"
    assert output_of(sys.executable, "-c", code) == "False\n"


RECIPE = ("imagenet_vit_tiny_g3b", "data.path=/shards")


@pytest.mark.parametrize(
    ("overrides", "nodes", "taken"),
    [
        ((), 4, 4),
        ((), 3, 2),  # 12 ranks do not divide 128
        ((), 31, 16),  # mixup wants pairs, so 32 nodes would be too many
        (("augment.mixup=0", "augment.cutmix=0"), 33, 32),
        (("train.global_batch=130",), 3, 3),  # no number of nodes fixes that
    ],
)
def test_the_largest_number_of_nodes_that_the_batch_divides(overrides: tuple[str, ...], nodes: int, taken: int) -> None:
    name, *rest = RECIPE
    assert most_nodes(load_recipe(name, [*rest, *overrides]), nodes, ranks_per_node=4) == taken


@pytest.mark.parametrize("recipe", [("train", *RECIPE), ("detect", "coco_mask_rcnn_vit_base", "data.path=/coco")])
def test_the_launch_wrapper_gets_a_number(recipe: tuple[str, ...]) -> None:
    module = ("-m", "karat_scale.commands.submit.within_job")
    command = (sys.executable, *module, "nodes", "3", "4", *recipe, "--trust", "train.global_batch=96")
    assert output_of(*command) == "3\n"
