"""Writing files: whole under their name, and nothing replaced that is not a file."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from karat_scale.foundation.files import append_to, make_folder, read_image, read_text, replace_file, write_atomically


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
    imports = "from pathlib import Path; from karat_scale.foundation.files import write_atomically"
    program = f"{imports}; write_atomically(Path('/dev/stdout'), 'x')"
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


@pytest.mark.parametrize("what", ["link", "fifo"])
def test_a_file_of_ours_replaces_what_has_its_name(what: str, tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "x"
    target.write_text("mine")
    os.mkfifo(path) if what == "fifo" else path.symlink_to(target)
    replace_file(path, "ours")
    assert path.read_text() == "ours"
    assert not path.is_symlink()
    assert target.read_text() == "mine"


def test_lines_are_added_to_no_link_and_to_no_pipe(tmp_path: Path) -> None:
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


def test_no_folder_of_ours_is_made_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="nothing is written where it leads"):
        make_folder(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_an_image_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(OSError, match=r"larger than 536\.871 MB"):
        read_image(tmp_path / "sparse.jpg")
