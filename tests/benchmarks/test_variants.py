import json

from benchmarks.variants import main


def test_each_kind_is_measured_over_softmax(tmp_path):
    file = tmp_path / "figures.json"
    main(
        [
            "--only",
            "static",
            "content",
            "hybrid",
            "--batch",
            "1",
            "--tokens",
            "17",
            "--rounds",
            "1",
            "--json",
            str(file),
        ]
    )
    ratios = json.loads(file.read_text())["ratios"]
    assert list(ratios) == ["softmax", "static", "content", "hybrid"]
    assert ratios["softmax"] == 1
    assert min(ratios.values()) > 0
