import json
from pathlib import Path

from karat_scale.reporting.metrics import MetricsLog, open_trackers


def test_each_event_is_a_line_on_disk_at_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file)
    log.write("train", 3, loss=1.5, grad_norm=float("nan"))
    (line,) = file.read_text().splitlines()
    record = json.loads(line)
    assert (record["event"], record["step"], record["loss"], record["grad_norm"]) == ("train", 3, 1.5, None)
    log.close()
    again = MetricsLog(file)
    again.write("end", 4)
    again.close()
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["train", "end"]


def test_tensorboard_gets_the_scalars(small_recipe, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path / "m.jsonl", open_trackers(tmp_path, small_recipe(), ["tensorboard"]))
    for step in (1, 2):
        log.write("train", step, loss=float(step), lr=0.1, grad_norm=None, images_per_second=None)
    log.write("eval", 2, top1=50.0, top5=100.0, loss=1.0)
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/loss")] == [1.0, 2.0]
    assert board.Scalars("eval/top1")[0].value == 50.0
