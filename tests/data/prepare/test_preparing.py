import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from karat_scale.data.decoders.decode import decode_rgb
from karat_scale.data.prepare.images import (
    OddImageSkippedError,
    Preparation,
    choose_encoder,
    inspect_image,
    resized_jpeg,
    scan_jpeg,
    without_exif,
)
from karat_scale.data.prepare.sources.base import UnreadableSampleError
from karat_scale.foundation.errors import DataError
from tests.data.conftest import encode, exif
from tests.data.prepare.images import jpeg, sample_file, write
from tests.data.prepare.making import make_shards, shard_samples
from tests.data.tars import tar_files, write_tar

ROTATED = jpeg(1, exif=exif(6))
CORRUPT = jpeg(1, exif=b"Exif\0\0" + b"\xff" * 40)
CMYK = jpeg(2, 192, 160, mode="CMYK")
PNG = jpeg(3, 192, 160, kind="PNG")
TRUNCATED = jpeg(4, 64, 64, quality=95)[:-60]
ODD = {"EXIF orientation 6": ROTATED, "corrupt EXIF": CORRUPT, "CMYK": CMYK, "PNG named JPEG": PNG}


AUTO = Preparation(resize=16, encoder=choose_encoder("auto"))


def pixels(data):
    return np.asarray(decode_rgb(data))


@pytest.mark.parametrize("what", ODD)
def test_policies_and_conversion_to_ordinary_jpegs_of_the_same_pixels(what):
    data = ODD[what]
    kept = Preparation(on_odd="keep", exif="keep").prepare(data, "a.JPEG")
    assert (kept.data, kept.done) == (data, "kept")
    assert kept.odd.startswith(what)
    with pytest.raises(OddImageSkippedError, match=what):
        Preparation(on_odd="skip", exif="keep").prepare(data, "a.JPEG")
    with pytest.raises(DataError, match=f"a.JPEG: {what}.*; choose --on-odd convert, keep or skip"):
        Preparation(on_odd="stop", exif="keep").prepare(data, "a.JPEG")
    done = Preparation(on_odd="convert", exif="keep").prepare(data, "a.JPEG")
    assert (done.done, done.extension) == ("converted", "jpg")
    again = Preparation(on_odd="stop", check="decode").prepare(done.data, "a.JPEG")
    assert again.data == done.data
    difference = np.abs(pixels(done.data).astype(int) - pixels(data)).mean()
    assert difference == 0 if "EXIF" in what else difference < 3


def test_a_picture_with_an_orientation_is_stored_upright():
    """Every policy stores the picture upright; tests/data/decoders/test_decode.py checks its pixels."""
    data = jpeg(3, 64, 48, quality=95, subsampling=1, exif=exif(6))
    for policy in ("convert", "keep", "skip", "stop"):
        done = Preparation(on_odd=policy).prepare(data, "a.jpg")
        assert (done.done, done.extension) == ("turned", "jpg")
        assert "as its EXIF orientation 6 asks" in done.odd
        with Image.open(io.BytesIO(done.data)) as stored:
            assert (JpegImagePlugin.get_sampling(stored), len(stored.getexif())) == (1, 0)
        assert Preparation(on_odd="stop").prepare(done.data, "a.jpg").data == done.data


def test_what_is_not_turned_keeps_its_bytes_and_a_grey_picture_stays_grey():
    kept = Preparation(exif="keep").prepare(data := jpeg(3, 64, 48, kind="PNG", exif=exif(6)), "a.png")
    assert kept.data == data
    assert kept.odd == "EXIF orientation 6: viewers show it turned by 90 degrees clockwise, training does not"
    grey = Preparation().prepare(jpeg(3, mode="L", exif=exif(8)), "a.jpg")
    assert grey.grey
    assert Image.open(io.BytesIO(grey.data)).mode == "L"
    for orientation in (0, 1, 9):
        data = jpeg(3, exif=exif(orientation))
        done = Preparation(on_odd="convert").prepare(data, "a.jpg")
        assert (done.data, done.odd) == (data, "")


def test_a_turned_picture_is_also_shrunk_and_a_broken_one_is_left_out():
    data = jpeg(3, 64, 48, quality=95, exif=exif(6))
    for encoder in ("pillow", choose_encoder("auto")):
        done = Preparation(resize=24, encoder=encoder).prepare(data, "a.jpg")
        assert (decode_rgb(done.data).size, done.done) == ((24, 32), "turned")
    kept = Preparation(resize=24).prepare(jpeg(3, 64, 48), "a.jpg")
    assert kept.odd == ""
    broken = jpeg(3, 64, 64, quality=95, exif=exif(6))[:-60]
    with pytest.raises(OddImageSkippedError, match=r"EXIF orientation 6.*truncated"):
        Preparation().prepare(broken, "a.jpg")


