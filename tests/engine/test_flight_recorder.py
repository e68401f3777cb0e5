"""The collectives that ranks had entered when one of them stalled."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from karat_scale.engine.devices import _newest_record
from tests.conftest import rank_environments


@pytest.mark.parametrize(("nccl", "gloo", "newer"), [(5, 3, "nccl"), (3, 5, "fr"), (None, 3, "fr"), (3, None, "nccl")])
def test_of_two_records_the_newer_is_written(nccl: int | None, gloo: int | None, newer: str) -> None:
    """What torch for CUDA has; the one for CPUs has no record of NCCL's."""

    def record(last: int | None) -> bytes:
        times = [] if last is None else [0, last]
        return json.dumps({"entries": [{"time_created_ns": time} for time in times]}).encode()

    torch_c = SimpleNamespace(
        _dump_nccl_trace_json=lambda: record(nccl),
        _dump_fr_trace_json=lambda: record(gloo),
        _dump_nccl_trace=lambda: b"nccl",
        _dump_fr_trace=lambda: b"fr",
    )
    assert _newest_record(torch_c)[1] == newer.encode()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_rank_that_is_missing_from_a_collective_is_named(tmp_path: Path) -> None:
    program = textwrap.dedent(
        f"""
        import os, time
        from pathlib import Path
        import torch
        from karat_scale.engine.heartbeat import Heartbeat
        from karat_scale.engine import distributed
        from karat_scale.engine.devices import write_flight_record

        world = distributed.start("cpu")
        heartbeat = Heartbeat(Path({str(tmp_path)!r}), world.rank, "", write_flight_record).start()
        world.sum(torch.ones(2))
        heartbeat.beat("forward", 1)
        written = Path({str(tmp_path)!r}) / "diagnostics" / f"flight-{{1 - world.rank}}"
        if world.rank == 0:
            world.sum(torch.ones(3))  # rank 1 comes late: after both have written
        else:
            while not written.is_file() or not written.with_name("flight-1").is_file():
                time.sleep(0.05)
            world.sum(torch.ones(3))
        heartbeat.stop()
        distributed.stop()
        """
    )
    environments = [{**each, "KARAT_STALL_SECONDS": "900,step=0.5"} for each in rank_environments(2)]
    command = [sys.executable, "-c", program]
    ranks = [subprocess.Popen(command, env=each, stderr=subprocess.PIPE, text=True) for each in environments]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    last = [
        int(re.search(rf"rank {number}: its last collective is number (\d+), gloo:all_reduce", text)[1])
        for number, text in enumerate(said)
    ]
    assert last[0] == last[1] + 1  # rank 1 has not entered the one that rank 0 waits in
    assert all((tmp_path / "diagnostics" / f"flight-{rank}").stat().st_size for rank in range(2))
