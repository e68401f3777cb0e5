import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from karat_scale.data.shards.beton import BetonSplit
from karat_scale.data.shards.shard_format import read_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.errors import DataError
from tests.data.betons import need_ffcv
from tests.data.prepare.conftest import SCRIPTS
from tests.data.prepare.images import WNIDS, contents, jpeg, write, write_folders, write_official
from tests.data.prepare.making import beton_samples, make_betons, make_shards


@pytest.fixture(autouse=True)
def _ffcv_is_there():
    need_ffcv()


@pytest.fixture
def folder(tmp_path):
    write_folders(tmp_path / "src")
    return tmp_path / "src"


@pytest.mark.parametrize("source", ["folder", "official", "shards"])
def test_ids_keys_labels_and_bytes_are_those_of_the_shards(tmp_path, source):
    src, shards = tmp_path / "src", tmp_path / "shards"
    (write_official if source == "official" else write_folders)(src)
    make_shards(src, shards, "--shard-samples", "5", "--workers", "1")
    make_betons(shards if source == "shards" else src, tmp_path / "betons")
    for split in ("train", "val"):
        expected = ShardSplit(shards, split, 3)
        record = read_record(tmp_path / "betons" / f"{split}.beton")
        assert record.classes == list(WNIDS)
        assert record.modes == {"jpg": len(expected)}
        assert sum(record.per_class) == record.samples == len(expected)
        assert beton_samples(tmp_path / "betons", split) == [
            (expected.locate(i)[0], int(expected.labels[i]), expected.read(i)) for i in range(len(expected))
        ]


def test_ffcvs_own_reader_finds_the_samples(folder, tmp_path):
    from ffcv.reader import Reader

    make_betons(folder, tmp_path / "out")
    reader, beton = Reader(str(tmp_path / "out/train.beton")), BetonSplit(tmp_path / "out", "train", 3)
    assert (reader.num_samples, reader.field_names) == (18, ["image", "label"])
    image, label = (reader.metadata[name] for name in reader.metadata.dtype.names)
    assert label.tolist() == beton.labels.tolist()
    assert set(image["width"]) == {24}
    data = (tmp_path / "out/train.beton").read_bytes()
    for row in reader.alloc_table:
        assert data[row["ptr"] :][: row["size"]] == beton.read(int(row["sample_id"]))
        assert row["ptr"] == image["data_ptr"][row["sample_id"]]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_ffcvs_own_loader_gives_the_same_pixels(folder, tmp_path, mode):
    from ffcv.loader import Loader, OrderOption

    from karat_scale.data.decoders.decode import crop_view
    from karat_scale.data.decoders.ffcv import FfcvDecoder

    make_betons(folder, tmp_path / "out", "--write-mode", mode)
    loader = Loader(
        str(tmp_path / "out/train.beton"), batch_size=6, num_workers=1, os_cache=True, order=OrderOption.SEQUENTIAL
    )
    beton, decoder = BetonSplit(tmp_path / "out", "train", 3), FfcvDecoder("bicubic", 10**6)
    found = [
        (image, int(label))
        for images, labels in loader
        for image, label in zip(images.numpy(), labels[:, 0], strict=True)
    ]
    assert [label for _, label in found] == beton.labels.tolist()
    for number, (image, _) in enumerate(found):
        whole = decoder.read(beton.read(number), lambda w, h: crop_view((0, 0, w, h), w) if w == h else _whole(w, h))
        assert np.array_equal(image, whole)


def _whole(width: int, height: int):
    from karat_scale.data.decoders.decode import View

    return View((0, 0, width, height), (0, 0, width, height), (width, height))


def test_options_that_would_do_nothing_with_shards_are_refused(folder, tmp_path):
    shards, out = tmp_path / "shards", tmp_path / "out"
    make_shards(folder, shards, "--workers", "1")
    wanted = {"subset": "2", "check": "decode", "on-odd": "convert", "seed": "3", "exif": "turn", "val-count": "2"}
    for option in ((f"--{name}", value) for name, value in wanted.items()):
        with pytest.raises(DataError, match=f"^{option[0]} applies only when shards are made; remove it$"):
            make_betons(shards, out, *option)
    assert not out.exists()
    make_betons(shards, out, "--seed", "3", "--write-mode", "proportion")
    assert read_record(out / "train.beton").made["seed"] == 3


def test_a_beton_of_shards_does_not_say_that_its_images_were_checked(folder, tmp_path, capsys):
    out = tmp_path / "out"
    make_shards(folder, tmp_path / "shards", "--workers", "1")
    make_betons(tmp_path / "shards", out)
    made = read_record(out / "train.beton").made
    assert (made["check"], made["on_odd"]) == (None, None)
    # Records that still say so are no hindrance to checking what they stand for.
    record = json.loads((out / "train.beton.json").read_text())
    record["made"] |= {"check": "header", "on_odd": "keep"}
    (out / "train.beton.json").write_text(json.dumps(record))
    make_betons(tmp_path / "shards", out)
    assert "train: 18 samples in train.beton are complete and correct" in capsys.readouterr().out


def test_a_beton_of_shards_has_as_many_grey_images(folder, tmp_path):
    for number in range(2):
        write(folder / "train" / WNIDS[1] / f"grey{number}.jpg", jpeg(number, mode="L"))
    make_shards(folder, tmp_path / "shards", "--workers", "1")
    make_betons(tmp_path / "shards", tmp_path / "of_shards")
    make_betons(folder, tmp_path / "of_folders")
    for out in ("of_shards", "of_folders"):
        assert [read_record(tmp_path / out / f"{split}.beton").grey for split in ("train", "val")] == [2, 0]


KILLED = """
import os, signal, sys
from karat_scale.data.prepare.make_ffcv import main
from karat_scale.data.shards.beton import BetonWriter

add, done = BetonWriter.add, []
def die_at_ten(*arguments):
    add(*arguments)
    done.append(1)
    if len(done) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
BetonWriter.add = die_at_ten
main(["--src", sys.argv[1], "--out", sys.argv[2], "--split", "train", "--workers", "1"])
"""


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_reads_as_whole(folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(folder), str(out)]
    assert subprocess.run(command, cwd=SCRIPTS.parent, capture_output=True, check=False).returncode == -9
    assert [path.name for path in out.iterdir()] == [".train.beton.unfinished"]
    with pytest.raises(DataError, match=r"train.beton.json cannot be read"):
        BetonSplit(out, "train", 3)
    make_betons(folder, out)
    assert "train: an earlier run did not finish; starting again" in capsys.readouterr().out
    assert len(beton_samples(out, "train")) == 18
    assert not (out / ".train.beton.unfinished").exists()


def make_and_die(folder, out, step):
    """Make a beton, and be killed after this one of the steps that give it its files."""
    from karat_scale.data.prepare import make_ffcv

    steps = []

    def then_die(do):
        def step_and_die(*arguments):
            do(*arguments)
            steps.append(do)
            if len(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        return step_and_die

    for name in ("commit_file", "write_atomically"):
        setattr(make_ffcv, name, then_die(getattr(make_ffcv, name)))
    make_betons(folder, out, "--split", "train")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_next_run_finishes_a_beton_whose_run_was_killed_between_its_files(folder, tmp_path, step):
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=make_and_die, args=(folder, out, step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    make_betons(folder, out, "--split", "train")
    make_betons(folder, tmp_path / "whole", "--split", "train")
    assert contents(out) == contents(tmp_path / "whole")
