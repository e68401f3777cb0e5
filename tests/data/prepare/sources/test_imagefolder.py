"""Which folders of an ImageFolder are splits, and the order of its images."""

import errno
import os
import shutil
import tarfile
import threading

import pytest

from karat_scale.data.prepare.sources import imagefolder
from karat_scale.data.prepare.sources.base import UnreadableSampleError
from karat_scale.data.prepare.sources.imagefolder import ImageFolderSource
from karat_scale.data.shards.shards import FolderSplit
from karat_scale.foundation.errors import DataError
from tests.data.prepare.images import WNIDS, contents, jpeg, write, write_folders
from tests.data.prepare.making import make_shards, shard_samples
from tests.data.tars import tar_of


@pytest.fixture
def kaggle(tmp_path):
    """Return ImageNet in Kaggle's folders: train/<class>/*.JPEG, val/*.JPEG, test/*.JPEG."""
    write_folders(tmp_path / "kag", per_class=1)
    for split in ("val", "test"):
        shutil.rmtree(tmp_path / "kag" / split, ignore_errors=True)
        write(tmp_path / "kag" / split / "ILSVRC2012_00000001.JPEG", jpeg(1))
    return tmp_path / "kag"


def test_a_split_without_class_folders_is_not_left_out_in_silence_unless_another_is_wanted(kaggle, tmp_path, capsys):
    message = r"kag/val has images but no class folders; sort them into classes, or make only --split train$"
    for options in ((), ("--split", "val")):
        with pytest.raises(DataError, match=message):
            make_shards(kaggle, tmp_path / "out", *options)
        assert not (tmp_path / "out").exists()
    assert list(make_shards(kaggle, tmp_path / "train", "--split", "train").splits) == ["train"]
    with tarfile.open(tmp_path / "kag.tar", "w") as tar:
        tar.add(kaggle, ".", filter=lambda info: None if "test" in info.name else info)
    with pytest.raises(DataError, match=r"kag\.tar: \./val/ILSVRC2012_00000001\.JPEG is in no class folder of a split"):
        make_shards(tmp_path / "kag.tar", tmp_path / "out")
    shutil.rmtree(kaggle / "val")
    write(kaggle / "val" / WNIDS[0] / "0.JPEG", jpeg(2))
    # test/ stays flat, since nobody has its labels
    assert list(make_shards(kaggle, tmp_path / "all").splits) == ["train", "val"]
    assert "the split test is left out; its images are in no class folders" in capsys.readouterr().out
    for number, name in enumerate(("bus", "train")):  # a class may have the name of a split
        write(tmp_path / "src" / name / "0.jpg", jpeg(number))
    assert make_shards(tmp_path / "src", tmp_path / "classes").classes == ["bus", "train"]


@pytest.mark.parametrize("packed", [False, True])
def test_a_split_that_is_left_out_adds_no_class_and_is_named(tmp_path, capsys, packed):
    src, out = tmp_path / "src", tmp_path / "out"
    write_folders(src, per_class=1)
    write(src / "test" / "all" / "0.JPEG", jpeg(7))  # as torchvision reads images without labels
    src = tar_of(src) if packed else src
    record = make_shards(src, out)
    assert f"{src}: the split test is left out; --split test converts it" in capsys.readouterr().out
    assert (record.classes, list(record.splits)) == ([*WNIDS], ["train", "val"])
    assert record.splits["train"].made["exif"] == "keep"
    with pytest.raises(DataError, match="has the class 'all', which the shards in --out do not"):
        make_shards(src, out, "--split", "test")
    alone = make_shards(src, tmp_path / "alone", "--split", "train")  # as a job array does
    assert (alone.splits["train"], alone.classes) == (record.splits["train"], record.classes)
    assert "left out" not in capsys.readouterr().out
    assert make_shards(src, tmp_path / "test", "--split", "test").splits["test"].samples == 1


def test_names_that_are_no_utf8_have_the_same_place_in_folder_tar_and_shards(tmp_path):
    src = tmp_path / "src"
    names = (b"\xff\xfe.jpg", "\uff41.jpg".encode(), "😀.jpg".encode(), b"a.jpg", b"sub/\xff.jpg")
    for number, name in enumerate(names):
        write(src / "train" / "ant" / os.fsdecode(name), jpeg(number))
    folder = FolderSplit(src, "train", 1)
    for source in (src, tar_of(src)):
        make_shards(source, tmp_path / f"{source.name}-shards")
        found = [data for _, _, data in shard_samples(tmp_path / f"{source.name}-shards")]
        assert found == [folder.read(i) for i in range(5)]


