import tarfile

import pytest

from karat_scale.foundation.errors import DataError
from tests.data.prepare.images import (
    WNIDS,
    contents,
    jpeg,
    train_files,
    val_files,
    write_folders,
    write_official,
)
from tests.data.prepare.making import make_shards, shard_samples
from tests.data.tars import tar_bytes


def make(src, out, *options):
    return make_shards(src, out, "--shard-samples", "7", *options)


@pytest.fixture
def official(tmp_path):
    write_official(tmp_path / "official")
    return tmp_path / "official"


def test_official_tars_give_the_shards_of_the_same_images_in_folders(official, tmp_path):
    write_folders(tmp_path / "folders")
    record = make(official, tmp_path / "a")
    make(tmp_path / "folders", tmp_path / "b")
    assert len(contents(tmp_path / "a", "*.tar")) == 5
    assert contents(tmp_path / "a", "*-0*") == contents(tmp_path / "b", "*-0*")
    assert record.classes == sorted(WNIDS)
    assert record.splits["train"].per_class == [6, 6, 6]
    assert record.splits["val"].per_class == [3, 3, 3]


def devkit_forms():
    val = val_files()
    devkit = (WNIDS[2], WNIDS[0], WNIDS[1])
    ids = "".join(f"{devkit.index(wnid) + 1}\n" for wnid, _ in val.values())
    return {
        "pairs": ("val_labels.txt", "".join(f"{name} {wnid}\n" for name, (wnid, _) in val.items()), None),
        "csv": ("val_labels.csv", "".join(f"{name[:-5]},{wnid}\n" for name, (wnid, _) in val.items()), None),
        "wnid a line": ("imagenet_2012_validation_synset_labels.txt", "\n".join(w for w, _ in val.values()), None),
        "sorted numbers": ("val.txt", "".join(f"{name} {WNIDS.index(w)}\n" for name, (w, _) in val.items()), None),
        "devkit": (
            "ILSVRC2012_validation_ground_truth.txt",
            ids,
            "".join(f"{number} {wnid} some name\n" for number, wnid in enumerate(devkit, 1)),
        ),
        "devkit order": ("ILSVRC2012_validation_ground_truth.txt", ids, "".join(f"{wnid}\n" for wnid in devkit)),
    }


def test_published_forms_of_the_validation_labels(official, tmp_path):
    make(official, tmp_path / "kaggle", "--split", "val")
    (official / "LOC_val_solution.csv").unlink()
    for form, (name, text, synsets) in devkit_forms().items():
        (official / name).write_text(text)
        options = []
        if synsets is not None:
            (tmp_path / "synsets.txt").write_text(synsets)
            options = ["--synsets", str(tmp_path / "synsets.txt")]
        make(official, tmp_path / form, "--split", "val", *options)
        assert contents(tmp_path / form, "val*") == contents(tmp_path / "kaggle", "val*"), form
        (official / name).unlink()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no labels beside it; put LOC_val_solution.csv there"),
        ("", "val_labels.txt is empty"),
        ("ILSVRC2012_val_00000001.JPEG n01440764\n", "has no label for 8 images, such as ILSVRC2012_val_00000002"),
        ("1\n2\n3\n1\n2\n3\n1\n2\n3\n", "holds the devkit's class numbers; use --synsets FILE"),
        ("".join(f"ILSVRC2012_val_{n:08d} cat\n" for n in range(1, 10)), "'cat'; expected a wnid"),
        ("".join(f"ILSVRC2012_val_{n:08d} {n}\n" for n in range(1, 10)), "class numbers up to 9"),
    ],
)
def test_wrong_labels_are_refused(official, tmp_path, text, message):
    (official / "LOC_val_solution.csv").unlink()
    if text is not None:
        (official / "val_labels.txt").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        make(official, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_sorted_list_is_not_taken_for_the_devkits_order(official, tmp_path):
    (official / "LOC_val_solution.csv").unlink()
    (official / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n" * 9)
    (tmp_path / "synsets.txt").write_text("\n".join(WNIDS))
    with pytest.raises(DataError, match="is sorted by wnid, which is not the devkit's order"):
        make(official, tmp_path / "out", "--synsets", str(tmp_path / "synsets.txt"))


def test_human_names_and_only_training(official, tmp_path):
    lines = [f"{WNIDS[0]} tench, Tinca tinca", f"{WNIDS[2]} kit fox, Vulpes macrotis"]
    (official / "LOC_synset_mapping.txt").write_text("\n".join(lines))
    names = ["tench, Tinca tinca", WNIDS[1], "kit fox, Vulpes macrotis"]
    assert make(official, tmp_path / "out").names == names
    (official / "LOC_val_solution.csv").unlink()
    assert list(make(official, tmp_path / "train", "--split", "train").splits) == ["train"]


@pytest.mark.parametrize("cut", ["in an inner tar", "in a header", "between two inner tars", "an inner tar"])
def test_a_truncated_train_tar_is_refused(official, tmp_path, cut):
    path = official / "ILSVRC2012_img_train.tar"
    if cut == "an inner tar":
        inner = {f"{wnid}.tar": tar_bytes(files) for wnid, files in train_files().items()}
        inner[f"{WNIDS[0]}.tar"] = inner[f"{WNIDS[0]}.tar"][:1900]
        path.write_bytes(tar_bytes(inner))
    else:
        with tarfile.open(path) as tar:
            second = tar.getmembers()[1].offset
        shift = {"in an inner tar": 3000, "in a header": 100, "between two inner tars": 0}[cut]
        path.write_bytes(path.read_bytes()[: second + shift])
    with pytest.raises(DataError, match=r"(ILSVRC2012_img_train|n01440764).tar.* is cut short"):
        make(official, tmp_path / "out", "--split", "train")


def test_names_in_archives_cannot_lead_out_of_the_output(official, tmp_path):
    evil = {"../../../evil.JPEG": jpeg(1), "/etc/evil.JPEG": jpeg(2), "a b/x\\evil.JPEG": jpeg(3), "x.JPEG": jpeg(4)}
    evil |= {"./x.JPEG": jpeg(5), "ordinary.1.JPEG": jpeg(6), f"{'long' * 60}.JPEG": jpeg(7), "._x.JPEG": b"mac"}
    (official / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes({f"{WNIDS[0]}.tar": tar_bytes(evil)}))
    record = make(official, tmp_path / "deep/out", "--split", "train").splits["train"]
    keys = {key for key, _, _ in shard_samples(tmp_path / "deep/out")}
    assert len(keys) == 7
    assert all(not {"..", ".", ""} & set(key.split("/")) and "." not in key.split("/")[-1] for key in keys)
    assert {f"{WNIDS[0]}/evil", f"{WNIDS[0]}/etc/evil", f"{WNIDS[0]}/a_b/x/evil", f"{WNIDS[0]}/ordinary_1"} <= keys
    assert not list(tmp_path.rglob("*evil*"))
    assert [item.path for item in record.skipped] == [f"{WNIDS[0]}/._x.JPEG"]