def test_the_choice_is_said_and_recorded_and_imagenet_keeps_its_bytes(tmp_path, capsys):
    photo = jpeg(3, 64, 48, exif=exif(6))
    for name in ("cat", "n01440764"):
        write(tmp_path / name / "src" / name / "9.jpg", photo)
    record = make_shards(tmp_path / "cat/src", tmp_path / "cat/out")
    said = capsys.readouterr().out
    assert "turned cat/9.jpg: turned by 90 degrees clockwise, as its EXIF orientation 6 asks" in said
    assert "train: stored upright, as viewers show them by their EXIF orientation: 1 of 1 pictures" in said
    assert "--exif keep" in said
    assert record.splits["train"].made["exif"] == "turn"
    record = make_shards(tmp_path / "n01440764/src", tmp_path / "n01440764/out")
    assert "1 of 1 pictures; --exif turn stores them upright" in capsys.readouterr().out
    assert record.splits["train"].made["exif"] == "keep"
    assert [data for _, _, data in shard_samples(tmp_path / "n01440764/out")] == [photo]
    with pytest.raises(DataError, match="made with exif = turn, now keep"):
        make_shards(tmp_path / "cat/src", tmp_path / "cat/out", "--exif", "keep")


def test_what_cannot_be_decoded_is_left_out_or_stops():
    """Training would stop at such an image, perhaps hours later."""
    for preparation in (Preparation(), Preparation(on_odd="convert"), Preparation(resize=16), AUTO):
        with pytest.raises(OddImageSkippedError, match="truncated"):
            preparation.prepare(TRUNCATED, "a.JPEG")
        for data in (b"", b"text", b"\xff\xd8\xff", jpeg(1)[:40]):
            with pytest.raises(UnreadableSampleError):
                preparation.prepare(data, "a.JPEG")
    with pytest.raises(DataError, match="truncated"):
        Preparation(on_odd="stop").prepare(TRUNCATED, "a.JPEG")


def test_an_image_that_no_jpeg_can_hold_is_left_out():
    """Before the fix, Pillow's error ended the split, with the name of the shard."""
    buffer = io.BytesIO()
    Image.new("L", (20, 65_501)).save(buffer, "PNG")
    with pytest.raises(OddImageSkippedError, match="no JPEG can hold 20 x 65501 pixels"):
        Preparation(resize=20).prepare(buffer.getvalue(), "a.png")


def test_a_file_that_is_no_image_stops(tmp_path):
    write(tmp_path / "src/ant/a.jpg", b"text")
    with pytest.raises(DataError, match=r"ant/a.jpg: not an image .*; remove it, or choose another --on-odd than stop"):
        make_shards(tmp_path / "src", tmp_path / "out", "--on-odd", "stop")


def test_all_images_of_a_small_source_are_decoded_and_of_a_large_one_the_headers(tmp_path, monkeypatch, capsys):
    """The header of a truncated BMP does not show the damage, so only decoding finds it."""
    write(tmp_path / "src/ant/a.jpg", jpeg(1))
    write(tmp_path / "src/ant/b.bmp", jpeg(2, kind="BMP")[:-400])
    record = make_shards(tmp_path / "src", tmp_path / "small").splits["train"]
    assert "skipped ant/b.bmp: image file is truncated" in capsys.readouterr().out
    assert (record.samples, record.made["check"]) == (1, "decode")
    monkeypatch.setattr("karat_scale.data.prepare.making.DECODED_BELOW", 2)
    record = make_shards(tmp_path / "src", tmp_path / "large").splits["train"]
    assert (record.samples, record.made["check"]) == (2, "header")


def test_the_check_of_a_split_does_not_depend_on_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("karat_scale.data.prepare.making.DECODED_BELOW", 2)
    for split, count in (("train", 3), ("val", 1)):
        for number in range(count):
            write(tmp_path / f"src/{split}/ant/{number}.jpg", jpeg(number))
    make_shards(tmp_path / "src", tmp_path / "out", "--split", "val")
    record = make_shards(tmp_path / "src", tmp_path / "out")
    assert {name: split.made["check"] for name, split in record.splits.items()} == {"val": "decode", "train": "header"}
    monkeypatch.setattr("karat_scale.data.prepare.making.DECODED_BELOW", 9)  # as in another version
    make_shards(tmp_path / "src", tmp_path / "out")
    assert "train: 3 samples in 1 shard are complete and correct" in capsys.readouterr().out
    with pytest.raises(DataError, match="holds split train made with check = header, now decode"):
        make_shards(tmp_path / "src", tmp_path / "out", "--check", "decode")


def test_a_png_keeps_an_exif_block_that_cannot_be_read_or_removed():
    """Pillow decodes such a PNG, so training and prediction read it."""
    corrupt = jpeg(1, kind="PNG", exif=b"garbage-" * 4)
    kept = Preparation().prepare(corrupt, "a.png")
    assert (kept.data, kept.odd, kept.done) == (corrupt, "corrupt EXIF", "kept")
    turned = jpeg(1, kind="PNG", exif=exif(6))
    assert Preparation(on_odd="convert", exif="keep").prepare(turned, "a.png").done == "kept"


