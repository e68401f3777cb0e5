"""Completion in a real bash, as README sets it up."""

import os
import sys
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from tests.conftest import karat_environment, output_of

COMPLETION = 'eval "$(karat completion bash)"'
ASK = (
    f"""
{COMPLETION}
"""
    + """
for COMP_LINE in "$@"; do
    COMP_POINT=${#COMP_LINE} COMP_TYPE=9 COMP_KEY=9 COMPREPLY=()
    COMP_WORDS=($COMP_LINE)
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _python_argcomplete karat "${COMP_WORDS[-1]}"
    echo "${COMPREPLY[@]}"
done
"""
)


def completed(tmp_path: Path, *lines: str) -> list[list[str]]:
    """Return what bash offers for each line."""
    command = tmp_path / "karat"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m karat_scale "$@"\n')
    command.chmod(0o755)
    environment = {**karat_environment(), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return [line.split() for line in output_of("bash", "-c", ASK, "bash", *lines, env=environment).splitlines()]


def test_bash_completes_commands_recipes_keys_and_values(tmp_path: Path) -> None:
    commands, recipes, keys, choices, detection, corruptions, analyses = completed(
        tmp_path,
        "karat compl",
        "karat train imagenet_vit_small_g3b",
        "karat train imagenet_vit_small optim.l",
        "karat train imagenet_vit_small train.tf32=",
        "karat detect coco_mask_rcnn_vit_base_g1b detector.w",
        "karat eval runs/a --corrupt fog gl",
        "karat analyze runs/a --only ca",
    )
    assert commands == ["completion"]
    assert recipes == ["imagenet_vit_small_g3b", "imagenet_vit_small_g3b_1024"]
    assert set(keys) == {"optim.lr=", "optim.lr_batch=", "optim.layer_decay="}
    assert choices == ["true", "false"]
    assert detection == ["detector.window="]
    assert corruptions == ["glass_blur"]
    assert analyses == ["calibration"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_lines_too(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "karat" in capsys.readouterr().out
