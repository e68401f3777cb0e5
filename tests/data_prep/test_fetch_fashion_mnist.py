import hashlib
import http.server
import shutil
import threading
from pathlib import Path

import fetch_fashion_mnist as script
import pytest
from make_webdataset import main as make_webdataset
from torchvision.datasets import FashionMNIST

from karat_scale.data.shard_format import read_dataset_record
from karat_scale.errors import DataError

NAMES = [name for name, _ in FashionMNIST.resources]


@pytest.fixture
def mirror(tmp_path, write_idx):
    """A web server on this machine with small files of the right names: its address, its folder, their MD5s."""
    folder = tmp_path / "served"
    folder.mkdir()
    write_idx(folder, "train", 30)
    write_idx(folder, "t10k", 10)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    resources = [(name, hashlib.md5((folder / name).read_bytes()).hexdigest()) for name in NAMES]
    yield f"http://127.0.0.1:{server.server_port}/", folder, resources
    server.shutdown()
    server.server_close()


def test_files_come_from_the_first_mirror_that_answers_and_become_shards(mirror, tmp_path):
    address, folder, resources = mirror
    out = tmp_path / "out"
    out.mkdir()
    script.from_mirror(out, ["http://127.0.0.1:9/", address], resources)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    make_webdataset(["--src", str(out), "--out", str(tmp_path / "shards")])
    splits = read_dataset_record(tmp_path / "shards").splits
    assert {name: split.samples for name, split in splits.items()} == {"train": 30, "val": 10}


def test_a_wrong_file_is_not_kept(mirror, tmp_path):
    address, folder, resources = mirror
    (folder / NAMES[0]).write_bytes(b"something else")
    with pytest.raises(DataError, match=rf"{NAMES[0]} came with a wrong MD5"):
        script.from_mirror(tmp_path, [address], resources)
    assert not (tmp_path / NAMES[0]).exists()


def test_when_every_way_fails_one_line_says_what_to_do(tmp_path):
    def way() -> None:
        raise DataError("no network")

    with pytest.raises(DataError) as caught:
        script.fetch(tmp_path, {"torchvision": way, "debian": way}, NAMES)
    assert "torchvision: no network; debian: no network" in str(caught.value)
    assert f"into {tmp_path} yourself and run this again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_another_size_are_not_fashion_mnist(mirror, tmp_path):
    address, _, resources = mirror
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz is not what it should be"):
        script.fetch(tmp_path, {"torchvision": lambda: script.from_mirror(tmp_path, [address], resources)}, NAMES)


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    script.main(["--out", str(tmp_path / "out"), "--dry-run"])
    assert "trying torchvision, then debian" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_debian_gives_the_real_files(tmp_path, capsys):
    if shutil.which("apt-get") is None or not Path("/etc/debian_version").exists():
        pytest.skip("not a Debian system")
    try:
        script.main(["--out", str(tmp_path), "--source", "debian"])
    except DataError as error:
        pytest.skip(f"Debian's package cannot be fetched here: {error}")
    assert all(script.is_right(tmp_path / name) for name in NAMES)
    assert (tmp_path / "classes.txt").read_text().splitlines() == FashionMNIST.classes
    capsys.readouterr()
    script.main(["--out", str(tmp_path)])
    assert "is there and right" in capsys.readouterr().out
    (tmp_path / NAMES[3]).write_bytes(b"damage")
    assert not script.is_right(tmp_path / NAMES[3])
