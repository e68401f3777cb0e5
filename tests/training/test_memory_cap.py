"""Under a fixed cap of memory, the materialised attention trains with a policy and fails in one line without."""

import resource
import subprocess
from pathlib import Path

import pytest

from karat_scale.commands.plan.choose import Machine, consider
from karat_scale.commands.plan.memory import Subject
from karat_scale.recipe.loading import load_recipe
from tests.conftest import SMALL, events, karat_command, karat_environment, summary

MB = 1 << 20


def train_capped(megabytes: int, run: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`karat train` with at most so many megabytes of data, as `ulimit -d` sets it."""

    def cap() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (megabytes * MB, megabytes * MB))

    command = karat_command(["train", *arguments, f"run.dir={run}"])
    return subprocess.run(
        command, env=karat_environment(), preexec_fn=cap, capture_output=True, text=True, timeout=3000, check=False
    )


def assert_the_policy_decides(megabytes: int, scratch: Path, *arguments: str) -> Path:
    """Without recomputing attention the run ends in one line that says what to change; with it, it ends well."""
    none, run = scratch / "none", scratch / "attention"
    done = train_capped(megabytes, none, *arguments)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: out of memory: can't allocate memory: you tried to allocate ")
    assert "train.micro_batch (now 8)" in line
    assert "train.recompute.policy (now none)" in line
    assert "Traceback" not in done.stderr
    assert summary(none)["exit"] == 2
    done = train_capped(megabytes, run, *arguments, "train.recompute.policy=attention")
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.slow
def test_a_small_model_fits_with_its_attention_recomputed(tmp_path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "data: {backend: synthetic, synthetic_samples: 8}\nattention: {kind: karat, implementation: reference}\n"
    )
    sizes = ("model.image_size=96", "model.depth=4", "train.ema_decay=0", "train.epochs=1", "data.workers=0")
    run = assert_the_policy_decides(1000, tmp_path, str(recipe), *SMALL, *sizes, "schedule.warmup_epochs=0")
    assert summary(run)["steps"] == 1


@pytest.mark.night
@pytest.mark.timeout(3600)
def test_vit_base_g1b_trains_twenty_steps_where_it_would_not_fit(tmp_path) -> None:
    """As docs/memory.md has it, and `karat plan` predicted both."""
    base = (
        *("run.device=cpu", "data.backend=synthetic", "data.synthetic_samples=8", "data.workers=0"),
        *("attention.implementation=reference", "train.precision=fp32", "deepspeed.config=zero0"),
        *("train.global_batch=8", "train.micro_batch=8", "train.eval_batch=8", "train.max_steps=20"),
        *("train.eval_every_epochs=100", "train.ema_decay=0", "log.every_steps=1"),
    )
    cap = 3200
    machine = Machine(world=1, memory=cap * MB, on_gpu=False)
    for policy, fits in (("none", False), ("attention", True)):
        recipe = load_recipe("imagenet_vit_base_g1b", [*base, f"train.recompute.policy={policy}"])
        assert consider(Subject(recipe, on_gpu=False), machine, "zero0", 8).fits == fits
    run = assert_the_policy_decides(cap, tmp_path, "imagenet_vit_base_g1b", *base)
    assert [event["step"] for event in events(run, "train")] == list(range(1, 21))
