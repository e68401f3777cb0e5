"""A shard is read whole, or it is an error in one line that names it."""

import gzip
from pathlib import Path

import pytest

from karat_scale.data.streams import DOUBLED, read_tar
from karat_scale.foundation.errors import DataError
from tests.conftest import wait_until
from tests.data.backends.helpers import flip, running
from tests.data.tars import image, sample, write_tar

LONG = [member for number in range(40) for member in sample(number, number % 3)]
MEMBERS = [member for number in range(4) for member in sample(number, number % 3)]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    write_tar(tmp_path / "a.tar", MEMBERS)
    return tmp_path / "a.tar"


def read(url: object) -> list[dict[str, object]]:
    return list(read_tar(str(url), str(url)))


def refused(url: object) -> str:
    with pytest.raises(DataError) as caught:
        read(url)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"data.stream: {url} ")
    return text.removeprefix(f"data.stream: {url} ")


@pytest.mark.parametrize("spelled", ["{}", "file://{}", "pipe:cat {}", "pipe:gzip -c {} | zcat"])
def test_the_library_opens_files_and_commands(tar: Path, spelled: str) -> None:
    found = read(spelled.format(tar))
    assert [one["__key__"] for one in found] == ["s0", "s1", "s2", "s3"]
    assert [one["jpg"] for one in found] == [image(number) for number in range(4)]
    assert [one["cls"] for one in found] == [b"0", b"1", b"2", b"0"]


def member_start(tar: Path, name: str) -> int:
    return tar.read_bytes().index(name.encode().ljust(100, b"\0"))


def cut(tar: Path, at: int) -> None:
    tar.write_bytes(tar.read_bytes()[:at])


NOT_WHOLE = {
    "empty": (lambda tar: cut(tar, 0), "is empty"),
    "cut in the first": (lambda tar: cut(tar, 700), "is damaged or ends early (unexpected end of data); "),
    "cut inside": (
        lambda tar: cut(tar, member_start(tar, "s2.jpg") + 900),
        "(unexpected end of data) after 1 sample; ",
    ),
    "cut between": (lambda tar: cut(tar, member_start(tar, "s2.jpg")), "ends early after 2 samples"),
    "cut in a header": (lambda tar: cut(tar, member_start(tar, "s2.cls") + 100), "ends early after 3 samples"),
    "damaged": (lambda tar: flip(tar, 150), "is damaged or ends early"),
    "joined": (lambda tar: tar.write_bytes(2 * tar.read_bytes()), "another tar that follows it, after 4 samples"),
    "compressed": (lambda tar: tar.write_bytes(gzip.compress(tar.read_bytes())), "is compressed, and tars are read as"),
    "page": (lambda tar: tar.write_bytes(b"<html>no such file</html>" * 99), "is damaged or ends early"),
    "missing": (lambda tar: tar.unlink(), "cannot be opened (No such file or directory)"),
}


def test_what_is_not_a_whole_tar_is_an_error(tar: Path) -> None:
    for change, said in NOT_WHOLE.values():
        write_tar(tar, MEMBERS)
        change(tar)
        assert said in refused(tar)


@pytest.mark.parametrize("header", [bytes(512), b"x" * 512], ids=["zero", "damaged"])
def test_a_header_that_the_reader_takes_for_the_end_is_an_error(tar: Path, header: bytes) -> None:
    for name in ("s1.jpg", "s20.jpg", "s37.cls", "s39.jpg", "s39.cls"):
        write_tar(tar, LONG)
        content, start = bytearray(tar.read_bytes()), member_start(tar, name)
        content[start : start + 512] = header
        tar.write_bytes(content)
        assert refused(tar).startswith("has a damaged header, or another tar that follows it, after ")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("exit 3", "ended with exit code 3; "),
        ("true", "is empty"),
        ("cat {}; exit 7", "ended with exit code 7"),
        ("head -c 3000 {}; exit 7", "ended with exit code 7"),
        ("head -c 3000 {}", "ends early after 1 sample; "),
        ("cat {}; kill -9 $$", "was ended by signal 9"),
        ("no-such-program {}", "ended with exit code 127"),
    ],
)
def test_a_command_that_fails_is_an_error_with_its_exit_code(tar: Path, command: str, said: str) -> None:
    assert said in refused(f"pipe:{command.format(tar)}")


def test_a_value_of_a_variable_is_in_no_message(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        list(read_tar("pipe:echo s3cret; exit 2", "pipe:echo ${WORD}; exit 2"))
    assert "s3cret" not in str(caught.value)


def test_a_command_that_is_not_read_to_its_end_is_ended_with_its_children(tar, tmp_path, capfd):
    write_tar(tar, LONG)
    command = f"echo $$ > {tmp_path}/shell; sleep 1234 & echo $! > {tmp_path}/child; cat {tar}; wait"
    samples = read_tar(f"pipe:{command}", "a")
    next(samples)
    samples.close()
    started = [int((tmp_path / name).read_text()) for name in ("shell", "child")]
    wait_until(lambda: not any(map(running, started)))
    assert capfd.readouterr().err == ""


def test_a_suffix_that_occurs_twice_is_told_of_and_what_is_no_sample_is_passed_over(tmp_path: Path) -> None:
    others = [("README", b"x"), (".hidden", b"x"), ("__meta__/x.jpg", b"x")]
    write_tar(tmp_path / "a.tar", [*others, *sample(0), *sample(1), *sample(1), *sample(2)])
    found = read(tmp_path / "a.tar")
    assert [(one["__key__"], DOUBLED in one) for one in found] == [("s0", False), ("s1", True), ("s2", False)]
