"""`karat bench gpu` itself, on the CPU at small size: the same code checks and times a card."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import karat, karat_environment


@pytest.mark.slow
def test_it_checks_measures_and_writes_as_it_goes(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = karat("bench", "gpu", "--device", "cpu", "--quick", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert len(result["check"]) == 4
    assert all(row["right"] for row in result["check"])
    assert {row["implementation"] for row in result["attention"]} >= {"sdpa", "softmax", "streaming"}
    assert [row["attention"] for row in result["step"]] == ["softmax", "karat G3B"]
    assert "4 of 4 checks are right" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = karat("bench", "gpu")
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr


def test_it_imports_nothing_but_torch() -> None:
    heavy = "('timm', 'rich', 'deepspeed', 'torchvision', 'pydantic')"
    code = f"import sys, karat_scale.bench.gpu; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=karat_environment()
    )
    assert done.stdout.strip() == "[]"
