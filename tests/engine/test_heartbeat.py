"""A rank's sign of life, in real processes."""

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from karat_scale.engine.heartbeat import Heartbeat, read_signs
from tests.conftest import karat_environment


def test_the_last_sign_says_where_the_rank_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    heartbeat = Heartbeat(tmp_path, 3).start()
    heartbeat.beat("forward", 41)
    heartbeat.beat("backward", 41)
    heartbeat.stop()
    (sign,) = read_signs(tmp_path)
    assert (sign.rank, sign.host, sign.beats, sign.doing, sign.step) == (3, "node7", 3, "backward", 41)
    assert sign.start == "12-0"


def test_a_torn_file_is_passed_over(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 0).start().stop()
    (tmp_path / "heartbeats" / "rank-00001.json").write_text('{"rank": 1')
    assert [sign.rank for sign in read_signs(tmp_path)] == [0]


def test_a_rank_that_stalls_shows_its_stack(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import sys
        from pathlib import Path
        from karat_scale.engine.heartbeat import Heartbeat

        def wait_in_a_collective():
            sys.stdin.read()

        heartbeat = Heartbeat(Path({str(tmp_path)!r}), 0).start()
        wait_in_a_collective()
        heartbeat.stop()
        """
    )
    environment = {**karat_environment(), "KARAT_STALL_SECONDS": "0.05"}
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stderr=pipe, text=True) as process:
        shown = list(itertools.takewhile(lambda line: "in wait_in_a_collective" not in line, process.stderr))
        process.stdin.close()  # ends the wait, after the stack was shown
    assert process.returncode == 0
    assert any("Timeout" in line for line in shown)
