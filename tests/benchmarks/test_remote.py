import json

import pytest

from benchmarks.remote import main

pytest.importorskip("aiohttp", reason="aiohttp is not installed: pip install -e '.[remote]'")


def test_disk_and_url_are_measured_in_turn(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KARAT_DATA_CACHE", str(tmp_path))
    out = tmp_path / "remote.json"
    arguments = ["--path", str(shards), "--copies", "2", "--block", "8", "--window", "4", "--workers", "1"]
    main([*arguments, "--latency", "0.001", "--rounds", "1", "--json", str(out)])
    result = json.loads(out.read_text())
    assert "URL over disk, images by the clock: " in capsys.readouterr().out
    assert result["images"] == 128
    assert result["requests"] == result["ideal_requests"] >= 16
    assert 1 < result["bytes"] / result["ideal_bytes"] < 4
    assert result["ratio"] > 0
