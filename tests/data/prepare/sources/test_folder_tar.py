"""A tar of an ImageFolder gives what the same folder gives, whatever is around and between its images."""

import os
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from karat_scale.foundation.errors import DataError
from tests.data.prepare.images import contents, jpeg, write
from tests.data.prepare.making import make_shards, shard_samples
from tests.data.tars import tar_bytes, tar_of

HIDDEN = "it is in a hidden folder, or hidden"


def made(source: Path) -> tuple[list[str], list[tuple[str, int, bytes]], dict[str, str]]:
    """Make shards of a source; return the classes, the samples by key, and the skipped files with their reasons."""
    out = source.parent / f"{source.name}-shards"
    record = make_shards(source, out)
    return record.classes, sorted(shard_samples(out)), {i.path: i.reason for i in record.splits["train"].skipped}


def a_tar(path: Path, names: Iterable[str]) -> Path:
    """Write a tar of files with these names, where .jpg files are images; return its path."""
    named = list(names)
    path.write_bytes(tar_bytes({name: jpeg(n) if name.endswith("jpg") else b"text" for n, name in enumerate(named)}))
    return path


def test_a_folder_around_the_classes_is_no_class(tmp_path: Path) -> None:
    for number, name in enumerate(("rose/1.jpg", "rose/old/2.jpg", "tulip/1.jpg")):
        write(tmp_path / "flowers" / name, jpeg(number))
    (tmp_path / "flowers" / "iris").mkdir()
    (tmp_path / "flowers" / "README.txt").write_text("text")
    (tmp_path / "LICENSE").write_text("text")
    with tarfile.open(tmp_path / "flowers.tar", "w") as tar:
        tar.add(tmp_path / "flowers", "flowers")
        tar.add(tmp_path / "LICENSE", "LICENSE")
    classes, samples, skipped = made(tmp_path / "flowers.tar")
    assert classes == ["iris", "rose", "tulip"]
    assert skipped == dict.fromkeys(("README.txt", "LICENSE"), "the name has no image suffix")
    assert (classes, samples) == made(tmp_path / "flowers")[:2]
    parts = "*.tar"
    assert contents(tmp_path / "flowers.tar-shards", parts) == contents(tmp_path / "flowers-shards", parts)


def test_splits_in_several_folders_are_one_line(tmp_path: Path) -> None:
    """Before the fix, an image of the second folder was lost, as if it replaced that of the first."""
    members = [(f"{domain}/train/cat/1.jpg", jpeg(number)) for number, domain in enumerate(("Art", "Clipart"))]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    with pytest.raises(
        DataError, match="has a split train in several folders, such as 'Art' and 'Clipart'; make a tar"
    ):
        made(tmp_path / "a.tar")


def test_a_file_that_was_updated_is_its_last_version(tmp_path: Path) -> None:
    """The last version of a file counts, as in unpacking, because `tar -u` appends."""
    members = [("ant/1.jpg", jpeg(0)), ("bee/1.jpg", jpeg(1)), ("ant/1.jpg", jpeg(2))]
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    _, samples, skipped = made(tmp_path / "a.tar")
    assert [data for _, _, data in samples] == [jpeg(2), jpeg(1)]
    assert skipped == {"ant/1.jpg": "a later file of the tar replaces it"}


def test_classes_with_folders_in_them_are_classes(tmp_path: Path) -> None:
    classes, samples, _ = made(a_tar(tmp_path / "a.tar", ["rose/old/1.jpg", "tulip/new/2.jpg"]))
    assert (classes, [label for _, label, _ in samples]) == (["rose", "tulip"], [0, 1])
    assert made(a_tar(tmp_path / "b.tar", ["rose/1.jpg", "rose/old/2.jpg"]))[0] == ["rose"]


def test_one_class_by_long_paths_is_an_error_and_an_empty_folder_is_not_guessed_about(tmp_path: Path) -> None:
    for name, names in {
        "b": ["a/b/rose/1.jpg", "a/b/tulip/1.jpg"],
        "old": ["rose/old/1.jpg", "rose/old/2.jpg"],
    }.items():
        message = rf"a\.tar: by paths such as {names[0]}, all images would be of one class, '{name}'; expected "
        with pytest.raises(DataError, match=message):
            made(a_tar(tmp_path / "a.tar", names))
    with tarfile.open(a_tar(tmp_path / "a.tar", ["flowers/rose/1.jpg", "flowers/tulip/1.jpg"]), "a") as tar:
        docs = tarfile.TarInfo("docs")
        docs.type = tarfile.DIRTYPE
        tar.addfile(docs)
    with pytest.raises(DataError, match="all images would be of one class, 'flowers'"):
        made(tmp_path / "a.tar")


