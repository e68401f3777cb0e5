"""The check of training: every mode is right here, and each possible fault is found and named."""

import itertools
import json
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from karat_scale.attention import fourier_karat_attention
from karat_scale.attention.functional import choosing_as_on_a_gpu
from karat_scale.checkpoint.checkpoints import Checkpoints
from karat_scale.commands.bench.gpu import command, losses
from karat_scale.commands.bench.gpu.losses import TOY_MODEL, Losses, Mode, compare, dtype_of_hidden, recipe_of, train
from karat_scale.data.batch import Batch
from karat_scale.engine import engine
from karat_scale.engine.distributed import World
from karat_scale.engine.engine import Engine
from karat_scale.engine.optimizers import Ema
from karat_scale.training.tasks.classification.task import ClassificationTask
from tests.commands.bench.gpu.task import make_task
from tests.compilers import needs_compiler
from tests.conftest import ROOT

CHECKS = ("losses", "skips", "twice", "resumes", "dtypes")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Return the losses of fp32 on this CPU, trained in this process."""
    from karat_scale.engine import distributed

    directory = tmp_path_factory.mktemp("losses")
    return train(recipe_of(Mode(), "cpu", 1, TOY_MODEL, "reference", directory), distributed.start("cpu")).losses


@pytest.fixture
def compared(tmp_path: Path, world: World, expected: Losses) -> Any:
    """Return a function that compares a mode with the expected losses."""
    task, _ = make_task(scratch=tmp_path)
    return lambda mode: compare(task, world, mode, expected)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param(Mode(), marks=pytest.mark.slow),
        pytest.param(Mode("bf16", 2), marks=pytest.mark.slow),
        *(pytest.param(mode, marks=(pytest.mark.slow, needs_compiler)) for mode in losses.COMPILED),
    ],
    ids=str,
)
def test_a_mode_is_right(compared: Any, mode: Mode) -> None:
    row, wrong = compared(mode)
    assert wrong == []
    assert row["difference"] < row["allowed"] / 5
    assert all(row[check] for check in CHECKS)
    linear = {"fp32": "float32", "bf16": "bfloat16"}[mode.precision]
    dtypes = {"linear_dtype": linear, "operator_dtype": "float32"}
    inside = {key: dtype for key, dtype in row.items() if key.endswith("_dtype")}
    assert inside == ({} if mode.compile else dtypes)


def _other_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.set_lr
    monkeypatch.setattr(Engine, "set_lr", lambda self, lr: real(self, 1.001 * lr if self.stage == 1 else lr))


def _corrupted_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.backward

    def backward(self: Engine, loss: torch.Tensor) -> None:
        real(self, loss)
        bias = self.module.get_parameter("head.bias")
        bias.grad[0] += 1e-3

    monkeypatch.setattr(Engine, "backward", backward)


def _skipped_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model read a batch before its last row of pixels has arrived."""
    real = ClassificationTask.as_trained

    def as_trained(self: ClassificationTask, batch: Batch) -> Any:
        batch.images[-1, :, -1] = 0
        return real(self, batch)

    monkeypatch.setattr(ClassificationTask, "as_trained", as_trained)


def _taken_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn a NaN into gradients of 0, so that the step is taken with Adam's momentum."""
    real = Engine.backward

    def backward(self: Engine, loss: torch.Tensor) -> None:
        nothing = sum(0 * parameter.sum() for parameter in self.module.parameters())
        real(self, loss if loss.isfinite() else nothing)

    monkeypatch.setattr(Engine, "backward", backward)


def _average_of_a_skipped_step(monkeypatch: pytest.MonkeyPatch) -> None:
    real, always = Ema.update, torch.tensor(True)
    monkeypatch.setattr(Ema, "update", lambda self, step, was_taken: real(self, step, always))


def _noise(monkeypatch: pytest.MonkeyPatch) -> None:
    real, numbers = Engine.backward, itertools.count()
    monkeypatch.setattr(Engine, "backward", lambda self, loss: real(self, loss * (1 + 1e-6 * (next(numbers) % 7))))


def _forgotten_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Checkpoints.load

    def load(self: Checkpoints[Any], *arguments: Any) -> Any:
        state = real(self, *arguments)
        for moments in self.engine.deepspeed.basic_optimizer.state.values():
            moments["exp_avg"].zero_()
        return state

    monkeypatch.setattr(Checkpoints, "load", load)


def _lost_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "autocast_inside", lambda *_: None)


