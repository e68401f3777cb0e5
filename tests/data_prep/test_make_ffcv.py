import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from make_webdataset import main as make_shards
from PIL import Image

from karat_scale.data.beton import BetonSplit, read_record
from karat_scale.data.shards import ShardSplit
from karat_scale.errors import DataError
from tests.data.betons import need_ffcv
from tests.data_prep.conftest import SCRIPTS
from tests.data_prep.images import WNIDS, contents, jpeg, sample_file, write, write_folders, write_official


@pytest.fixture(autouse=True)
def _ffcv_is_there():
    need_ffcv()


@pytest.fixture
def folder(tmp_path):
    write_folders(tmp_path / "src")
    return tmp_path / "src"


def make(src: Path, out: Path, *options: str) -> None:
    from make_ffcv import main

    main(["--src", str(src), "--out", str(out), *(() if "--workers" in options else ("--workers", "1")), *options])


def samples(out: Path, split: str, classes: int = 3) -> list[tuple[str, int, bytes]]:
    beton = BetonSplit(out, split, classes, "hash")
    return [(beton.locate(i)[0], int(beton.labels[i]), beton.read(i)) for i in range(len(beton))]


@pytest.mark.parametrize("source", ["folder", "official", "shards"])
def test_ids_keys_labels_and_bytes_are_those_of_the_shards(tmp_path, source):
    src, shards = tmp_path / "src", tmp_path / "shards"
    (write_official if source == "official" else write_folders)(src)
    make_shards(["--src", str(src), "--out", str(shards), "--shard-samples", "5", "--workers", "1"])
    make(shards if source == "shards" else src, tmp_path / "betons")
    for split in ("train", "val"):
        expected = ShardSplit(shards, split, 3)
        record = read_record(tmp_path / "betons" / f"{split}.beton")
        assert record.classes == list(WNIDS)
        assert record.modes == {"jpg": len(expected)}
        assert sum(record.per_class) == record.samples == len(expected)
        assert samples(tmp_path / "betons", split) == [
            (expected.locate(i)[0], int(expected.labels[i]), expected.read(i)) for i in range(len(expected))
        ]


def test_ffcvs_own_reader_finds_the_samples(folder, tmp_path):
    from ffcv.reader import Reader

    make(folder, tmp_path / "out")
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

    from karat_scale.data.decoders.ffcv import FfcvDecoder
    from karat_scale.data.view import crop_view

    make(folder, tmp_path / "out", "--write-mode", mode)
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
    from karat_scale.data.view import View

    return View((0, 0, width, height), (0, 0, width, height), (width, height))


def test_the_same_source_gives_the_same_bytes_whatever_the_workers(folder, tmp_path):
    make(folder, tmp_path / "one", "--workers", "1")
    make(folder, tmp_path / "two", "--workers", "3")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(contents(tmp_path / "one")) == [
        f"{split}.beton{end}" for split in ("train", "val") for end in ("", ".index.npz", ".json")
    ]


def test_running_again_verifies_and_mends(folder, tmp_path, capsys):
    out = tmp_path / "out"
    make(folder, out)
    before = contents(out)
    capsys.readouterr()
    make(folder, out)
    assert "train: 18 samples in train.beton are there and right" in capsys.readouterr().out
    damaged = bytearray(before["train.beton"])
    damaged[-1000] ^= 1
    (out / "train.beton").write_bytes(damaged)
    (out / "val.beton.index.npz").unlink()
    make(folder, out)
    said = capsys.readouterr().out
    assert "train.beton has changed since it was written: its SHA-256 differs; making it again" in said
    assert "val.beton.index.npz is missing; making it again" in said
    assert contents(out) == before


def test_other_settings_or_another_source_are_refused(folder, tmp_path):
    out = tmp_path / "out"
    make(folder, out)
    with pytest.raises(DataError, match=r"train.beton was made with seed = 0, now 3; use another --out"):
        make(folder, out, "--seed", "3")
    with pytest.raises(DataError, match="made with write_mode = jpg, now raw"):
        make(folder, out, "--write-mode", "raw")
    write(folder / "train" / WNIDS[0] / "new.jpg", jpeg(77))
    with pytest.raises(DataError, match="made with source_sha256"):
        make(folder, out)


