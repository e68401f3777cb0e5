import io
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from karat_scale.data.decoders.decode import View
from karat_scale.data.decoders.libraries import FfcvDecoder
from karat_scale.data.prepare import make_ffcv
from karat_scale.data.shards.beton import BetonSplit, BetonWriter
from karat_scale.data.shards.shard_format import read_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.errors import DataError
from tests.data.betons import need_ffcv
from tests.data.prepare.images import WNIDS, contents, jpeg, write, write_folders, write_official
from tests.data.prepare.making import beton_samples, make_betons, make_shards, samples


@pytest.fixture(autouse=True)
def _ffcv_is_there():
    need_ffcv()


@pytest.mark.parametrize("source", ["folder", "official", "shards"])
def test_ids_keys_labels_and_bytes_are_those_of_the_shards(tmp_path, source):
    src, shards = tmp_path / "src", tmp_path / "shards"
    (write_official if source == "official" else write_folders)(src)
    make_shards(src, shards, "--shard-samples", "5")
    make_betons(shards if source == "shards" else src, tmp_path / "betons")
    for split in ("train", "val"):
        expected = ShardSplit(shards, split, 3)
        record = read_record(tmp_path / "betons" / f"{split}.beton")
        assert record.classes == list(WNIDS)
        assert record.modes == {"jpg": len(expected)}
        assert sum(record.per_class) == record.samples == len(expected)
        assert beton_samples(tmp_path / "betons", split) == samples(expected)


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

    make_betons(folder, tmp_path / "out", "--write-mode", mode)
    path, order = str(tmp_path / "out/train.beton"), OrderOption.SEQUENTIAL
    loader = Loader(path, batch_size=6, num_workers=1, os_cache=True, order=order)
    beton, decoder = BetonSplit(tmp_path / "out", "train", 3), FfcvDecoder("bicubic", 10**6)
    found = [
        (image, int(label))
        for images, labels in loader
        for image, label in zip(images.numpy(), labels[:, 0], strict=True)
    ]
    assert [label for _, label in found] == beton.labels.tolist()
    for number, (image, _) in enumerate(found):
        whole = decoder.read(beton.read(number), lambda w, h: View((0, 0, w, h), (0, 0, w, h), (w, h)))
        assert np.array_equal(image, whole)


def test_options_that_would_do_nothing_with_shards_are_refused(folder, tmp_path):
    shards, out = tmp_path / "shards", tmp_path / "out"
    make_shards(folder, shards)
    wanted = {"subset": "2", "check": "decode", "on-odd": "convert", "seed": "3", "exif": "turn", "val-count": "2"}
    for option in ((f"--{name}", value) for name, value in wanted.items()):
        with pytest.raises(DataError, match=f"^{option[0]} applies only when shards are made; remove it$"):
            make_betons(shards, out, *option)
    assert not out.exists()
    make_betons(shards, out, "--seed", "3", "--write-mode", "proportion")
    assert read_record(out / "train.beton").made["seed"] == 3


def test_a_beton_of_shards_says_nothing_of_checks_and_counts_grey_images(folder, tmp_path, capsys):
    out = tmp_path / "out"
    for number in range(2):
        write(folder / "train" / WNIDS[1] / f"grey{number}.jpg", jpeg(number, mode="L"))
    make_shards(folder, tmp_path / "shards")
    make_betons(tmp_path / "shards", out)
    make_betons(folder, tmp_path / "of_folders")
    for made in (out, tmp_path / "of_folders"):
        assert [read_record(made / f"{split}.beton").grey for split in ("train", "val")] == [2, 0]
    made = read_record(out / "train.beton").made
    assert (made["check"], made["on_odd"]) == (None, None)
    # A record that still names a check and a policy does not keep its beton from being verified.
    record = json.loads((out / "train.beton.json").read_text())
    record["made"] |= {"check": "header", "on_odd": "keep"}
    (out / "train.beton.json").write_text(json.dumps(record))
    make_betons(tmp_path / "shards", out)
    assert "train: 20 samples in train.beton are complete and correct" in capsys.readouterr().out


def make_and_die(folder, out, step):
    """Make a beton, and kill this process after the tenth image, or after step `step` of writing its files."""
    steps = []

    def then_die(do):
        def step_and_die(*arguments):
            do(*arguments)
            steps.append(do)
            if len(steps) == (10 if step == "images" else step):
                os.kill(os.getpid(), signal.SIGKILL)

        return step_and_die

    if step == "images":
        BetonWriter.add = then_die(BetonWriter.add)
    else:
        for name in ("commit_file", "write_atomically"):
            setattr(make_ffcv, name, then_die(getattr(make_ffcv, name)))
    make_betons(folder, out, "--split", "train")


@pytest.mark.parametrize("step", ["images", 1, 2, 3])
def test_a_killed_run_leaves_nothing_that_reads_as_whole_and_the_next_one_finishes(folder, tmp_path, capsys, step):
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=make_and_die, args=(folder, out, step))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if step != 3:
        with pytest.raises(DataError, match=r"train.beton(.json cannot be read| is missing)"):
            BetonSplit(out, "train", 3)
    make_betons(folder, out, "--split", "train")
    assert ("train: an earlier run did not finish; starting again" in capsys.readouterr().out) == (
        step in ("images", 1)
    )
    make_betons(folder, tmp_path / "whole", "--split", "train")
    assert contents(out) == contents(tmp_path / "whole")