@pytest.mark.parametrize(
    ("harm", "mode", "checks", "sentence"),
    [
        (_other_rate, Mode(stage=1), {"losses"}, r"the loss of step \d+ is .* apart, allowed 1e-05"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (_corrupted_gradient, Mode(), {"losses"}, r"the loss of step \d+ is"),
                (_skipped_wait, Mode(), {"losses"}, r"the loss of step 1 is"),
                (_taken_step, Mode(), {"skips"}, "step 21 has a NaN on one rank, and 0 steps were skipped"),
                (_average_of_a_skipped_step, Mode(), {"skips"}, "after the skipped step 21, the loss of the evalu"),
                (_noise, Mode(), {"twice", "resumes"}, "started again, it has other bits after step 10: in"),
                (_forgotten_momentum, Mode(), {"resumes"}, "resumed at step 10, it has other bits after step 24: in"),
                (_lost_autocast, Mode("bf16"), {"dtypes"}, "linear layers compute in float32, not in bfloat16"),
            )
        ),
    ],
)
def test_what_is_wrong_is_found_and_named(compared, monkeypatch, harm, mode, checks, sentence) -> None:
    harm(monkeypatch)
    row, wrong = compared(mode)
    assert {check for check in CHECKS if not row[check]} == checks
    assert re.match(sentence, wrong[0]), wrong


def test_a_wrong_mode_is_a_failure_with_its_name(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_losses_on_the_cpu", lambda *_: {})
    monkeypatch.setattr(losses, "EAGER", (Mode(), Mode("bf16", 3)))
    monkeypatch.setattr(losses, "COMPILED", ())
    answers = iter([({"difference": 1.0}, ["the loss of step 3 is 2"]), ({"difference": 1e-7}, [])])
    monkeypatch.setattr(losses, "compare", lambda *_: next(answers))
    task, told = make_task(scratch=tmp_path)
    losses.measure(task)
    assert told["begin"] == ["fp32, ZeRO 0, eager", "bf16, ZeRO 3, eager"]
    assert [row["right"] for row in told["row"]] == [False, True]
    assert told["failed"] == [{"what": "fp32, ZeRO 0, eager", "why": "the loss of step 3 is 2"}]


@pytest.mark.parametrize(("query", "hidden"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)])
def test_the_dtype_inside_a_gpu_operator_shows_where_the_cast_output_does_not(query, hidden) -> None:
    with FakeTensorMode(), choosing_as_on_a_gpu():
        heads = torch.zeros(2, 1, 20, 16, dtype=query, requires_grad=True)
        value = torch.zeros(2, 1, 20, 16, dtype=torch.bfloat16, requires_grad=True)
        coef, proj = torch.zeros(1, 4, 20, 3), torch.zeros(1, 20, 4)
        output = fourier_karat_attention(heads, heads, value, coef, coef, proj, implementation="triton")
    assert output.dtype == torch.bfloat16
    assert dtype_of_hidden(output) == hidden


HARMED_WORKER = """
import os, sys
from karat_scale.commands.bench.gpu import losses, worker
from karat_scale.engine.engine import Engine

real = Engine.backward
losses.EAGER = (losses.Mode(), losses.Mode(stage=3))

def backward(self, loss):
    real(self, loss)
    if self.stage == 0 and os.environ.get("RANK") == "1":
        self.module.get_parameter("head.bias").grad[0] += 1e-2

if __name__ == "__main__":
    Engine.backward = backward
    worker.main(*sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_are_right_unless_one_has_a_corrupted_gradient(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "harmed_worker.py").write_text(HARMED_WORKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(command, "WORKER", "harmed_worker")
    out = tmp_path / "gpu.json"
    options = Namespace(device="cpu", only=["rank_losses"], minutes=8.0, json=str(out))
    assert command.bench_gpu(options) == 1
    result = json.loads(out.read_text())
    harmed, right = result["sections"]["rank_losses"]["rows"]
    assert (harmed["mode"], harmed["losses"], harmed["right"]) == ("fp32, ZeRO 0, eager, 2 ranks", False, False)
    assert (right["mode"], right["right"]) == ("fp32, ZeRO 3, eager, 2 ranks", True)
    assert result["verdict"] == "WRONG in 1 of 2 checks: rank_losses: fp32, ZeRO 0, eager, 2 ranks"
    assert "- FAILED: fp32, ZeRO 0, eager, 2 ranks: the loss of step" in out.with_suffix(".md").read_text()
    assert "rank_losses: failed: fp32, ZeRO 0, eager, 2 ranks: the loss of step" in capsys.readouterr().out
