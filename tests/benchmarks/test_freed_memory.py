"""The benchmark of freed memory, with one step."""

import pytest

from benchmarks.freed_memory import main
from tests.conftest import SMALL


@pytest.mark.slow
def test_both_are_measured_and_compared(capsys: pytest.CaptureFixture[str]) -> None:
    small = (*SMALL, "data.backend=synthetic", "data.synthetic_samples=32", "schedule.warmup_epochs=0")
    main(["cifar10_vit_nano_32px", *small, "--steps", "1", "--rounds", "1"])
    printed = capsys.readouterr().out
    for line in ("kept", "given back", "given back / kept: "):
        assert line in printed
