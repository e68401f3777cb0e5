"""Tests of a rank's heartbeat and what it shows: which rank stalls, by the limit of each phase, and which is slow."""

import itertools
import math
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.commands.submit.within_job import Watch
from karat_scale.commands.submit.within_job import main as within_job
from karat_scale.engine.heartbeat import (
    Heartbeat,
    Sign,
    StallLimits,
    Stragglers,
    read_signs,
    slow_factor,
    slow_ranks,
)
from tests.conftest import SMALL, karat_environment


def test_the_last_sign_says_where_the_rank_stood_and_a_torn_one_is_passed_over(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    heartbeat = Heartbeat(tmp_path, 3).start()
    assert [sign.rank for sign in read_signs(tmp_path)] == [3]  # from the start: a second start looks for it
    heartbeat.beat("forward", 41)
    heartbeat.beat("backward", 41)
    heartbeat.stop()
    (sign,) = read_signs(tmp_path)
    assert (sign.rank, sign.host, sign.beats, sign.doing, sign.step) == (3, "node7", 3, "backward", 41)
    assert sign.start == "12-0"
    (tmp_path / "heartbeats" / "rank-00001.json").write_text('{"rank": 1')  # torn
    assert [sign.rank for sign in read_signs(tmp_path)] == [3]


def test_a_rank_that_stalls_shows_its_stack(tmp_path) -> None:
    program = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from karat_scale.engine.heartbeat import Heartbeat

        def wait_in_a_collective():
            heartbeat.beat("forward", 1)
            sys.stdin.read()

        heartbeat = Heartbeat(Path({str(tmp_path)!r}), 0).start()
        wait_in_a_collective()
        heartbeat.stop()
        """
    )
    environment = {**karat_environment(), "KARAT_STALL_SECONDS": "0,step=0.5"}
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stderr=pipe, text=True) as process:
        shown = list(itertools.takewhile(lambda line: "in wait_in_a_collective" not in line, process.stderr))
        process.stdin.close()  # ends the wait, after the stack was shown
    assert process.returncode == 0
    assert any("Timeout" in line for line in shown)


def signs(*own_seconds: float) -> list[Sign]:
    """Return the signs of ranks 0, 1, ..., each on a node of its own."""
    return [Sign(rank, f"node{rank}", 1, "", own_seconds=s) for rank, s in enumerate(own_seconds)]


def test_a_rank_far_above_the_others_is_named_and_alike_alone_unknown_or_tiny_is_not_slow() -> None:
    (line,) = slow_ranks(signs(0.2, 0.21, 0.5, 0.19))
    assert line == "rank 2 on node2 takes 0.5 s of its own per step (data and forward pass), 2.5 times the others"
    assert [line[:6] for line in slow_ranks(signs(0.4, 0.2))] == ["rank 0"]
    for own_seconds in ([0.2, 0.29], [0.5], [0.5, 0.0], [0.001, 0.009]):
        assert slow_ranks(signs(*own_seconds)) == []


def test_the_factor_may_be_set_and_changed_while_a_run_trains(tmp_path) -> None:
    stragglers = Stragglers()
    named = []
    for content, seconds in ((None, 0.27), ("1.3", 0.28), ("1.3\n", 0.29), ("0.5", 0.2), ("x", 0.21), ("nan", 0.22)):
        if content is not None:
            (tmp_path / "slow_factor").write_text(content)
        factor = slow_factor(tmp_path)
        named.append((factor, len(stragglers.look(signs(0.2, seconds), factor))))
    assert named == [(1.5, 0), (1.3, 0), (1.3, 1), (1.5, 0), (1.5, 0), (1.5, 0)]


def test_one_slow_report_may_be_chance_and_two_are_told_once() -> None:
    stragglers = Stragglers()
    assert stragglers.look(signs(0.2, 0.5)) == []
    assert stragglers.look(signs(0.2, 0.5)) == []  # the same report, seen again
    (line,) = stragglers.look(signs(0.2, 0.51))
    assert line.startswith("rank 1 on node1")
    assert stragglers.look(signs(0.2, 0.52)) == []
    stragglers = Stragglers()
    for own_seconds in (0.5, 0.21, 0.51, 0.22):  # slow only now and then
        assert stragglers.look(signs(0.2, own_seconds)) == []


def test_one_number_holds_for_all_phases_that_are_not_named() -> None:
    limits = StallLimits.parse("900, compile=3600,save=0")
    assert [limits.of(doing) for doing in ("forward", "waiting for data", "compiling")] == [900, 900, 3600]
    assert limits.of("saving") == limits.of("snapshot") == math.inf
    assert limits.plus(6).of("forward") == 906
    assert limits.plus(6).of("saving") == math.inf
    assert limits
    for limits in map(StallLimits.parse, ("", "0")):
        assert not limits
        assert limits.of("forward") == limits.plus(6).of("forward") == math.inf
    limits = StallLimits.parse("data=60")
    assert limits
    assert (limits.of("waiting for data"), limits.of("backward")) == (60, math.inf)
    for text in ("x", "900,800", "900,compil=3", "-1", "900,save=", "nan", "inf"):
        with pytest.raises(ValueError, match=r"should be seconds|is not a phase"):
            StallLimits.parse(text)


def test_a_compilation_may_take_longer_than_a_step() -> None:
    watch = Watch(1, StallLimits.parse("60,compile=600"), 0.0)

    def verdict(doing: str, second: int, beats: int) -> str | None:
        return watch.look([Sign(0, "node0", 1, "", beats, doing, 1, float(second))], float(second))

    assert all(verdict("compiling", second, 1) is None for second in range(500))
    assert all(verdict("forward", 500 + second, 2) is None for second in range(60))
    assert verdict("forward", 561, 2) is not None


def test_a_rank_that_verifies_files_alone_is_not_taken_for_one_that_is_ahead(tmp_path: Path) -> None:
    watch, ranks = Watch(2, StallLimits(60), 0.0), [Heartbeat(tmp_path, rank) for rank in range(2)]
    for _ in range(9):
        ranks[0].move("starting")
    for rank in ranks:
        rank.beat("waiting for data", 1)
    ranks[1].beat("forward", 1)
    for rank in ranks:
        rank.start().stop()
    assert watch.look(read_signs(tmp_path), 0.0) is None
    verdict = watch.look(read_signs(tmp_path), 100.0)
    assert verdict is not None
    assert re.match(r"rank 0 on .*; 1 of 2 ranks wait for it$", verdict)


def test_a_verdict_counts_from_the_last_beat_not_from_when_it_was_seen() -> None:
    watch = Watch(1, StallLimits(60), 0.0)
    sign = Sign(0, "node0", 1, "", 1, "forward", 1, written=8.0, since_beat=8.0)
    assert watch.look([sign], 10.0) is None
    assert watch.deadline == 62
    assert watch.look([sign], 62.0) is None
    assert watch.look([sign], 62.1) is not None


def test_a_stall_is_told_when_it_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KARAT_STALL_SECONDS", "0.2")
    monkeypatch.setattr("karat_scale.engine.heartbeat.WRITE_SECONDS", 600.0)  # else a tick may find it, too
    told = threading.Event()
    heartbeat = Heartbeat(tmp_path, 0, on_stall=lambda *_: told.set()).start()
    assert told.wait(60)
    heartbeat.stop()
    (sign,) = read_signs(tmp_path)
    assert sign.since_beat > 0.2


def test_a_mistake_ends_the_run_and_the_watch_with_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("KARAT_STALL_SECONDS", "15m")
    overrides = (*SMALL, "data.backend=synthetic", "schedule.warmup_epochs=0", f"run.dir={tmp_path}")
    assert main(["train", "imagenet_vit_tiny_g3b", *overrides]) == 2
    line = "'15m' should be seconds, or PHASE=seconds after the first"
    assert capsys.readouterr().err == f"error: KARAT_STALL_SECONDS (in a SLURM job STALL_SECONDS): {line}\n"
    with pytest.raises(SystemExit):
        within_job(["watch", str(tmp_path), "--ranks", "1", "--stall", "15m"])
    assert line in capsys.readouterr().err
