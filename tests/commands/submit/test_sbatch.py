"""`karat submit` writes a script that sbatch takes as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.commands.submit.sbatch import SCRIPT, Job
from tests.commands.status.terminal import on_a_terminal
from tests.conftest import karat


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


def test_print_and_yes_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["submit", "imagenet_vit_tiny_g3b", "--print", "--yes"])


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


def test_a_bad_recipe_writes_nothing(tmp_path: Path, capsys) -> None:
    assert main(["submit", "imagenet_vit_tiny_g3b", "optim.lrr=1", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "optim.lrr: unknown key" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_deepspeed_file_that_is_wrong_writes_nothing(tmp_path: Path, capsys) -> None:
    own, run = tmp_path / "own.json", tmp_path / "run"
    own.write_text('{"gradient_cliping": 1.0}')
    assert main(["submit", "imagenet_vit_tiny_g3b", f"deepspeed.config={own}", f"run.dir={run}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "gradient_cliping: unknown key; did you mean gradient_clipping?" in line
    assert not run.exists()
