import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from torchvision.datasets import FashionMNIST

from karat_scale.data.prepare import fetch as script
from karat_scale.data.prepare.fetch import RemoteFile, download
from karat_scale.data.prepare.make_webdataset import main as make_webdataset
from karat_scale.data.shards.shard_format import read_dataset_record
from karat_scale.foundation.errors import DataError
from tests.servers import Answering, serving

NAMES = [name for name, _ in FashionMNIST.resources]
BIG = bytes(range(256)) * 10_000


class Files(Answering):
    """Serves a folder, from the offset that is requested.

    Below /cut/ the connection ends halfway, and below /whole/ the offset is ignored.
    """

    folder: Path
    asked: list

    def get(self):
        path = self.folder / self.path.rpartition("/")[2]
        if not path.is_file():
            return self._answer(b"", 404)
        data = path.read_bytes()
        begin = int(m[1]) if (m := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        if self.path.startswith("/whole/"):
            begin = 0
        if begin >= len(data):
            return self._answer(b"", 416)
        self.asked.append((self.path, begin))
        sent = data[begin : len(data) // 2] if self.path.startswith("/cut/") else data[begin:]
        self.close_connection = True
        self._answer(sent, 206 if begin else 200, **{"Content-Length": str(len(data) - begin)})


@pytest.fixture
def served(tmp_path):
    """Yield what a web server on this machine was asked for, its address and its folder."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()
    with serving(Files, folder=folder, asked=asked) as address:
        yield asked, address, folder


def remote(folder: Path, name: str, *addresses: str) -> RemoteFile:
    return RemoteFile(name, hashlib.md5((folder / name).read_bytes()).hexdigest(), addresses)


def test_a_stopped_download_resumes(served, tmp_path):
    asked, address, folder = served
    (folder / "big.tar").write_bytes(BIG)
    with pytest.raises(DataError, match=rf"ended after {len(BIG) // 2} of {len(BIG)} bytes; run the same command"):
        download(remote(folder, "big.tar", f"{address}/cut/big.tar"), tmp_path)
    assert not (tmp_path / "big.tar").exists()
    download(remote(folder, "big.tar", f"{address}/big.tar"), tmp_path)
    assert (tmp_path / "big.tar").read_bytes() == BIG
    assert asked[-1] == ("/big.tar", len(BIG) // 2)
    assert not (tmp_path / ".big.tar.part").exists()
    # A complete file without its final name is not fetched again. A server without ranges sends all of a file.
    (tmp_path / ".big.tar.part").write_bytes(BIG)
    download(remote(folder, "big.tar", f"{address}/big.tar"), tmp_path)
    (tmp_path / ".big.tar.part").write_bytes(BIG[:1000])
    download(remote(folder, "big.tar", f"{address}/whole/big.tar"), tmp_path)
    assert (tmp_path / "big.tar").read_bytes() == BIG


def test_a_wrong_file_is_not_kept_and_the_next_address_is_tried(served, tmp_path):
    _, address, folder = served
    (folder / "right").write_bytes(b"right")
    wanted = remote(folder, "right", f"{address}/nowhere", "http://127.0.0.1:9/", f"{address}/right")
    download(wanted, tmp_path)
    assert (tmp_path / "right").read_bytes() == b"right"
    (folder / "right").write_bytes(b"something else")
    with pytest.raises(DataError, match=rf"right has the MD5 \w+ instead of {wanted.md5}"):
        download(wanted, tmp_path / "served")
    assert not (folder / ".right.part").exists()


def test_fashion_mnist_becomes_shards(served, tmp_path, write_idx, monkeypatch):
    _, address, folder = served
    write_idx(folder, "train", 30)
    write_idx(folder, "t10k", 10)
    files = [remote(folder, name, f"{address}/{name}") for name in NAMES]
    published = script.data_sets()["fashion_mnist"]
    real = [replace(file, shape=known.shape) for file, known in zip(files, published, strict=True)]
    with pytest.raises(DataError, match=r"web: train-images-idx3-ubyte.gz has the wrong content"):
        script.fetch(real, tmp_path, {"web": lambda wanted: script.from_web(wanted, tmp_path)})
    monkeypatch.setattr(script, "data_sets", lambda: {"fashion_mnist": files})
    out = tmp_path / "out"
    script.main(["fashion_mnist", "--out", str(out)])
    make_webdataset(["--src", str(out), "--out", str(tmp_path / "shards")])
    record = read_dataset_record(tmp_path / "shards")
    assert {name: split.samples for name, split in record.splits.items()} == {"train": 30, "val": 10}
    assert record.classes == FashionMNIST.classes


def test_when_every_way_fails_one_line_says_what_to_do(tmp_path):
    def way(wanted) -> None:
        raise DataError("no network")

    with pytest.raises(DataError) as caught:
        script.fetch(script.data_sets()["svhn"], tmp_path, {"web": way, "debian": way})
    assert "web: no network; debian: no network" in str(caught.value)
    assert f"put train_32x32.mat, test_32x32.mat into {tmp_path} yourself" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_data_set_is_told_by_a_dry_run_that_writes_nothing(tmp_path, capsys):
    assert tuple(script.data_sets()) == script.DATA_SETS
    for name, files in script.data_sets().items():
        script.main([name, "--out", str(tmp_path / "out"), "--dry-run"])
        said = capsys.readouterr().out
        assert files[0].name in said
        assert ("then debian" in said) == (name == "fashion_mnist")
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_debian_gives_the_real_files(tmp_path, capsys):
    if shutil.which("apt-get") is None or not Path("/etc/debian_version").exists():
        pytest.skip("not a Debian system")
    with pytest.raises(DataError, match="--source debian has only fashion_mnist"):
        script.main(["cifar10", "--out", str(tmp_path), "--source", "debian"])
    try:
        script.main(["fashion_mnist", "--out", str(tmp_path), "--source", "debian"])
    except DataError as error:
        pytest.skip(f"Debian's package cannot be fetched here: {error}")
    files = script.data_sets()["fashion_mnist"]
    assert all(file.is_in(tmp_path) for file in files)
    assert (tmp_path / "classes.txt").read_text().splitlines() == FashionMNIST.classes
    capsys.readouterr()
    script.main(["fashion_mnist", "--out", str(tmp_path)])
    assert "is complete and correct" in capsys.readouterr().out
    (tmp_path / NAMES[3]).write_bytes(b"damage")
    assert not files[3].is_in(tmp_path)
