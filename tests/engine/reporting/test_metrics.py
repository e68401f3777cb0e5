import json
from pathlib import Path

from karat_scale.engine.reporting.progress import MetricsLog, PlainDisplay, Reporter
from karat_scale.engine.run_state import RunState


def test_each_event_is_a_line_on_disk_at_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file)
    log.write("train", 3, loss=1.5, grad_norm=float("nan"), content={"by_query": [float("inf"), 0.5]})
    (line,) = file.read_text().splitlines()
    record = json.loads(line)
    assert (record["event"], record["step"], record["loss"], record["grad_norm"]) == ("train", 3, 1.5, None)
    assert record["content"] == {"by_query": [None, 0.5]}
    log.close()
    again = MetricsLog(file)
    again.write("end", 4)
    again.close()
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["train", "end"]


def test_an_event_does_not_join_half_a_line(tmp_path: Path) -> None:
    """What a disk leaves that was full for a while."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"event": "train", "step": 1}\n{"event": "tra')
    for step in (2, 3):
        log = MetricsLog(file)
        log.write("train", step)
        log.close()
    first, half, *others = file.read_text().splitlines()
    assert half == '{"event": "tra'
    assert [json.loads(line)["step"] for line in (first, *others)] == [1, 2, 3]


def test_histograms_are_lines_of_a_file_of_their_own_that_a_full_disk_only_stops(small_disk: Path, capsys) -> None:
    file = small_disk / "metrics.jsonl"
    reporter = Reporter(PlainDisplay(), MetricsLog(file))
    reporter.histograms(1, {"W": {"counts": [1, 2]}})
    (line,) = (small_disk / "histograms.jsonl").read_text().splitlines()
    assert json.loads(line)["histograms"] == {"W": {"counts": [1, 2]}}
    for step in range(2, 40):
        reporter.histograms(step, {"W": {"counts": [0] * 30_000}})
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "histograms.jsonl" in warning
    assert warning.endswith("there are no more histograms")
    (small_disk / "histograms.jsonl").unlink()
    reporter.end(RunState(), 0, "finished")
    reporter.close()
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["end"]
