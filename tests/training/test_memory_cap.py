"""Under a fixed memory limit, materialised attention trains if it is recomputed, and otherwise fails in one line."""

import resource
import subprocess
from pathlib import Path

import pytest

from tests.conftest import SMALL, karat_command, run_to_end, summary

CAP = 1000 << 20


def train_capped(run: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `karat train` with at most CAP bytes of data, the limit that `ulimit -d` sets."""
    command = karat_command(["train", *arguments, f"run.dir={run}"])
    return run_to_end(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (CAP, CAP)))


@pytest.mark.slow
def test_a_small_model_fits_with_its_attention_recomputed(tmp_path) -> None:
    """Without recomputing attention the run ends in one line that says what to change; with recomputing it succeeds."""
    recipe, none, run = tmp_path / "small.yaml", tmp_path / "none", tmp_path / "attention"
    recipe.write_text(
        "data: {backend: synthetic, synthetic_samples: 8}\nattention: {kind: karat, implementation: reference}\n"
    )
    sizes = ("model.image_size=96", "model.depth=4", "train.ema_decay=0", "train.epochs=1", "data.workers=0")
    arguments = (str(recipe), *SMALL, *sizes, "schedule.warmup_epochs=0")
    done = train_capped(none, *arguments)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: out of memory: can't allocate memory: you tried to allocate ")
    assert "train.micro_batch (now 8)" in line
    assert "train.recompute.policy (now none)" in line
    assert "Traceback" not in done.stderr
    assert summary(none)["exit"] == 2
    done = train_capped(run, *arguments, "train.recompute.policy=attention")
    assert done.returncode == 0, done.stderr
    assert summary(run)["steps"] == 1
