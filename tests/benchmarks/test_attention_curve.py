import json
from pathlib import Path

import pytest

from benchmarks.attention_curve import growth
from tests.conftest import benchmark


def test_growth_is_the_exponent_of_a_power_law() -> None:
    assert growth([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert growth([5], [1.0]) is None


@pytest.mark.slow
def test_a_curve_measures_every_length(tmp_path: Path) -> None:
    out = tmp_path / "curve.json"
    done = benchmark("attention_curve", "64", "128", "--batch", "1", "--rounds", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [row["tokens"] for row in result["rows"]] == [64, 128]
    assert "time grows as N^" in done.stdout
