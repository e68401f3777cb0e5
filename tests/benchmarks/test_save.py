import json
from pathlib import Path

import pytest

from tests.conftest import benchmark


@pytest.mark.slow
def test_bench_save_prints_stalls_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "save.json"
    own = ("--model", "vit_mini_patch4_28", "--image-size", "32", "--batch", "2", "--config", "zero1", "--rounds", "2")
    done = benchmark("save", *own, "--path", str(tmp_path), "--json", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    stalls = result["stall_seconds"]
    assert list(stalls) == ["DeepSpeed's save_checkpoint", "karat, blocking", "karat, beside training"]
    assert all(seconds > 0 for seconds in (*stalls.values(), result["resume_seconds"]))
    assert "beside training: complete after" in done.stdout
    assert list(tmp_path.iterdir()) == [out]
