"""`karat bench gpu` itself, on the CPU at toy sizes: the same code checks and times a card."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from karat_scale.commands.bench.gpu import command
from karat_scale.commands.bench.gpu.process import run_process
from karat_scale.commands.bench.gpu.report import SECTIONS
from karat_scale.commands.doctor.machine import driver_version, no_gpu
from karat_scale.foundation.errors import UserError
from tests.conftest import ROOT, karat, karat_command, karat_environment, karat_here
from tests.data.backends.helpers import wait_until

HEAVY = ("timm", "rich", "deepspeed", "torchvision", "pydantic", "yaml", "psutil", "webdataset")


@pytest.mark.night
@pytest.mark.multiprocess
def test_every_section_runs_and_both_files_hold_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["bench", "gpu", "--device", "cpu", "--minutes", "40", "--json", str(out)]
    done = subprocess.run(karat_command(arguments), capture_output=True, text=True, env=karat_environment())
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    sections = result["sections"]
    assert list(sections) == list(SECTIONS)
    assert all(section["rows"] and not section["failed"] for section in sections.values())
    assert result["right"]
    assert sections["losses"]["rows"][0]["mode"] == "fp32, ZeRO 0, eager"
    assert sections["rank_losses"]["rows"][0]["mode"] == "fp32, ZeRO 0, eager, 2 ranks"
    rows = [(row["mode"], row["attention"]) for row in sections["training"]["rows"]]
    assert rows[:4] == [*(("eager", name) for name in ("softmax", "KArAt G1", "KArAt G3")), ("graphs", "KArAt G3")]
    assert result["finished"]
    markdown = (tmp_path / "gpu.md").read_text()
    assert result["verdict"] in markdown.splitlines()[0]
    assert all(f"#### {section.title}" in markdown for section in SECTIONS.values())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_is_timed_runs_and_both_files_hold_its_figures(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    names = ["attention", "loader", "ranks"]
    done = karat("bench", "gpu", "--device", "cpu", "--only", *names, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(out.read_text())["sections"]
    assert list(sections) == names
    assert all(section["rows"] and not section["failed"] for section in sections.values())
    assert all(row["right"] for row in sections["ranks"]["rows"])
    markdown = (tmp_path / "gpu.md").read_text()
    assert all(f"#### {SECTIONS[name].title}" in markdown for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path, capsys) -> None:
    assert karat_here("bench", "gpu", "--json", str(tmp_path / "gpu.json")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert no_gpu(driver_version(), torch.version.cuda).value in line
    assert not list(tmp_path.iterdir())


def test_a_section_that_is_not_there_is_one_line(capsys) -> None:
    assert karat_here("bench", "gpu", "--only", "kernels", "memory") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unknown value 'memory'; choose from losses, rank_losses, kernels, attention" in line


def test_the_sections_are_listed_without_importing_torch() -> None:
    code = (
        "import sys, karat_scale.commands.cli; print([name for name in ('torch', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=karat_environment())
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_torch_alone_is_enough_for_the_first_sections(tmp_path: Path) -> None:
    lacking = f"import sys; sys.modules.update(dict.fromkeys({HEAVY}))"
    (tmp_path / "sitecustomize.py").write_text(lacking)
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--only", "loader", "kernels", "attention", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "karat_scale.commands.bench.gpu", *arguments],
        capture_output=True,
        text=True,
        env={**karat_environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(out.read_text())["sections"]
    assert sections["kernels"]["rows"]
    assert sections["attention"]["rows"]
    assert "it needs timm, deepspeed" in sections["loader"]["left_out"][0]["why"]


def test_a_section_that_crashes_is_told_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "crashing_worker.py").write_text(
        "import os, signal, sys\n"
        "if sys.argv[1] == 'kernels':\n"
        "    print('an illegal memory access', file=sys.stderr, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n"
        'print(\'{"row": {"case": "ViT-Tiny", "attention": "SDPA"}}\')\n'
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "WORKER", "crashing_worker")
    out = tmp_path / "gpu.json"
    assert command.bench_gpu("cpu", ["kernels", "attention"], 1.0, str(out)) == 1
    sections = json.loads(out.read_text())["sections"]
    assert sections["kernels"]["failed"][0]["why"] == "ended by SIGSEGV\nan illegal memory access"
    assert sections["attention"]["rows"] == [{"case": "ViT-Tiny", "attention": "SDPA"}]
    assert "1 failures" in capsys.readouterr().out


def test_a_section_that_cannot_run_takes_no_time_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "telling_worker.py").write_text(
        "import json, sys\nprint(json.dumps({'row': {'case': json.loads(sys.argv[2])['seconds']}}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "WORKER", "telling_worker")
    monkeypatch.setattr(command, "RANKS_ON_A_CPU", 1)
    out = tmp_path / "gpu.json"
    assert command.bench_gpu("cpu", ["attention", "ranks"], 10.0, str(out)) == 0
    sections = json.loads(out.read_text())["sections"]
    assert sections["attention"]["rows"][0]["case"] == pytest.approx(540, abs=30)
    assert sections["ranks"]["left_out"] == [{"what": "the section", "why": "there is one card"}]


def test_what_overruns_is_left_out_and_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_worker.py").write_text(
        'import time\nprint(\'{"begin": "ViT-Small, graphs"}\', flush=True)\ntime.sleep(100)\n'
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "WORKER", "slow_worker")
    out = tmp_path / "gpu.json"
    assert command.bench_gpu("cpu", ["attention"], 0.05, str(out)) == 0
    section = json.loads(out.read_text())["sections"]["attention"]
    assert not section["failed"]
    assert section["left_out"] == [
        {"what": "ViT-Small, graphs", "why": "it was stopped after 3 s; give more by --minutes", "late": True}
    ]


def test_what_hangs_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hanging_worker.py").write_text(
        'import time\nprint(\'{"begin": "ZeRO 3"}\\n{"moved": null}\', flush=True)\ntime.sleep(100)\n'
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "WORKER", "hanging_worker")
    monkeypatch.setattr(command, "run_process", partial(run_process, hung=0.5))
    out = tmp_path / "gpu.json"
    assert command.bench_gpu("cpu", ["kernels"], 1.0, str(out)) == 1
    report = json.loads(out.read_text())
    assert report["sections"]["kernels"]["failed"] == [{"what": "ZeRO 3", "why": "hung: it has not moved for 0 s"}]
    assert report["right"] is False


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_no_process_is_left_by_a_command_that_is_ended(number: signal.Signals, tmp_path: Path) -> None:
    arguments = ["bench", "gpu", "--device", "cpu", "--only", "kernels", "--json", str(tmp_path / "gpu.json")]
    with subprocess.Popen(
        karat_command(arguments), stdout=subprocess.PIPE, text=True, env=karat_environment()
    ) as bench:
        assert bench.stdout is not None
        assert bench.stdout.readline().startswith("CPU with")  # which its process told
        (worker,) = psutil.Process(bench.pid).children()
        bench.send_signal(number)
        said = bench.stdout.read()
    wait_until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    assert bench.returncode == (1 if number == signal.SIGTERM else -number)
    assert number == signal.SIGKILL or said.splitlines()[-1].startswith("interrupted; ")


def test_every_failure_of_a_section_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_failures.py").write_text(
        "import json\n"
        "for what in ('first', 'second'):\n"
        "    print(json.dumps({'failed': {'what': what, 'why': 'ValueError'}}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "WORKER", "two_failures")
    out = tmp_path / "gpu.json"
    assert command.bench_gpu("cpu", ["kernels"], 1.0, str(out)) == 1
    failed = json.loads(out.read_text())["sections"]["kernels"]["failed"]
    assert [one["what"] for one in failed] == ["first", "second"]


def test_of_several_ranks_the_first_to_fail_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_worker.py").write_text(
        "import json, sys\n"
        "for event in ({'begin': 'zero2'}, {'ended': 'ValueError: rank 1'}, {'ended': 'connection closed'}):\n"
        "    print(json.dumps(event), flush=True)\n"
        "sys.exit(1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "WORKER", "failing_worker")
    out = tmp_path / "gpu.json"
    assert command.bench_gpu("cpu", ["attention"], 1.0, str(out)) == 1
    (failed,) = json.loads(out.read_text())["sections"]["attention"]["failed"]
    assert failed == {"what": "zero2", "why": "ValueError: rank 1"}


def test_a_section_that_runs_out_of_memory_runs_again_with_half_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hungry_worker.py").write_text(
        "import json, sys\n"
        "batch = json.loads(sys.argv[2])['batch'] or 128\n"
        "print(json.dumps({'again': batch // 2} if batch > 32 else {'row': {'case': batch}}))\n"
        "if batch > 32:\n"
        "    print(json.dumps({'ended': 'OutOfMemoryError'}))\n"
        "sys.exit(batch > 32)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(command, "WORKER", "hungry_worker")
    out = tmp_path / "gpu.json"
    assert command.bench_gpu("cpu", ["attention"], 1.0, str(out)) == 0
    section = json.loads(out.read_text())["sections"]["attention"]
    assert section["rows"] == [{"case": 32}]
    assert section["notices"] == [f"out of memory, so the batch is {batch}" for batch in (64, 32)]


def test_a_file_that_cannot_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name another file by --json"):
        command.bench_gpu("cpu", ["kernels"], 1.0, str(tmp_path / "missing" / "gpu.json"))
