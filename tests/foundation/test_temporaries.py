"""What a killed writer leaves behind is removed by the next one; what a living one is writing is not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from karat_scale.engine.heartbeat import heartbeat_file
from karat_scale.foundation.files import remove_leftovers, temporary_file, temporary_folder, write_atomically
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import RunDirectory
from tests.conftest import ROOT

WRITER = """
import sys, time
from pathlib import Path
from karat_scale.foundation.files import temporary_file, temporary_folder
path = Path(sys.argv[1])
with temporary_file(path) as file, temporary_folder(path) as folder:
    (folder / "part").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


def hidden(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


def test_a_killed_writers_files_go_and_a_living_ones_stay(tmp_path: Path) -> None:
    target = tmp_path / "summary.json"
    command = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        assert remove_leftovers(tmp_path) == []
        write_atomically(target, "{}")
        assert len(hidden(tmp_path)) == 2
        writer.send_signal(signal.SIGKILL)
    assert len(hidden(tmp_path)) == 2
    write_atomically(tmp_path / "other.json", "{}")
    assert len(hidden(tmp_path)) == 2  # of another name
    write_atomically(target, "{}")
    assert hidden(tmp_path) == []


@pytest.mark.usefixtures("locks_of_nfs")
def test_a_killed_writers_files_go_on_nfs(tmp_path: Path) -> None:
    left = tmp_path / ".summary.json.abcd_123.unfinished"
    left.write_text("half")
    with temporary_file(tmp_path / "other.json") as mine:
        assert remove_leftovers(tmp_path) == []
        assert hidden(tmp_path) == [mine.name]


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    for name in (".lock", ".summary.json", ".git", ".bashrc.original", "summary.json.abcdefgh.unfinished"):
        (tmp_path / name).write_text("")
    (tmp_path / ".link.abcdefgh.unfinished").symlink_to("/etc/passwd")
    (problem,) = remove_leftovers(tmp_path)
    assert problem.startswith(f"{tmp_path / '.link.abcdefgh.unfinished'} is left over")
    assert hidden(tmp_path) == [".bashrc.original", ".git", ".link.abcdefgh.unfinished", ".lock", ".summary.json"]


@pytest.mark.parametrize("make", [temporary_file, temporary_folder])
def test_nothing_is_left_after_an_error(tmp_path: Path, make) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "x"):
        raise KeyboardInterrupt
    assert hidden(tmp_path) == []


def test_a_start_clears_what_kills_left_in_the_run(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.open(load_recipe("fashion_mnist_demo", [f"run.dir={directory.path}"]))
    directory.snapshots.mkdir()
    (directory.path / "heartbeats").mkdir()
    left = [
        directory.path / ".recipe.yaml.abcd_123.unfinished",
        directory.store.root / ".latest.abcd_123.unfinished",
        directory.store.root / ".saving-step-00000001" / "part",
        directory.snapshots / ".step-00000001.safetensors.abcd_123.unfinished",
        directory.path / "heartbeats" / "rank-00001.tmp",
        heartbeat_file(directory.path, 2),  # of a start with more ranks
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    mine = heartbeat_file(directory.path, 1)
    mine.write_text("{}")
    assert directory.clear(ranks=2) == []
    assert mine.exists()
    assert not [path for path in left if path.exists()]


@pytest.mark.skipif(os.geteuid() != 0, reason="an immutable file needs root")
def test_what_cannot_be_removed_is_named(tmp_path: Path) -> None:
    stays = tmp_path / ".summary.json.abcd_123.unfinished"
    stays.write_text("half")
    if subprocess.run(["chattr", "+i", str(stays)], capture_output=True).returncode:
        pytest.skip("the file system has no immutable files")
    try:
        (problem,) = remove_leftovers(tmp_path)
        assert str(stays) in problem
        assert "remove it by hand" in problem
    finally:
        subprocess.run(["chattr", "-i", str(stays)], check=True)
