"""Writing files: whole under their name, and nothing replaced that is not a file."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from karat_scale.files import read_text, write_atomically


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_atomically(pipe, "through")
    reader.join(timeout=60)
    assert read == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.skipif(os.getuid() != 0, reason="only root could replace a device")
def test_a_device_is_written_to(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_text("x")
    except OSError:
        pytest.skip("this file system has no devices")
    write_atomically(device, "nothing")
    assert stat.S_ISCHR(device.stat().st_mode)


@pytest.mark.parametrize("to", ["file", "pipe"])
def test_standard_output_by_its_name_takes_the_text(tmp_path: Path, to: str) -> None:
    program = (
        "from pathlib import Path; from karat_scale.files import write_atomically as w; w(Path('/dev/stdout'), 'x')"
    )
    out = (tmp_path / "out").open("w") if to == "file" else subprocess.PIPE
    done = subprocess.run([sys.executable, "-c", program], stdout=out, text=True, check=True, timeout=60)
    assert (done.stdout if to == "pipe" else (tmp_path / "out").read_text()) == "x"


@pytest.mark.parametrize("what", ["fifo", "directory", "device", "too large"])
def test_what_is_no_small_text_file_is_refused_at_once(what: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(bytes(101))
    with pytest.raises(OSError, match="larger than 0.0001 MB" if what == "too large" else "not a regular file"):
        read_text(path, 100)
