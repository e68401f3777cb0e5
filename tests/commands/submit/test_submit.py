"""`karat submit` writes a script that sbatch takes as it is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.commands.submit.nodes import most_nodes
from karat_scale.commands.submit.sbatch import SCRIPT, Job
from karat_scale.recipe.loading import load_recipe
from tests.commands.status.terminal import on_a_terminal
from tests.conftest import karat, karat_environment, karat_here


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


def test_on_a_terminal_it_asks_and_a_no_submits_nothing(tmp_path: Path) -> None:
    options = (f"run.dir={tmp_path / 'run'}", f"data.path={tmp_path}", "--qos=debug", "--constraint=gpu")
    with on_a_terminal("submit", "imagenet_vit_tiny_g3b", *options) as terminal:
        terminal.wait_for("submit this? [y/N]")
        assert "#SBATCH --qos=debug" in terminal.shown
        assert "#SBATCH --constraint=gpu" in terminal.shown
        terminal.type("n\n")
        terminal.wait_for("not submitted; when you want to: sbatch")
        assert terminal.process.wait(10) == 0


def test_print_shows_the_script_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    more = (
        "--mem=64G",
        "--dependency=afterok:7",
        "--mail-type=END",
        "--mail-user=a@b.c",
        "--account=a",
        "--partition=p",
    )
    where = (f"run.dir={run}", f"data.path={tmp_path / 'absent'}")
    assert main(["submit", "imagenet_vit_tiny_g3b", *where, *more, "--print"]) == 0
    assert not run.exists()
    shown, notes = capsys.readouterr()
    lines = shown.splitlines()
    assert lines[0].startswith("#!")
    for option in more:
        assert f"#SBATCH {option}" in lines
    assert f"VENV={sys.prefix}" in lines  # the tests run in one
    assert "absent is not on this machine; the job needs it" in notes
    assert "Many sites" not in shown
    assert "key=value" not in shown


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


def test_another_environment_replaces_the_one_that_karat_runs_in(tmp_path: Path, capsys) -> None:
    assert main(["submit", "imagenet_vit_tiny_g3b", f"run.dir={tmp_path / 'r'}", "--conda-env=other", "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "CONDA_ENV=other" in lines
    assert not any(line.startswith(f"VENV={sys.prefix}") for line in lines)


def test_an_option_the_script_does_not_have_is_added_to_the_others() -> None:
    lines = Job({"qos": "debug", "nodes": "3"}, {}, "print").script(SCRIPT, {}, {}, []).splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert directives[-1] == "#SBATCH --qos=debug"
    assert [line for line in directives if "nodes" in line] == ["#SBATCH --nodes=3"]
    assert "#SBATCH --requeue" in directives
    assert "set --" in lines  # sourced, a script would get the arguments of a caller


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("optim.lrr=1",), "optim.lrr: unknown key"),
        (("deepspeed.config=own.json",), "gradient_cliping: unknown key"),
        (("--gpu=h1000",), "--gpu h1000: not in the table"),
        (("--nodes=3", "--gpu=a100-40"), "does not divide over 12 ranks"),
        (("--print", "--yes"), "not allowed with argument"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text('{"gradient_cliping": 1.0}')
    assert karat_here("submit", "imagenet_vit_tiny_g3b", f"run.dir={tmp_path / 'run'}", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "run").exists()


Capture = pytest.CaptureFixture[str]
SHAPE = ("model.depth=1", "model.image_size=64", "train.global_batch=256", "--nodes=2", "--gpus-per-node=4")


def script_of(tmp_path: Path, *arguments: str, recipe: str = "imagenet_vit_tiny_g3b") -> str:
    run = tmp_path / "run"
    places = (f"run.dir={run}", f"data.path={tmp_path}")
    assert main(["submit", recipe, *places, *arguments]) == 0
    return (run / "submit.sh").read_text()


def partitioned(tmp_path: Path) -> str:
    """A recipe that says ZeRO stage 1."""
    recipe = tmp_path / "partitioned.yaml"
    recipe.write_text("extends: imagenet_vit_tiny_g3b\ndeepspeed: {config: zero1}\n")
    return str(recipe)


def test_stage_and_micro_batch_come_from_the_plan(tmp_path: Path, capsys: Capture) -> None:
    script = script_of(tmp_path, *SHAPE, "--gpu=a100-40", recipe=partitioned(tmp_path))
    assert "recommended: deepspeed.config=zero0 train.micro_batch=32" in capsys.readouterr().out
    assert script.count("train.micro_batch=32") == 1
    assert script.count("deepspeed.config=zero0") == 1  # the recipe has zero1


@pytest.mark.slow
def test_what_the_user_names_is_left_alone(tmp_path: Path, capsys: Capture) -> None:
    script = script_of(tmp_path, "train.micro_batch=8", "deepspeed.config=zero2", *SHAPE, "--gpu=a100-40")
    assert "recommended: deepspeed.config=zero2 train.micro_batch=8" in capsys.readouterr().out
    assert script.count("train.micro_batch=8") == 1
    assert script.count("deepspeed.config=zero2") == 1


@pytest.mark.slow
def test_a_stage_that_the_recipe_cannot_use_is_passed_over(tmp_path: Path, capsys: Capture) -> None:
    script = script_of(tmp_path, "train.precision=fp16", *SHAPE, "--gpu=v100-32", recipe=partitioned(tmp_path))
    assert script.count("train.micro_batch=32") == 1
    assert "recommended: deepspeed.config=zero1" in capsys.readouterr().out


@pytest.mark.slow
def test_an_evaluation_that_would_not_fit_gets_a_smaller_batch(tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "large.yaml"
    recipe.write_text("extends: imagenet_vit_tiny_g3b\ntrain: {eval_batch: 1024000}\n")
    script = script_of(tmp_path, *SHAPE, "--gpu=a100-40", recipe=str(recipe))
    (batch,) = set(re.findall(r"train\.eval_batch=(\d+)", script))
    assert f"train.eval_batch = 1024000 does not fit; {batch} does" in capsys.readouterr().out


def test_without_a_gpu_it_says_that_it_did_not_plan(tmp_path: Path, capsys: Capture) -> None:
    assert "train.micro_batch" not in script_of(tmp_path, *SHAPE)
    assert "not planned: " in capsys.readouterr().out


def test_submitting_without_a_plan_does_not_import_torch() -> None:
    code = "import sys, karat_scale.commands.submit.sbatch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


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
    command = [sys.executable, "-m", "karat_scale.commands.submit.nodes", "3", "4", *recipe, "train.global_batch=96"]
    done = subprocess.run(command, env=karat_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
