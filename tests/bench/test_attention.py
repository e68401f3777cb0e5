import json
from pathlib import Path

import pytest
import torch

from karat_scale.bench.attention import Case, attention_of, make_inputs
from tests.conftest import karat

ROW = {
    "implementation",
    "forward_ms",
    "forward_backward_ms",
    "peak_mb",
    "ratio_forward",
    "ratio_forward_backward",
    "ratio_memory",
}


@pytest.mark.slow
def test_bench_attention_prints_ratios_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    done = karat("bench", "attention", "--batch", "2", "--rounds", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"model", "batch", "basis", "grid", "rank", "dtype", "device"} <= result.keys()
    names = [row["implementation"] for row in result["rows"]]
    assert names[:4] == ["sdpa", "softmax", "reference", "streaming"]
    for row in result["rows"]:
        assert row.keys() >= ROW
        assert row["forward_ms"] > 0
    memory = {row["implementation"]: row["peak_mb"] for row in result["rows"]}
    assert memory["reference"] > memory["streaming"]
    assert "streaming" in done.stdout


def test_contenders_compute_what_they_are_called() -> None:
    inputs = make_inputs(Case("tiny", 1, 3, 12, "fp32", "cpu", tokens=20))
    torch.testing.assert_close(attention_of("sdpa")(*inputs), attention_of("softmax")(*inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        attention_of("streaming")(*inputs), attention_of("reference")(*inputs), rtol=1e-4, atol=1e-5
    )
