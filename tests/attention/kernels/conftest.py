"""The instruction sets of the CPU kernel, and a count of the calls in which the content form has no kernel."""

import pytest

from karat_scale.attention import variants
from karat_scale.foundation import native_build


@pytest.fixture
def by_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the rows of psi were computed one after another."""
    counted, attend = [], variants.attend_rows
    monkeypatch.setattr(variants, "attend_rows", lambda *call: counted.append(1) or attend(*call))
    return counted


@pytest.fixture(params=native_build.INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set of this machine, which the CPU kernel now uses."""
    name: str = request.param
    if name not in native_build._available_instruction_sets():
        pytest.skip(f"this CPU has no {name}")
    monkeypatch.setenv("KARAT_CPU_ISA", name)
    return name
