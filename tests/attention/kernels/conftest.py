"""Fixtures: the instruction sets of the CPU kernel, and a count of calls that are computed by rows."""

import pytest

from karat_scale.attention import variants
from karat_scale.foundation import native_build
from tests.compilers import needs_compiler


@pytest.fixture
def by_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gains an item each time `attend_rows` computes a call in place of a kernel."""
    counted, attend = [], variants.attend_rows
    monkeypatch.setattr(variants, "attend_rows", lambda *call: counted.append(1) or attend(*call))
    return counted


@pytest.fixture(params=[pytest.param(name, marks=needs_compiler) for name in native_build.INSTRUCTION_SETS])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the CPU kernel use an instruction set and return its name; skip the test if this CPU lacks it."""
    name: str = request.param
    if name not in native_build._available_instruction_sets():
        pytest.skip(f"this CPU has no {name}")
    monkeypatch.setenv("KARAT_CPU_ISA", name)
    return name