# How images of all kinds are stored.
def test_raw_pixels_are_those_of_the_reference_decoder(folder, tmp_path):
    make_betons(folder, tmp_path / "raw", "--write-mode", "raw")
    make_betons(folder, tmp_path / "jpg")
    assert read_record(tmp_path / "raw/train.beton").modes == {"raw": 18}
    for raw, packed in zip(
        beton_samples(tmp_path / "raw", "train"), beton_samples(tmp_path / "jpg", "train"), strict=True
    ):
        assert raw[:2] == packed[:2]
        images = [np.asarray(Image.open(io.BytesIO(sample[2])).convert("RGB")) for sample in (raw, packed)]
        assert np.array_equal(*images)


def test_shares_thresholds_and_resizing(tmp_path):
    src = tmp_path / "src"
    for number in range(40):
        write(src / f"train/ant/{number}.jpg", jpeg(number, 20 + number, 20))
    make_betons(src, tmp_path / "share", "--write-mode", "proportion", "--compress-probability", "0.25")
    jpegs = read_record(tmp_path / "share/train.beton").modes["jpg"]
    assert 3 <= jpegs <= 18
    make_betons(src, tmp_path / "smart", "--write-mode", "smart", "--smart-threshold", str(3 * 20 * 40))
    for _, _, data in beton_samples(tmp_path / "smart", "train"):
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == ("JPEG" if image.width > 40 else "PPM")
    make_betons(src, tmp_path / "small", "--max-resolution", "30")
    sizes = [Image.open(io.BytesIO(data)).size for _, _, data in beton_samples(tmp_path / "small", "train")]
    assert max(map(max, sizes)) == 30
    assert read_record(tmp_path / "small/train.beton").modes == {"jpg": 40}


def test_images_that_ffcv_cannot_decode_keep_their_pixels(tmp_path):
    src = tmp_path / "src/train/ant"
    write(src / "cmyk.jpg", jpeg(1, mode="CMYK"))
    write(src / "grey.jpg", jpeg(2, mode="L"))
    write(src / "lossless.png", jpeg(3, kind="PNG"))
    write(src / "misnamed.jpg", jpeg(4, kind="PNG"))
    make_betons(tmp_path / "src", tmp_path / "out")
    record = read_record(tmp_path / "out/train.beton")
    assert record.modes == {"jpg": 1, "raw": 3}
    assert record.grey == 1
    assert {item.path: (item.what, item.done) for item in record.odd} == {
        "ant/cmyk.jpg": ("CMYK", "kept"),
        "ant/misnamed.jpg": ("PNG named JPEG", "kept"),
    }
    for key, _, data in beton_samples(tmp_path / "out"):
        name = {"ant/lossless": "lossless.png"}.get(key, f"{key.partition('/')[2]}.jpg")
        images = [np.asarray(Image.open(source).convert("RGB")) for source in (io.BytesIO(data), src / name)]
        assert np.array_equal(*images)


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_unusable_files_are_skipped_and_a_truncated_one_only_if_it_is_decoded(folder, tmp_path, mode, capsys):
    train = folder / "train" / WNIDS[1]
    write(train / "empty.jpg", b"")
    write(train / "text.jpg", b"no image")
    write(train / "broken.bmp", jpeg(5, kind="BMP")[:-400])
    make_betons(folder, tmp_path / "out", "--write-mode", mode)
    record = read_record(tmp_path / "out/train.beton")
    assert {Path(item.path).name: item.reason for item in record.skipped} == {
        "broken.bmp": "image file is truncated (32 bytes not processed)",
        "empty.jpg": "the file is empty",
        "text.jpg": "not an image in a supported format",
    }
    assert record.samples == 18
    assert "3 skipped, 1 odd" in capsys.readouterr().out
    make_betons(folder, tmp_path / "header", "--write-mode", mode, "--check", "header")
    record = read_record(tmp_path / "header/train.beton")
    assert [(Path(item.path).name, item.done) for item in record.odd] == [("broken.bmp", "kept")]
    assert (record.samples, len(record.skipped)) == (19, 2)
    with pytest.raises(DataError, match=r"(broken|empty|text)\.\w+: .*; (remove it|choose --on-odd)"):
        make_betons(folder, tmp_path / "stop", "--on-odd", "stop")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_image_that_does_not_fit_is_an_error_and_no_hang(folder, tmp_path, workers):
    """An image that does not fit is an error; FFCV's own writer waits for ever when a sample raises."""
    Image.new("RGB", (70_000, 1)).save(folder / "train" / WNIDS[0] / "wide.png")
    with pytest.raises(DataError, match=r"wide.png: 70000 x 1 pixels do not fit FFCV's format; use --max-resolution"):
        make_betons(folder, tmp_path / "out", "--workers", workers)
    assert not list((tmp_path / "out").iterdir())
    make_betons(folder, tmp_path / "out", "--workers", workers, "--max-resolution", "100")


def test_pixels_of_many_pages_and_those_larger_than_a_page_which_are_stored_as_jpeg(tmp_path):
    for number in range(3):
        write(tmp_path / f"src/train/ant/{number}.jpg", jpeg(number, 1500, 1400))
    write(tmp_path / "src/train/ant/large.jpg", jpeg(1, 2000, 1500))
    make_betons(tmp_path / "src", tmp_path / "out", "--write-mode", "raw")
    assert read_record(tmp_path / "out/train.beton").modes == {"jpg": 1, "raw": 3}
    found = {key: data for key, _, data in beton_samples(tmp_path / "out")}
    assert found.pop("ant/large") == (tmp_path / "src/train/ant/large.jpg").read_bytes()
    assert len(set(found.values())) == 3
    for key, data in found.items():
        image = Image.open(tmp_path / f"src/train/{key}.jpg")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))
