"""Tests of tar headers in every format that tarfile and GNU tar write, with tarfile as the reference."""

import io
import os
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karat_scale.data.shards.tars import Member, scan_members
from karat_scale.foundation.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
FILES = {
    "a.jpg": b"x" * 700,
    "a.cls": b"3",
    f"{'folder/' * 20}b.jpg": b"",
    "ümläut.png": b"y" * 512,
    "c d.webp": b"z" * 513,
}


def write(path: Path, kind: str, files: dict[str, bytes] = FILES) -> None:
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1.5
            tar.addfile(member, io.BytesIO(data))


def scan(path: Path) -> list[Member]:
    content = path.read_bytes()
    return list(scan_members(lambda at, size: content[at : at + size], len(content), str(path)))


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_those_that_tarfile_finds(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    write(path, kind)
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar]
    found = scan(path)
    assert [(member.name, member.offset, member.size) for member in found] == expected
    content = path.read_bytes()
    assert [content[m.offset : m.offset + m.size] for m in found] == list(FILES.values())


def test_names_that_are_no_utf8_long_links_and_folders(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    raw = os.fsdecode(b"\xff" * 120 + b".jpg")
    (tmp_path / "in" / raw).write_bytes(b"1")
    (tmp_path / "in" / ("l" * 150)).symlink_to("t" * 150)
    (tmp_path / "in" / "z.jpg").hardlink_to(tmp_path / "in" / raw)
    for kind in ("gnu", "pax"):
        path = tmp_path / f"{kind}.tar"
        subprocess.run(["tar", "cf", path, f"--format={kind}", "--sort=name", "-C", tmp_path, "in"], check=True)
        found = {member.name: member.kind for member in scan(path)}
        assert found.pop("in/") == "directory"
        assert found == {
            f"in/{raw}": "link",
            f"in/{'l' * 150}": "link",
            "in/z.jpg": "file",
        }  # the second of two hard links


def test_sparse_members_are_told(tmp_path: Path) -> None:
    """Before the fix, a file with so many parts that old GNU tar needs more headers made the tar a damaged one."""
    for parts in (1, 4, 5, 25, 26, 60):
        with (tmp_path / "s.jpg").open("wb") as file:
            for part in range(parts):
                file.seek((part + 1) << 20)
                file.write(b"end")
        (tmp_path / "t.jpg").write_bytes(b"plain")
        for kind in ("gnu", "pax"):
            path = tmp_path / f"{kind}.tar"
            subprocess.run(["tar", "cSf", path, f"--format={kind}", "-C", tmp_path, "s.jpg", "t.jpg"], check=True)
            found = list(scan(path))
            assert [(member.name, member.kind) for member in found] == [("s.jpg", "sparse"), ("t.jpg", "file")]
            assert path.read_bytes()[found[1].offset :][:5] == b"plain"


def test_a_folder_without_a_size_and_the_sum_of_signed_bytes_are_read(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("f\udce9\udce9").tobuf(tarfile.USTAR_FORMAT, "utf-8"))
    header[156], header[148:156] = ord("5"), b" " * 8
    path = tmp_path / "old.tar"
    for size in (b"\0" * 12, b" " * 11 + b"\0"):
        header[124:136] = size
        for total in (sum(header), sum(byte - 256 * (byte > 127) for byte in header)):
            path.write_bytes(header[:148] + b"%06o\0 " % total + header[156:] + bytes(1024))
            with tarfile.open(path) as tar:
                assert [(one.name, one.kind) for one in scan(path)] == [(tar.getnames()[0], "directory")]


@settings(max_examples=30)
@given(st.data())
def test_a_cut_tar_is_never_taken_for_a_whole_one(tmp_path_factory, data) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.tar"
    write(path, data.draw(st.sampled_from(sorted(FORMATS))))
    content = path.read_bytes()
    end = content.rstrip(b"\0")
    path.write_bytes(content[: data.draw(st.integers(0, len(end)))])
    with pytest.raises(DataError):
        scan(path)


@settings(max_examples=60)
@given(st.integers(0, 511), st.integers(1, 255))
def test_a_changed_header_is_damage_or_has_no_meaning(tmp_path_factory, place: int, by: int) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.tar"
    write(path, "ustar", {"a.jpg": b"x", "b.jpg": b"y"})
    content = bytearray(path.read_bytes())
    before = scan(path)
    content[place] = (content[place] + by) % 256
    path.write_bytes(content)
    if 148 <= place < 156:  # the checksum itself, which may end in several ways
        with suppress(DataError):
            assert scan(path) == before
    else:
        with pytest.raises(DataError):
            scan(path)


def test_what_is_no_tar_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    write(path, "pax")
    for begin, tool in (
        (b"\x1f\x8b", "gunzip"),
        (b"BZ", "bunzip2"),
        (b"\xfd7zXZ", "unxz"),
        (b"\x28\xb5\x2f\xfd", "unzstd"),
    ):
        packed = tmp_path / "packed.tar"
        packed.write_bytes(begin.ljust(1024, b"x"))
        with pytest.raises(DataError, match=f"decompress it first, for example with {tool}$"):
            scan(packed)
    joined = tmp_path / "joined.tar"
    joined.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match="joined by cat"):
        scan(joined)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="cut short"):
        scan(path)
