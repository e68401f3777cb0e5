import json

import pytest

from benchmarks.resizing import main


def test_smaller_images_have_fewer_bytes_and_other_pixels(tmp_path):
    file = tmp_path / "figures.json"
    main(["--images", "3", "--rounds", "1", "--resize", "64", "200", "--json", str(file)])
    rows = {row["short_side"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["as it was", "64", "200"]
    assert rows["64"]["mean_kb"] < rows["200"]["mean_kb"] < rows["as it was"]["mean_kb"]
    assert all(row["speed"] > 0 for row in rows.values())
    for figure in ("training_levels", "evaluation_levels"):
        assert rows["64"][figure] > rows["200"][figure] > rows["as it was"][figure]
    assert rows["as it was"]["evaluation_levels"] == 0
    assert rows["as it was"]["training_levels"] == pytest.approx(0, abs=0.1)
    assert rows["64"]["enlarged"] == 1
