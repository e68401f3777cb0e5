"""DeepSpeed's AdamW for CPUs is compiled once, and a build that was killed does not stop the next."""

import os
import sys
import time

import pytest
from torch.utils.cpp_extension import is_ninja_available

from karat_scale.engine.optimizers import QUIET_SECONDS, build_cpu_adam, cpu_adam_can_be_built, remove_stale_mark


def test_without_a_compiler_it_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} g++")  # as with ccache
    assert cpu_adam_can_be_built() == is_ninja_available()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not cpu_adam_can_be_built()


@pytest.mark.parametrize(("age", "stays"), [(QUIET_SECONDS - 30, True), (QUIET_SECONDS + 30, False)])
def test_the_mark_of_a_build_goes_when_nothing_has_changed_for_a_while(tmp_path, age: float, stays: bool) -> None:
    then = time.time() - age
    for name, time_of_change in {"lock": then - 1000, "cpu_adam.o": then}.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time_of_change, time_of_change))
    (tmp_path / "karat.lock").touch()
    remove_stale_mark(tmp_path)
    assert (tmp_path / "lock").exists() == stays


@pytest.mark.slow
def test_a_build_goes_on_after_one_that_was_killed(tmp_path, monkeypatch) -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder, builder

    if not cpu_adam_can_be_built():
        pytest.skip("no compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(builder.OpBuilder, "_loaded_ops", {})
    mark = tmp_path / CPUAdamBuilder().name / "lock"
    mark.parent.mkdir()
    mark.touch()
    os.utime(mark, (0, 0))
    build_cpu_adam()
    assert not mark.exists()
    assert list(mark.parent.glob("*.so"))