def test_ordinary_images_pass_every_policy():
    for data, name in ((jpeg(1), "a.JPEG"), (jpeg(1, kind="PNG"), "a.png"), (jpeg(1, progressive=True), "a.jpg")):
        for policy in ("convert", "keep", "skip", "stop"):
            done = Preparation("decode", policy).prepare(data, name)
            assert (done.data, done.odd) == (data, "")
    assert Preparation().prepare(jpeg(1, mode="L"), "a.jpg").grey


def test_damage_behind_the_header_is_found_by_decoding():
    data = bytearray(jpeg(7))
    at = data.index(b"\xff\xc4")  # a Huffman table with more codes than there can be
    data[at + 5 : at + 21] = b"\xff" * 16
    assert not Preparation("header").prepare(bytes(data), "a.JPEG").odd
    with pytest.raises(OddImageSkippedError, match="broken data stream"):
        Preparation("decode").prepare(bytes(data), "a.JPEG")


def test_scan_agrees_with_pillow_and_a_decompression_bomb_is_refused():
    data = bytearray(jpeg(1))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(UnreadableSampleError, match=r"65535 x 65535 pixels are over the limit"):
        inspect_image(bytes(data), "a.jpg")
    for width, height, mode in ((24, 20, "RGB"), (300, 7, "L"), (8, 9, "CMYK")):
        header = scan_jpeg(jpeg(1, width, height, mode=mode))
        assert (header.width, header.height, header.components) == (width, height, len(mode))
    assert without_exif(jpeg(1)) == jpeg(1)
    assert scan_jpeg(jpeg(1, kind="PNG")) is None


def test_an_image_at_which_training_stops_is_told_and_kept():
    """Phones take such images, but training reads them only with a higher data.max_pixels."""
    data = encode(Image.new("1", (9001, 9000)), "PNG")
    for policy in ("keep", "convert"):
        made = Preparation(on_odd=policy).prepare(data, "a.png")
        assert (made.data, made.done) == (data, "kept")
        assert made.odd == "81,009,000 pixels, at which training stops unless data.max_pixels is higher"
    with pytest.raises(OddImageSkippedError, match="81,009,000 pixels"):
        Preparation(on_odd="skip").prepare(data, "a.png")


@pytest.mark.parametrize("encoder", ["auto", "pillow"])
@pytest.mark.parametrize(("size", "expected"), [((400, 300), (85, 64)), ((64, 64), (64, 64)), ((30, 50), (30, 50))])
def test_resizing_bounds_the_short_side(size, expected, encoder):
    data = jpeg(5, *size, quality=95)
    done = Preparation(resize=64, quality=90, encoder=choose_encoder(encoder)).prepare(data, "a.jpg")
    assert (done.extension, done.odd) == ("jpg", "")
    result = decode_rgb(done.data)
    assert result.size == expected
    exact = decode_rgb(data).resize(expected, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(result).astype(int) - np.asarray(exact)).mean() < 3
    if encoder == "pillow" and size == (400, 300):
        assert len(resized_jpeg(data, 100, 50)) < len(resized_jpeg(data, 100, 95))


EXPECTED_ODD = {
    "hopper_bad_exif.jpg": "corrupt EXIF",
    "invalid-exif.jpg": "corrupt EXIF",
    "junk_jpeg_header.jpg": "junk in the header",
    "pil_sample_cmyk.jpg": "CMYK",
    "png_disguised.JPEG": "PNG named JPEG",
    "truncated_app14.jpg": "junk in the header",
    "truncated_jpeg.jpg": "truncated",
    "ultrahdr.jpg": "truncated",
    **{f"hopper_orientation_{number}.jpg": f"EXIF orientation {number}" for number in range(2, 9)},
}


@pytest.mark.parametrize("policy", ["convert", *(pytest.param(p, marks=pytest.mark.slow) for p in ("keep", "skip"))])
def test_the_odd_collection(tmp_path, policy):
    write_tar(tmp_path / "odd.tar", tar_files(sample_file("odd_jpegs.tar")).items())
    made = make_shards(tmp_path / "odd.tar", tmp_path / "out", "--on-odd", policy, "--exif", "keep")
    record = made.splits["train"]
    found = {item.path.removeprefix("odd/"): item for item in record.odd}
    assert found.keys() == EXPECTED_ODD.keys()
    assert all(EXPECTED_ODD[name] in item.what for name, item in found.items())
    hopeless = {"truncated_jpeg.jpg", "ultrahdr.jpg"}
    done = {"keep": "kept", "convert": "converted", "skip": "skipped"}[policy]
    for name, item in found.items():
        assert item.done == ("skipped" if name in hopeless else done)
    left = {"keep": 19, "convert": 19, "skip": 21 - len(EXPECTED_ODD)}[policy]
    assert (record.samples, len(record.skipped), record.grey) == (left, 21 - left, 3 if policy != "skip" else 2)
    assert {decode_rgb(data).mode for _, _, data in shard_samples(tmp_path / "out")} == {"RGB"}