def test_files_beside_the_splits_are_no_class(tmp_path: Path) -> None:
    names = ["flowers/about/README.txt", "LICENSE", "flowers/train/rose/1.jpg", "flowers/train/tulip/1.jpg"]
    classes, samples, skipped = made(a_tar(tmp_path / "a.tar", names))
    assert classes == ["rose", "tulip"]
    assert [label for _, label, _ in samples] == [0, 1]
    assert skipped == dict.fromkeys(["flowers/about/README.txt", "LICENSE"], "the name has no image suffix")


@pytest.mark.parametrize("top", ["", "flowers/", "train/"])
def test_hidden_folders_are_no_classes_and_listed(tmp_path: Path, top: str) -> None:
    images = [f"{top}rose/1.jpg", f"{top}tulip/1.jpg"]
    hidden = [f"{top}.ipynb_checkpoints/1-checkpoint.jpg", ".cache/train/x/1.jpg", "._top"]
    classes, samples, skipped = made(a_tar(tmp_path / "a.tar", [*hidden, *images]))
    assert classes == ["rose", "tulip"]
    assert [(key, label) for key, label, _ in samples] == [("rose/1", 0), ("tulip/1", 1)]
    assert skipped == dict.fromkeys(hidden, HIDDEN)


def test_hard_links_are_images_and_other_links_are_listed(tmp_path: Path) -> None:
    src = tmp_path / "src"
    write(src / "ant/1.jpg", jpeg(1))
    (src / "bee").mkdir()
    os.link(src / "ant/1.jpg", src / "bee/1.jpg")
    os.link(src / "ant/1.jpg", src / "bee/2.jpg")
    with tarfile.open(tar_of(src)) as tar:
        assert [info.name for info in tar if info.islnk()] == ["./bee/1.jpg", "./bee/2.jpg"]
    classes, samples, skipped = made(tmp_path / "src.tar")
    assert (classes, samples) == made(src)[:2]
    assert len(samples) == 3
    assert not skipped

    (src / "bee/3.jpg").symlink_to(src / "ant/1.jpg")
    (src / "bee/notes").symlink_to("nowhere")
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        tar.add(src, ".")
        missing = tarfile.TarInfo("ant/0.jpg")
        missing.type, missing.linkname = tarfile.LNKTYPE, "gone.jpg"
        tar.addfile(missing)
    _, with_links, skipped = made(tmp_path / "more.tar")
    assert with_links == samples
    assert skipped == {
        "bee/3.jpg": "a link member, not a regular file",
        "ant/0.jpg": "a hard link to 'gone.jpg', which is not before it in the tar",
    }


def test_a_sparse_image_is_listed(tmp_path: Path) -> None:
    write(tmp_path / "ant/1.jpg", jpeg(1))
    write(tmp_path / "ant/2.jpg", jpeg(2))
    os.truncate(tmp_path / "ant/2.jpg", 1 << 20)
    command = ["tar", "--format=gnu", "--sparse", "--hole-detection=raw", "-cf", "src.tar", "ant"]
    subprocess.run(command, cwd=tmp_path, check=True)
    _, samples, skipped = made(tmp_path / "src.tar")
    assert [key for key, _, _ in samples] == ["ant/1"]
    assert skipped == {"ant/2.jpg": "a sparse member, not a regular file"}


def test_a_tar_without_images_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.tar has no images"):
        made(a_tar(tmp_path / "a.tar", ["ant/notes.txt", "README"]))
    with pytest.raises(DataError, match=r"b\.tar has no images; expected"):
        made(a_tar(tmp_path / "b.tar", [".ant/1.jpg"]))
    with pytest.raises(DataError, match=r"c\.tar: 1\.jpg is in no class folder; expected <class>/<image>"):
        made(a_tar(tmp_path / "c.tar", ["1.jpg", "ant/1.jpg"]))
