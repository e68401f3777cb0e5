"""How images of all kinds are stored in betons."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from karat_scale.data.shards.shard_format import read_record
from karat_scale.foundation.errors import DataError
from tests.data.betons import need_ffcv
from tests.data.prepare.images import WNIDS, jpeg, sample_file, write, write_folders
from tests.data.prepare.making import beton_samples, make_betons


@pytest.fixture(autouse=True)
def _ffcv_is_there():
    need_ffcv()


@pytest.fixture
def folder(tmp_path):
    write_folders(tmp_path / "src")
    return tmp_path / "src"


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
    for key, _, data in beton_samples(tmp_path / "out", "train", 1):
        name = {"ant/lossless": "lossless.png"}.get(key, f"{key.partition('/')[2]}.jpg")
        images = [np.asarray(Image.open(source).convert("RGB")) for source in (io.BytesIO(data), src / name)]
        assert np.array_equal(*images)


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_unusable_files_are_skipped_and_a_truncated_one_keeps_its_place_where_only_headers_are_read(
    folder, tmp_path, mode, capsys
):
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
    """FFCV's own writer waits for ever when a sample raises."""
    Image.new("RGB", (70_000, 1)).save(folder / "train" / WNIDS[0] / "wide.png")
    with pytest.raises(DataError, match=r"wide.png: 70000 x 1 pixels do not fit FFCV's format; use --max-resolution"):
        make_betons(folder, tmp_path / "out", "--workers", workers)
    assert not list((tmp_path / "out").iterdir())
    make_betons(folder, tmp_path / "out", "--workers", workers, "--max-resolution", "100")


def test_pixels_larger_than_a_page_are_stored_as_jpeg(tmp_path):
    write(tmp_path / "src/train/ant/large.jpg", jpeg(1, 2000, 1500))
    write(tmp_path / "src/train/ant/small.jpg", jpeg(2))
    make_betons(tmp_path / "src", tmp_path / "out", "--write-mode", "raw")
    assert read_record(tmp_path / "out/train.beton").modes == {"jpg": 1, "raw": 1}
    (large,) = (data for key, _, data in beton_samples(tmp_path / "out", "train", 1) if key == "ant/large")
    assert large == (tmp_path / "src/train/ant/large.jpg").read_bytes()


def test_many_pages(tmp_path):
    for number in range(5):
        write(tmp_path / f"src/train/ant/{number}.jpg", jpeg(number, 1500, 1400))
    make_betons(tmp_path / "src", tmp_path / "out", "--write-mode", "raw")
    assert read_record(tmp_path / "out/train.beton").modes == {"raw": 5}
    found = beton_samples(tmp_path / "out", "train", 1)
    assert len({data for _, _, data in found}) == 5
    for key, _, data in found:
        image = Image.open(tmp_path / f"src/train/{key}.jpg")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))


def test_odd_files_are_listed(tmp_path):
    import tarfile

    with tarfile.open(sample_file("odd_jpegs.tar")) as tar:
        for member in (member for member in tar if member.isfile()):
            write(tmp_path / "src/train/odd" / Path(member.name).name, tar.extractfile(member).read())
    make_betons(tmp_path / "src", tmp_path / "out")
    record = read_record(tmp_path / "out/train.beton")
    assert record.samples + len(record.skipped) == len(list((tmp_path / "src/train/odd").iterdir()))
    assert "truncated_jpeg.jpg" in {Path(item.path).name for item in record.odd}
