"""The limits of each phase, as the launch wrapper passes them."""

import math
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.commands.status.watch import Watch
from karat_scale.commands.status.watch import main as watch
from karat_scale.engine.heartbeat import Sign, StallLimits
from tests.conftest import SMALL


def test_one_number_holds_for_all_phases_that_are_not_named() -> None:
    limits = StallLimits.parse("900, compile=3600,save=0")
    assert [limits.of(doing) for doing in ("forward", "waiting for data", "compiling")] == [900, 900, 3600]
    assert limits.of("saving") == limits.of("snapshot") == math.inf
    assert limits.plus(6).of("forward") == 906
    assert limits.plus(6).of("saving") == math.inf
    assert limits


@pytest.mark.parametrize("text", ["", "0"])
def test_no_limit_is_infinite(text: str) -> None:
    limits = StallLimits.parse(text)
    assert not limits
    assert limits.of("forward") == limits.plus(6).of("forward") == math.inf


def test_only_a_phase_may_have_a_limit() -> None:
    limits = StallLimits.parse("data=60")
    assert limits
    assert limits.of("waiting for data") == 60
    assert limits.of("backward") == math.inf


@pytest.mark.parametrize("text", ["x", "900,800", "900,compil=3", "-1", "900,save=", "nan", "inf"])
def test_a_mistake_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"should be seconds|is no phase"):
        StallLimits.parse(text)


def test_a_compilation_may_take_longer_than_a_step() -> None:
    watch = Watch(1, StallLimits.parse("60,compile=600"), 0.0)

    def verdict(doing: str, second: int, beats: int) -> str | None:
        return watch.look([Sign(0, "node0", 1, "", beats, doing, 1, float(second))], float(second))

    assert all(verdict("compiling", second, 1) is None for second in range(500))
    assert all(verdict("forward", 500 + second, 2) is None for second in range(60))
    assert verdict("forward", 561, 2) is not None


def test_a_mistake_ends_the_run_and_the_watch_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KARAT_STALL_SECONDS", "15m")
    overrides = (*SMALL, "data.backend=synthetic", "schedule.warmup_epochs=0", f"run.dir={tmp_path}")
    assert main(["train", "imagenet_vit_tiny_g3b", *overrides]) == 2
    line = "'15m' should be seconds, or PHASE=seconds after the first"
    assert capsys.readouterr().err == f"error: STALL_SECONDS: {line}\n"
    with pytest.raises(SystemExit):
        watch([str(tmp_path), "--ranks", "1", "--stall", "15m"])
    assert line in capsys.readouterr().err
