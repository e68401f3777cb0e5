import json
from pathlib import Path

import pytest

from benchmarks.recompute import main


@pytest.mark.slow
def test_bench_recompute_prints_ratios_and_writes_json(tmp_path: Path, capsys) -> None:
    out = tmp_path / "recompute.json"
    size = ["--model", "vit_mini_patch4_28", "--image-size", "64", "--batch", "2", "--rounds", "1"]
    main([*size, "--only", "reference", "--json", str(out)])
    result = json.loads(out.read_text())
    assert {"model", "batch", "grid", "dtype", "device", "image_size", "threads"} <= result.keys()
    rows = {row["policy"]: row for row in result["rows"]}
    assert list(rows) == ["none", "attention", "every", "all", "budget of half"]
    assert rows["none"]["ratio_time"] == rows["none"]["ratio_saved"] == 1.0
    saved = {policy: row["saved_mb"] for policy, row in rows.items()}
    assert saved["all"] < saved["attention"] < saved["none"]
    assert saved["all"] < saved["every"] < saved["none"]
    assert saved["budget of half"] <= saved["none"] / 2
    assert rows["all"]["peak_mb"] < rows["none"]["peak_mb"]
    assert "budget" in capsys.readouterr().out  # a narrow terminal breaks the line after it