def test_a_name_that_is_no_utf8_is_reported_as_text(tmp_path):
    src, out = tmp_path / "src", tmp_path / "out"
    write(src / "ant" / "0.jpg", jpeg(0))
    write(src / "ant" / os.fsdecode(b"\xff.txt"), b"no image")
    write(src / "ant" / os.fsdecode(b"\xfe.jpg"), b"no image either")
    skipped = make_shards(src, out).splits["train"].skipped
    assert sorted(record.path for record in skipped) == [r"ant/\xfe.jpg", r"ant/\xff.txt"]

    write(src / os.fsdecode(b"\xfd") / "0.jpg", jpeg(1))
    for source in (src, tar_of(src, "train")):
        with pytest.raises(DataError, match=r"the name of class \\xfd is not UTF-8; rename it"):
            make_shards(source, tmp_path / "other")


@pytest.fixture
def ants(tmp_path):
    for number in range(4):
        write(tmp_path / "src" / "ant" / f"{number}.jpg", jpeg(number))
    return tmp_path / "src"


def test_a_file_that_cannot_be_read_is_listed_or_stops_the_run(ants, tmp_path):
    (ants / "ant/gone.jpg").symlink_to("nowhere")
    (ants / "ant/loop.jpg").symlink_to("loop.jpg")
    record = make_shards(ants, tmp_path / "out").splits["train"]
    assert record.samples == 4
    assert [(item.path, item.reason) for item in record.skipped] == [
        ("ant/gone.jpg", "No such file or directory"),
        ("ant/loop.jpg", "Too many levels of symbolic links"),
    ]
    (ants / "ant/loop.jpg").unlink()
    message = r"ant/gone\.jpg: No such file or directory; remove it, or choose another --on-odd than stop"
    with pytest.raises(DataError, match=message):
        make_shards(ants, tmp_path / "stop", "--on-odd", "stop")
    assert not (tmp_path / "stop" / "dataset.json").exists()