def test_a_beton_of_unknown_origin_stays(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train.beton").write_text("precious")
    with pytest.raises(DataError, match=r"train.beton is in the way and was not finished by this script"):
        make(folder, tmp_path / "out")
    assert (tmp_path / "out/train.beton").read_text() == "precious"


def test_raw_pixels_are_those_of_the_reference_decoder(folder, tmp_path):
    make(folder, tmp_path / "raw", "--write-mode", "raw")
    make(folder, tmp_path / "jpg")
    assert read_record(tmp_path / "raw/train.beton").modes == {"raw": 18}
    for raw, packed in zip(samples(tmp_path / "raw", "train"), samples(tmp_path / "jpg", "train"), strict=True):
        assert raw[:2] == packed[:2]
        images = [np.asarray(Image.open(io.BytesIO(sample[2])).convert("RGB")) for sample in (raw, packed)]
        assert np.array_equal(*images)


def test_shares_thresholds_and_resizing(tmp_path):
    src = tmp_path / "src"
    for number in range(40):
        write(src / f"train/ant/{number}.jpg", jpeg(number, 20 + number, 20))
    make(src, tmp_path / "share", "--write-mode", "proportion", "--compress-probability", "0.25")
    jpegs = read_record(tmp_path / "share/train.beton").modes["jpg"]
    assert 3 <= jpegs <= 18
    make(src, tmp_path / "smart", "--write-mode", "smart", "--smart-threshold", str(3 * 20 * 40))
    for _, _, data in samples(tmp_path / "smart", "train"):
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == ("JPEG" if image.width > 40 else "PPM")
    make(src, tmp_path / "small", "--max-resolution", "30")
    sizes = [Image.open(io.BytesIO(data)).size for _, _, data in samples(tmp_path / "small", "train")]
    assert max(map(max, sizes)) == 30
    assert read_record(tmp_path / "small/train.beton").modes == {"jpg": 40}


def test_images_that_ffcv_cannot_decode_keep_their_pixels(tmp_path):
    src = tmp_path / "src/train/ant"
    write(src / "cmyk.jpg", jpeg(1, mode="CMYK"))
    write(src / "grey.jpg", jpeg(2, mode="L"))
    write(src / "lossless.png", jpeg(3, kind="PNG"))
    write(src / "misnamed.jpg", jpeg(4, kind="PNG"))
    make(tmp_path / "src", tmp_path / "out")
    record = read_record(tmp_path / "out/train.beton")
    assert record.modes == {"jpg": 1, "raw": 3}
    assert record.grey == 1
    assert {item.path: (item.what, item.done) for item in record.odd} == {
        "ant/cmyk.jpg": ("CMYK", "kept"),
        "ant/misnamed.jpg": ("PNG named JPEG", "kept"),
    }
    for key, _, data in samples(tmp_path / "out", "train", 1):
        name = {"ant/lossless": "lossless.png"}.get(key, f"{key.partition('/')[2]}.jpg")
        images = [np.asarray(Image.open(source).convert("RGB")) for source in (io.BytesIO(data), src / name)]
        assert np.array_equal(*images)


def broken_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()[:-400]


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_unusable_files_are_listed_and_truncated_ones_keep_their_place(folder, tmp_path, mode, capsys):
    train = folder / "train" / WNIDS[1]
    write(train / "empty.jpg", b"")
    write(train / "text.jpg", b"no image")
    write(train / "broken.jpg", broken_jpeg())
    make(folder, tmp_path / "keep", "--write-mode", mode)
    record = read_record(tmp_path / "keep/train.beton")
    assert [(Path(item.path).name, item.reason) for item in record.skipped] == [
        ("empty.jpg", "the file is empty"),
        ("text.jpg", "not an image that Pillow knows"),
    ]
    assert [(Path(item.path).name, item.done) for item in record.odd] == [("broken.jpg", "kept")]
    assert record.samples == 19
    assert "2 skipped, 1 odd" in capsys.readouterr().out
    make(folder, tmp_path / "skip", "--write-mode", mode, "--on-odd", "skip", "--check", "decode")
    assert read_record(tmp_path / "skip/train.beton").samples == 18
    with pytest.raises(DataError, match=r"(empty|text).jpg: .*; remove it"):
        make(folder, tmp_path / "stop", "--on-odd", "stop")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_image_that_does_not_fit_is_an_error_and_no_hang(folder, tmp_path, workers):
    """FFCV's own writer waits for ever when a sample raises."""
    Image.new("RGB", (70_000, 1)).save(folder / "train" / WNIDS[0] / "wide.png")
    with pytest.raises(DataError, match=r"wide.png: 70000 x 1 pixels do not fit FFCV's format; give --max-resolution"):
        make(folder, tmp_path / "out", "--workers", workers)
    assert not list((tmp_path / "out").iterdir())
    make(folder, tmp_path / "out", "--workers", workers, "--max-resolution", "100")


def test_pixels_larger_than_a_page_are_stored_as_jpeg(tmp_path):
    write(tmp_path / "src/train/ant/large.jpg", jpeg(1, 2000, 1500))
    write(tmp_path / "src/train/ant/small.jpg", jpeg(2))
    make(tmp_path / "src", tmp_path / "out", "--write-mode", "raw")
    assert read_record(tmp_path / "out/train.beton").modes == {"jpg": 1, "raw": 1}
    (large,) = (data for key, _, data in samples(tmp_path / "out", "train", 1) if key == "ant/large")
    assert large == (tmp_path / "src/train/ant/large.jpg").read_bytes()


def test_many_pages(tmp_path):
    for number in range(5):
        write(tmp_path / f"src/train/ant/{number}.jpg", jpeg(number, 1500, 1400))
    make(tmp_path / "src", tmp_path / "out", "--write-mode", "raw")
    assert read_record(tmp_path / "out/train.beton").modes == {"raw": 5}
    found = samples(tmp_path / "out", "train", 1)
    assert len({data for _, _, data in found}) == 5
    for key, _, data in found:
        image = Image.open(tmp_path / f"src/train/{key}.jpg")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))


