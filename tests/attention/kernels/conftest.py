"""The instruction sets that the CPU kernel is built for."""

import pytest

from karat_scale.foundation import native_build


@pytest.fixture(params=native_build.INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set of this machine, which the CPU kernel now uses."""
    name: str = request.param
    if name not in native_build._available_instruction_sets():
        pytest.skip(f"this CPU has no {name}")
    monkeypatch.setenv("KARAT_CPU_ISA", name)
    return name
