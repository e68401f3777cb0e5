import json

from benchmarks.order import main


def test_both_policies_are_measured(shards, tmp_path, capsys):
    out = tmp_path / "order.json"
    arguments = ["--samples", "5000", "--batch", "50", "--block", "20", "--window", "10"]
    main([*arguments, "--path", str(shards), "--json", str(out)])
    full, block = json.loads(out.read_text())["rows"]
    assert "global batch 50" in capsys.readouterr().out
    assert (full["order"], block["order"]) == ("full", "block")
    # A batch of 50 of 5,000: about 45 of the 250 blocks in a full shuffle, at most the 10 of a window otherwise.
    assert 40 < full["blocks_per_batch"] < 50
    assert block["blocks_per_batch"] <= 10
    # Of 200 in a window, a batch of 50 has a neighbour with probability about 1 in 4.
    assert full["neighbours_together"] < 0.03
    assert 0.18 < block["neighbours_together"] < 0.28
    assert 0.9 < full["mean_shift"] < 1.1
    assert 0.85 < block["mean_shift"] < 1.15
    assert (full["reads_per_image"], block["reads_per_image"]) == (1, 0.05)
    assert full["cold_images_per_second"] > 0
    assert block["cold_images_per_second"] > 0