def test_odd_files_are_listed(tmp_path):
    import tarfile

    with tarfile.open(sample_file("odd_jpegs.tar")) as tar:
        for member in (member for member in tar if member.isfile()):
            write(tmp_path / "src/train/odd" / Path(member.name).name, tar.extractfile(member).read())
    make(tmp_path / "src", tmp_path / "out")
    record = read_record(tmp_path / "out/train.beton")
    assert record.samples + len(record.skipped) == len(list((tmp_path / "src/train/odd").iterdir()))
    assert "truncated_jpeg.jpg" in {Path(item.path).name for item in record.odd}


def test_a_dry_run_writes_nothing(folder, tmp_path, capsys):
    make(folder, tmp_path / "out", "--dry-run")
    assert "train: 18 images of 3 classes" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--write-mode", "smart"), "smart needs --smart-threshold BYTES"),
        (("--smart-threshold", "9"), "--smart-threshold needs --write-mode smart"),
        (("--compress-probability", "0.5"), "--compress-probability needs --write-mode proportion"),
        (("--write-mode", "proportion", "--compress-probability", "2"), "not between 0 and 1"),
        (("--quality", "101"), "more than 100"),
        (("--split", "../x"), "is no name"),
    ],
)
def test_options_that_do_not_go_together(folder, tmp_path, options, match):
    with pytest.raises(DataError, match=match):
        make(folder, tmp_path / "out", *options)


def test_options_that_do_not_go_with_shards(folder, tmp_path):
    make_shards(["--src", str(folder), "--out", str(tmp_path / "shards"), "--workers", "1"])
    with pytest.raises(DataError, match="--subset does not go with shards"):
        make(tmp_path / "shards", tmp_path / "out", "--subset", "2")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import beton_job
from make_ffcv import main

take, done = beton_job._take, []
def die_at_ten(*arguments):
    take(*arguments)
    done.append(1)
    if len(done) == 10:
        os.kill(os.getpid(), signal.SIGKILL)
beton_job._take = die_at_ten
main(["--src", sys.argv[2], "--out", sys.argv[3], "--split", "train", "--workers", "1"])
"""


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_reads_as_whole(folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(SCRIPTS), str(folder), str(out)]
    assert subprocess.run(command, cwd=SCRIPTS.parent, capture_output=True, check=False).returncode == -9
    assert [path.name for path in out.iterdir()] == [".train.beton.unfinished"]
    with pytest.raises(DataError, match=r"train.beton.json cannot be read"):
        BetonSplit(out, "train", 3)
    make(folder, out)
    assert "train: an earlier run did not finish; beginning anew" in capsys.readouterr().out
    assert len(samples(out, "train")) == 18
    assert not (out / ".train.beton.unfinished").exists()


@pytest.mark.slow
def test_the_script_ends_as_promised(folder, tmp_path):
    def script(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPTS / "make_ffcv.py"), *options, "--out", str(tmp_path / "out")]
        environment = {"PYTHONPATH": str(SCRIPTS.parent), "PATH": ""}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = script("--src", str(folder), "--workers", "2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "train: writing: 18 of 18 images" in done.stdout
    failed = script("--src", "nowhere")
    assert failed.returncode == 2
    assert failed.stderr == "error: --src nowhere is not a directory or a tar\n"
