"""`karat quickstart` answers Ctrl-C as training does, and ends with a report and with commands that run."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from karat_scale.commands import quickstart
from karat_scale.commands.quickstart import CONTENDERS, SHARDS
from karat_scale.data.shards.shard_format import read_dataset_record, write_dataset_record
from tests.conftest import ROOT, karat_command, output_of

SAVES = f"""#!{sys.executable}
import signal, sys, time
def save(*_):
    time.sleep(1)  # longer than Python's own subprocess.run would wait
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
print("trains", flush=True)
time.sleep(60)
"""
STARTS = """
import subprocess, sys
from karat_scale.commands import quickstart
sys.executable = sys.argv[1]
try:
    quickstart._run("train")
except subprocess.CalledProcessError as error:
    print(error.returncode)
"""


def test_a_start_that_was_stopped_between_two_splits_goes_on(shards: Path, tmp_path: Path, monkeypatch) -> None:
    place = shutil.copytree(shards, tmp_path / "shards")
    monkeypatch.setattr(quickstart, "SHARDS", place)
    assert quickstart._is_prepared()
    record = read_dataset_record(place)
    record.splits.pop("val")
    write_dataset_record(place, record)
    assert not quickstart._is_prepared()


@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "ended by SIGKILL; run `karat quickstart` again"), (signal.SIGTERM, "stopped; run `karat")],
)
def test_a_part_that_a_signal_ended_is_told_with_the_code_of_a_shell(
    tmp_path: Path, monkeypatch, capsys, number: signal.Signals, said: str
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nkill -{number.value} $$\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(program))
    assert quickstart.quickstart() == 128 + number
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("send", "number"), [(os.killpg, signal.SIGINT), (os.kill, signal.SIGTERM)])
def test_a_signal_waits_until_the_run_has_saved(
    tmp_path: Path, send: Callable[[int, int], None], number: signal.Signals
) -> None:
    program = tmp_path / "python"
    program.write_text(SAVES)
    program.chmod(0o755)
    command = [sys.executable, "-c", STARTS, str(program)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as shell:
        assert shell.stdout is not None
        assert [shell.stdout.readline() for _ in range(2)] == ["$ karat train\n", "trains\n"]
        send(shell.pid, number)  # a terminal tells the whole group, docker stop only the command itself
        assert shell.stdout.read() == "saved\n75\n"


@pytest.mark.parametrize("has_gradio", [True, False])
def test_a_page_is_recommended_only_where_it_can_be_served(tmp_path, monkeypatch, capsys, has_gradio) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "is_installed", lambda module: has_gradio)
    for _, run, _ in CONTENDERS:
        run.mkdir(parents=True)
        figures = dict.fromkeys(("last_top1", "last_top5", "peak_memory_mb", "parameters"), 1)
        (run / "summary.json").write_text(json.dumps(figures))
    quickstart._print_results(Console())
    said = capsys.readouterr().out
    assert "karat predict " in said
    assert ("karat demo " in said) == has_gradio


@pytest.mark.slow
def test_it_ends_with_a_report_and_commands_that_run(tmp_path: Path) -> None:
    def karat(*words: str) -> str:
        return output_of(*karat_command(words), cwd=tmp_path)

    folder = tmp_path / "images"
    for number in range(230):
        picture = folder / ("val" if number % 2 else "train") / f"class{number // 2 % 10}" / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (28, 28), (number, 9, 99)).save(picture)
    karat("prepare", "webdataset", "--src", str(folder), "--out", str(SHARDS))
    said = karat("quickstart")
    assert (tmp_path / "runs/quickstart_report/report.html").stat().st_size > 10_000
    assert all(title.split(":")[0] in said for title, _, _ in CONTENDERS)
    assert said.count("$ karat train") == 3
    (predict,) = re.findall(r"karat (predict \S+) PICTURE", said)
    assert "%" in karat(*shlex.split(predict), str(picture))
    again = karat("quickstart")
    assert "finished before" in again
    assert "what they learned ─" not in again
    (tmp_path / CONTENDERS[1][1] / "summary.json").touch()  # as if the run were made again
    assert "what they learned ─" in karat("quickstart")