@pytest.mark.parametrize(
    ("packed", "number"), [(False, errno.EIO), (False, errno.EMFILE), (True, errno.ESTALE), (True, errno.EACCES)]
)
def test_an_error_of_the_file_system_leaves_no_image_out(ants, tmp_path, monkeypatch, packed, number):
    source = tar_of(ants) if packed else ants
    options = ("--shard-samples", "2")
    make_shards(source, tmp_path / "whole", *options)
    pread, read_image, done = os.pread, imagefolder.read_image, []

    def fails_at_the_last(read, *arguments):
        done.append(packed or arguments[0].suffix == ".jpg")
        if done[-1] and sum(done) == 4:
            raise OSError(number, os.strerror(number))
        return read(*arguments)

    with monkeypatch.context() as patched:
        if packed:
            patched.setattr(os, "pread", lambda *arguments: fails_at_the_last(pread, *arguments))
        else:
            patched.setattr(imagefolder, "read_image", lambda path: fails_at_the_last(read_image, path))
        said = rf"src.* cannot be read: {os.strerror(number)}; .*run the same command again"
        with pytest.raises(DataError, match=said):
            make_shards(source, tmp_path / "out", *options)
    assert not (tmp_path / "out/dataset.json").exists()
    assert (tmp_path / "out/train-000000.tar").exists()
    make_shards(source, tmp_path / "out", *options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_that_cannot_be_listed_leaves_no_class_out(ants, tmp_path, monkeypatch):
    scandir = os.scandir

    def fails(path):
        if str(path).endswith("ant"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(DataError, match=r"src/ant cannot be read: Input/output error; "):
        make_shards(ants, tmp_path / "out")


def test_the_sizes_of_files_are_asked_for_at_the_same_time_and_with_progress(tmp_path, monkeypatch, capsys):
    for number in range(6):
        write(tmp_path / "src" / "ant" / f"{number}.jpg", jpeg(number, 20 + number))
    real, both = imagefolder._size, threading.Barrier(2)

    def size(path):
        both.wait(timeout=20)
        return real(path)

    monkeypatch.setattr(imagefolder, "_FILES", 1)
    monkeypatch.setattr(imagefolder, "_size", size)
    source = imagefolder.ImageFolderSource(tmp_path / "src", ["ant"])
    assert source.sizes.tolist() == [(tmp_path / "src" / source.name(i)).stat().st_size for i in range(6)]
    assert "src: listing: 6 of 6 files" in capsys.readouterr().out


def test_a_pipe_and_a_terabyte_are_listed_and_not_read(ants):
    folder = next(ants.rglob("*.jpg")).parent
    os.mkfifo(folder / "pipe.jpg")
    with (folder / "sparse.jpg").open("wb") as file:
        file.truncate(10**12)
    source = ImageFolderSource(folder.parent, [folder.name])
    for name, reason in {"pipe.jpg": "not a regular file", "sparse.jpg": "larger than 536.871 MB"}.items():
        number = next(n for n in range(len(source)) if source._paths[n].endswith(name))
        with pytest.raises(UnreadableSampleError, match=reason):
            source.read(number)


@pytest.mark.parametrize("packed", [False, True])
def test_a_split_by_another_name_is_no_class(tmp_path, packed):
    """Data sets of scans have the folders Testing and Training, which would become the only classes."""

    def refused(*options):
        source = tar_of(tmp_path / "src", "scans") if packed else tmp_path / "src"
        with pytest.raises(DataError) as caught:
            make_shards(source, tmp_path / "out", *options)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    for number, name in enumerate(("Training/ant", "Training/bee", "Testing/ant")):
        write(tmp_path / "src" / name / "0.jpg", jpeg(number))
    said = "the folder Testing looks like a split, and not like a class or a folder to leave out; rename it to test, "
    assert said in refused()
    if not packed:
        (tmp_path / "src/Training").rename(tmp_path / "src/train")
        assert f"{said}or give it alone as --src with --split val" in refused()
        make_shards(tmp_path / "src", tmp_path / "out", "--split", "train")
        record = make_shards(tmp_path / "src/Testing", tmp_path / "out", "--split", "val")
        assert {name: split.per_class for name, split in record.splits.items()} == {"train": [1, 1], "val": [1, 0]}


@pytest.mark.parametrize("packed", [False, True])
def test_a_class_of_val_that_train_lacks_is_refused(tmp_path, packed):
    """Tiny-ImageNet's val/images became a class of all validation images, and moved the labels of train."""
    write_folders(tmp_path / "src", per_class=1)
    shutil.rmtree(tmp_path / "src" / "val", ignore_errors=True)
    write(tmp_path / "src" / "val" / "images" / "0.JPEG", jpeg(8))
    source = tar_of(tmp_path / "src") if packed else tmp_path / "src"
    for split in ((), ("--split", "train")):
        with pytest.raises(DataError, match="the split val has the class 'images', which train does not have; remove"):
            make_shards(source, tmp_path / "out", *split)


def test_a_folder_without_images_beside_that_of_all_classes_hides_nothing(tmp_path):
    """Food-101's folders are images/<class> and meta; all images became of the class images."""
    write_folders(tmp_path / "food" / "images", per_class=1)
    (tmp_path / "food" / "meta").mkdir()
    with pytest.raises(DataError, match="all images would be of one class, 'images'; give the folder of the classes"):
        make_shards(tmp_path / "food", tmp_path / "out")


def test_the_folder_around_a_data_set_is_no_class(tmp_path):
    write_folders(tmp_path / "archive" / "flowers", per_class=1)
    write(tmp_path / "archive" / "__MACOSX" / "flowers" / "._0.jpg", b"what macOS packs beside")
    with pytest.raises(
        DataError, match=r"flowers/train/n\S+JPEG, all images would be of one class, 'flowers'; give the"
    ):
        make_shards(tmp_path / "archive", tmp_path / "out")
    assert make_shards(tmp_path / "archive" / "flowers", tmp_path / "out").classes == [*WNIDS]


@pytest.mark.parametrize("packed", [False, True])
def test_thumbnails_in_hidden_folders_are_no_images_of_a_class(tmp_path, packed):
    src = tmp_path / "src"
    for place in ("ant", "ant/.ipynb_checkpoints", "ant/@eaDir/0.jpg", "bee", "bee/deep/.thumbs", "__MACOSX/ant"):
        write(src / place / "0.jpg", jpeg(len(place)))
    record = make_shards(tar_of(src) if packed else src, tmp_path / "out")
    assert (record.classes, record.splits["train"].samples) == (["ant", "bee"], 2)
    (src / "train").mkdir()
    for name in ("ant", "bee"):
        (src / name).rename(src / "train" / name)
    assert len(FolderSplit(src, "train", 2)) == 2


def test_links_that_lead_back_add_no_image_and_broken_ones_take_no_class(ants, tmp_path):
    """A link that leads back could be followed for ever; a broken link mostly leads to a disk that is not mounted."""
    (ants / "ant" / "all").symlink_to(ants / "ant")
    (ants / "ant" / "up").symlink_to("..")
    write(tmp_path / "bees" / "0.jpg", jpeg(9))
    (ants / "bee").symlink_to(tmp_path / "bees")
    record = make_shards(ants, tmp_path / "out")
    assert (record.classes, record.splits["train"].per_class) == (["ant", "bee"], [4, 1])
    assert FolderSplit(ants.parent, ants.name, 2).labels.sum() == 1
    (tmp_path / "bees").rename(tmp_path / "gone")
    said = rf"{ants}/bee is a link to {tmp_path}/bees, where nothing is; fix the link, or remove it"
    for make in (lambda: make_shards(ants, tmp_path / "other"), lambda: FolderSplit(ants.parent, ants.name, 2)):
        with pytest.raises(DataError, match=said):
            make()
    (ants / "bee").unlink()
    (ants.parent / "whole").mkdir()
    ants.rename(ants.parent / "whole" / "train")
    (ants.parent / "whole" / "val").symlink_to("/nowhere")
    with pytest.raises(DataError, match="whole/val is a link to /nowhere, where nothing is"):
        make_shards(ants.parent / "whole", tmp_path / "other")


def test_two_spellings_of_a_class_are_told(tmp_path):
    """macOS writes an accent as a separate character, so two spellings may look the same."""
    mac, other = "cafe\u0301", "caf\xe9"
    write(tmp_path / "src" / "train" / mac / "0.jpg", jpeg(0))
    write(tmp_path / "src" / "val" / other / "0.jpg", jpeg(1))
    with pytest.raises(DataError, match=r"spelled 'cafe\\u0301' and 'caf\\xe9'; rename one like the other"):
        make_shards(tmp_path / "src", tmp_path / "out")
    with pytest.raises(DataError, match=r"training spells 'cafe\\u0301', not 'caf\\xe9'; rename one like the other"):
        FolderSplit(tmp_path / "src", "val", 1, FolderSplit(tmp_path / "src", "train", 1).classes)


def test_other_files_than_images_are_told_to_their_command(tmp_path):
    write(tmp_path / "hub" / "plain_text" / "train-00000-of-00001.parquet", b"")
    with pytest.raises(DataError, match=r"; it has Parquet files: give \S+/hub/plain_text as --src"):
        make_shards(tmp_path / "hub", tmp_path / "out")
    write(tmp_path / "tars" / "train-000000.tar", b"")
    with pytest.raises(DataError, match=r"has no class folders; .*; for tars that others made, use karat index"):
        make_shards(tmp_path / "tars", tmp_path / "out")


def test_images_beside_the_classes_are_listed(ants, tmp_path, capsys):
    write(ants / "9.jpg", jpeg(9))
    (skipped,) = make_shards(ants, tmp_path / "out").splits["train"].skipped
    assert (skipped.path, skipped.reason) == ("9.jpg", "it is in no class folder")
    assert "skipped 9.jpg: it is in no class folder" in capsys.readouterr().out


def test_the_output_is_not_among_the_classes(ants, tmp_path):
    """The output may not be among the classes, since the run after a killed one would take it for one of them."""
    for out in (ants / "shards", ants / "ant" / "shards"):
        with pytest.raises(DataError, match=rf"--out {out} is among the classes in {ants}, and the next run would"):
            make_shards(ants, out)
        assert not out.exists()
