"""Tests of writing files: a file is replaced as a whole, a pipe or device is written to, and leftovers are removed."""

import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from karat_scale.engine.heartbeat import heartbeat_file
from karat_scale.foundation.files import (
    append_to,
    lock,
    locked,
    make_folder,
    read_image,
    read_object,
    read_text,
    remove_leftovers,
    replace_file,
    temporary_file,
    temporary_folder,
    write_atomically,
)
from karat_scale.recipe.loading import load_recipe
from karat_scale.training.run_directory import RunDirectory
from tests.conftest import ROOT, forked


def test_a_link_stays_and_its_target_is_replaced(tmp_path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_a_pipe_is_written_to(tmp_path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_atomically(pipe, "through")
    reader.join(timeout=60)
    assert read == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(os.getuid() != 0, reason="only root could replace a device")
def test_a_device_is_written_to(tmp_path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_text("x")
    except OSError:
        pytest.skip("this file system has no devices")
    write_atomically(device, "nothing")
    assert stat.S_ISCHR(device.stat().st_mode)


def test_a_full_device_is_named() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_atomically(Path("/dev/full"), "x")


@pytest.mark.parametrize("to", ["file", "pipe"])
def test_standard_output_by_its_name_takes_the_text(tmp_path, to) -> None:
    imports = "from pathlib import Path; from karat_scale.foundation.files import write_atomically"
    program = f"{imports}; write_atomically(Path('/dev/stdout'), 'x')"
    out = (tmp_path / "out").open("w") if to == "file" else subprocess.PIPE
    done = subprocess.run([sys.executable, "-c", program], stdout=out, text=True, check=True, timeout=60)
    assert (done.stdout if to == "pipe" else (tmp_path / "out").read_text()) == "x"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no /dev/shm")
def test_a_file_in_shared_memory_is_replaced_whole() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # as for shards that are staged there
        file, before = Path(folder, "dataset.json"), Path(folder, "before")
        write_atomically(file, "old")
        os.link(file, before)
        write_atomically(file, "new")
        assert (file.read_text(), before.read_text()) == ("new", "old")


def test_a_json_object_is_read_and_all_else_is_none(tmp_path) -> None:
    file = tmp_path / "summary.json"
    for content, found in {'{"a": 1}': {"a": 1}, "[1]": {}, '{"a": ': {}, "[" * 10**5: {}}.items():
        file.write_text(content)
        assert read_object(file) == found
    assert read_object(tmp_path) == read_object(tmp_path / "nothing") == {}


def test_what_is_no_small_text_file_is_refused_at_once(tmp_path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    for path in (tmp_path / "fifo", tmp_path / "device", tmp_path):
        with pytest.raises(OSError, match="not a regular file"):
            read_text(path, 100)
    (tmp_path / "large").write_bytes(bytes(101))
    with pytest.raises(OSError, match=r"larger than 0\.0001 MB"):
        read_text(tmp_path / "large", 100)
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(OSError, match=r"larger than 536\.871 MB"):
        read_image(tmp_path / "sparse.jpg")


@pytest.mark.parametrize("what", ["link", "fifo"])
def test_a_file_of_ours_replaces_what_has_its_name(what, tmp_path) -> None:
    target, path = tmp_path / "target", tmp_path / "x"
    target.write_text("mine")
    os.mkfifo(path) if what == "fifo" else path.symlink_to(target)
    replace_file(path, "ours")
    assert path.read_text() == "ours"
    assert not path.is_symlink()
    assert target.read_text() == "mine"


def test_lines_are_added_to_no_link_and_to_no_pipe(tmp_path) -> None:
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(OSError, match=r"not a regular file|symbolic links"):
            append_to(tmp_path / name)
    with append_to(tmp_path / "log") as log:
        log.write("a line")
    assert (tmp_path / "log").read_text() == "a line"
    assert (tmp_path / "target").read_text() == "mine"
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="nothing is written where it leads"):
        make_folder(tmp_path / "folder")
    assert not (tmp_path / "elsewhere").exists()


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


def test_a_killed_writers_files_go_and_a_living_ones_stay(tmp_path) -> None:
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


def test_what_was_written_is_not_locked_by_a_process_that_was_forked_meanwhile(tmp_path) -> None:
    ends, end = os.pipe()
    with temporary_file(tmp_path / "x") as temporary:
        temporary.replace(tmp_path / "x")
        child = forked(lambda: (os.close(end), os.read(ends, 1)))  # as a data worker
    with (tmp_path / "x").open("rb") as file:
        assert lock(file, wait=False)
    os.close(end)
    os.waitpid(child, 0)


@pytest.mark.usefixtures("locks_of_nfs")
def test_a_killed_writers_files_go_on_nfs(tmp_path) -> None:
    left = tmp_path / ".summary.json.abcd_123.unfinished"
    left.write_text("half")
    with temporary_file(tmp_path / "other.json") as mine:
        assert remove_leftovers(tmp_path) == []
        assert hidden(tmp_path) == [mine.name]


def test_a_process_that_was_forked_meanwhile_keeps_no_lock(tmp_path) -> None:
    with locked(tmp_path / "lock"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
    try:
        with locked(tmp_path / "lock", wait=False) as held:
            assert held is not None
    finally:
        child.kill()
        child.join()


def test_a_file_that_another_writer_takes_for_a_leftover_is_not_used(tmp_path, monkeypatch) -> None:
    """Another writer may lock the new file before its own writer does, and would remove it later."""
    make, taken = Path.touch, []

    def touch(path, *arguments, **options):
        make(path, *arguments, **options)
        if not taken:
            taken.append((path, os.open(path, os.O_RDWR)))
            assert lock(taken[0][1], wait=False)

    monkeypatch.setattr(Path, "touch", touch)
    with temporary_file(tmp_path / "x") as mine:
        assert mine != taken[0][0]
    os.close(taken[0][1])


def test_what_is_written_may_be_read_by_whom_the_umask_lets(tmp_path) -> None:
    imports = "from pathlib import Path; from karat_scale.foundation.files import write_atomically"
    program = f"{imports}; write_atomically(Path('x'), '')"
    for umask, mode in ((0o077, 0o600), (0o002, 0o644)):
        subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, umask=umask, check=True
        )
        assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_what_is_not_ours_stays(tmp_path) -> None:
    for name in (".lock", ".summary.json", ".git", ".bashrc.original", "summary.json.abcdefgh.unfinished"):
        (tmp_path / name).write_text("")
    (tmp_path / ".link.abcdefgh.unfinished").symlink_to("/etc/passwd")
    (problem,) = remove_leftovers(tmp_path)
    assert problem.startswith(f"{tmp_path / '.link.abcdefgh.unfinished'} is left over")
    assert hidden(tmp_path) == [".bashrc.original", ".git", ".link.abcdefgh.unfinished", ".lock", ".summary.json"]


@pytest.mark.parametrize("make", [temporary_file, temporary_folder])
def test_nothing_is_left_after_an_error(tmp_path, make) -> None:
    with pytest.raises(KeyboardInterrupt), make(tmp_path / "x"):
        raise KeyboardInterrupt
    assert hidden(tmp_path) == []


def test_a_start_clears_what_kills_left_in_the_run(tmp_path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.open(load_recipe("fashion_mnist_demo", [f"run.dir={directory.path}"]))
    directory.snapshots.mkdir()
    (directory.path / "heartbeats").mkdir()
    left = [
        directory.path / ".recipe.yaml.abcd_123.unfinished",
        directory.store.root / ".latest.abcd_123.unfinished",
        directory.store.root / ".saving-step-00000001" / "part",
        directory.snapshots / ".step-00000001.safetensors.abcd_123.unfinished",
        directory.path / "heartbeats" / "rank-00002.tmp",  # of a start with more ranks
        heartbeat_file(directory.path, 2),
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    mine = heartbeat_file(directory.path, 1)
    next_one = mine.with_suffix(".tmp")  # which its thread writes now
    for path in (mine, next_one):
        path.write_text("{}")
    assert directory.clear(ranks=2) == []
    assert mine.exists()
    assert next_one.exists()
    assert not [path for path in left if path.exists()]


@pytest.mark.skipif(os.geteuid() != 0, reason="an immutable file needs root")
def test_what_cannot_be_removed_is_named(tmp_path) -> None:
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
