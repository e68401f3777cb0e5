"""Tests of tars that others wrote: what the index finds in them, and that training reads them like our shards."""

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.data import indexing
from karat_scale.data.prepare import make_webdataset
from karat_scale.data.shards.shard_format import read_dataset_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.foundation.errors import DataError
from tests.conftest import SMALL, events, karat_here, karat_refuses, run_script
from tests.data.backends.helpers import flip
from tests.data.tars import image, sample, write_tar


def index(source: Path, *options: str) -> int:
    return main(["index", str(source), *options])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Write tars like those of the hub's imagenet-1k-wds, with .jpg, .cls and .json; return their directory."""
    source = tmp_path / "hub"
    number = 0
    for split, count in (("train", 2), ("validation", 1)):
        for shard in range(count):
            members: list[tuple[str, bytes]] = []
            for _ in range(6):
                key = f"n0{number % 3}_{number}"
                label = str(number % 3).encode()
                members += [(f"{key}.jpg", image(number)), (f"{key}.cls", label), (f"{key}.json", b'{"label": 9}')]
                number += 1
            write_tar(source / f"imagenet1k-{split}-{shard:04d}.tar", members)
    return source


def test_images_labels_and_keys_are_those_in_the_tars_wherever_the_index_is(hub, tmp_path):
    out = tmp_path / "index"
    assert index(hub, "--out", str(out)) == 0
    assert not list(hub.glob("*.npz"))
    train, val = (ShardSplit(out, split, 3) for split in ("train", "val"))
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1, 2] * 4, [0, 1, 2] * 2)
    assert [train.read(number) for number in range(12)] == [image(number) for number in range(12)]
    assert val.read(5) == image(17)
    assert train.locate(7) == ("n01_7", "imagenet1k-train-0001.tar")
    assert train.file_of(7) == str(hub / "imagenet1k-train-0001.tar")
    for _ in range(2):
        assert index(hub) == 0
    assert len(ShardSplit(hub, "train", 3)) == 12
    moved = hub.with_name("moved")
    hub.rename(moved)
    assert ShardSplit(moved, "train", 3).read(3) == image(3)


def test_hashes_notice_a_change_and_their_absence_is_told(hub: Path, tmp_path: Path) -> None:
    headers, hashes = tmp_path / "headers", tmp_path / "hashes"
    assert index(hub, "--out", str(headers)) == 0
    assert index(hub, "--out", str(hashes), "--hash") == 0
    with pytest.raises(DataError, match=r"indexed without its SHA-256; use data.verify=size"):
        ShardSplit(headers, "train", 3, verify="hash")
    ShardSplit(hashes, "train", 3, verify="hash").close()
    flip(hub / "imagenet1k-train-0000.tar", 600)
    with pytest.raises(DataError, match="has changed since its index was written: sample n00_0"):
        ShardSplit(hashes, "train", 3).read(0)


def test_a_run_on_the_index_sees_what_a_run_on_our_shards_sees(shards: Path, tmp_path: Path) -> None:
    """Losses and digests are equal, so the runs see the same images in the same order."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for tar in shards.glob("*.tar"):
        shutil.copy(tar, foreign)
    assert index(foreign, "--out", str(tmp_path / "index")) == 0
    seen = []
    for data in (shards, tmp_path / "index"):
        run = tmp_path / f"run-{data.name}"
        settings = [f"data.path={data}", f"run.dir={run}", "log.every_steps=1", "schedule.warmup_epochs=0"]
        assert karat_here("train", "fashion_mnist_demo", *SMALL, *settings) == 0
        seen.append([(event["loss"], event["data_digest"]) for event in events(run, "train")])
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("rule", "suffix", "label"),
    [
        ("auto", "jpg", lambda n: [(".cls", str(n).encode())]),
        ("auto", "JPEG", lambda n: [(".json", json.dumps({"caption": "x", "label": n}).encode())]),
        ("json:meta.class", "png", lambda n: [(".json", json.dumps({"meta": {"class": f"c{n}"}}).encode())]),
        ("auto", "webp", lambda n: [(".txt", b"c%d\n" % n)]),
        ("txt", "jpg", lambda n: [(".cls", b"7"), (".txt", b"%d" % n)]),
    ],
    ids=["cls", "json", "field", "txt", "chosen"],
)
def test_where_the_class_is(rule: str, suffix: str, label, tmp_path: Path) -> None:
    kind = {"jpg": "JPEG", "JPEG": "JPEG"}.get(suffix, suffix.upper())
    members = []
    for number in range(6):
        members.append((f"./{number}.{suffix}", image(number, kind)))
        members += [(f"./{number}{end}", data) for end, data in label(number % 2)]
    write_tar(tmp_path / "tars/a.tar", members)
    assert index(tmp_path / "tars", "--label", rule) == 0
    split = ShardSplit(tmp_path / "tars", "train", 2)
    assert split.labels.tolist() == [0, 1] * 3
    assert split.read(3) == image(3, kind)


def test_the_first_tar_of_training_images_that_is_not_empty_says_where_the_class_is(tmp_path: Path) -> None:
    write_tar(tmp_path / "test-0.tar", [("test/i.jpg", image(0))])
    write_tar(tmp_path / "train-0.tar", [])
    for name in ("train-1.tar", "val-0.tar"):
        write_tar(tmp_path / name, [*sample(1, 0), *sample(2, 1)])
    assert index(tmp_path) == 0
    record = read_dataset_record(tmp_path)
    assert record.classes == ["0", "1"]
    assert {name: split.samples for name, split in record.splits.items()} == {"train": 2, "val": 2, "test": 0}


def test_what_is_not_used_is_named_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [("a.jpg", image(0)), ("a.cls", b"0"), ("b.jpg", image(1)), ("b.cls", b"1")]
    odd = [("no_label.jpg", image(2)), ("no_image.cls", b"0"), ("bad.jpg", image(3)), ("bad.cls", b"\xff")]
    odd += [("empty.jpg", b""), ("empty.cls", b"0"), ("inner.tar", b"x"), ("._a.jpg", b"x")]
    again = [("a.jpg", image(4)), ("a.cls", b"1")]
    two = [("two.png", image(5, "PNG")), ("two.jpg", image(6)), ("two.cls", b"0")]
    write_tar(tmp_path / "t/a.tar", good + odd + again + two)
    figures = tmp_path / "figures.json"
    assert index(tmp_path / "t", "--json", str(figures)) == 0
    split = ShardSplit(tmp_path / "t", "train", 2)
    assert split.labels.tolist() == [0, 1, 1, 0]
    assert [split.read(n) for n in range(4)] == [image(0), image(1), image(4), image(5, "PNG")]
    record = read_dataset_record(tmp_path / "t").splits["train"]
    reasons = {skipped.path.partition(": ")[2]: skipped.reason for skipped in record.skipped}
    assert reasons.keys() == {"no_label", "no_image", "bad", "empty", "inner.tar", "._a.jpg"}
    assert json.loads(figures.read_text())["train"]["skipped"] == 6
    out = capsys.readouterr().out
    assert "keys that repeat: 1" in out
    assert "several images, of which the first is used: 1" in out


A, B = ("a.jpg", b"x"), ("b.jpg", b"x")
GOOD = [A, ("a.cls", b"1")]
NO_CLASSES = [
    ([A, ("a.json", b'{"caption": "x", "id": 3}')], [], "--label json:FIELD; .json has the fields"),
    ([A, ("a.txt", b"a cat"), B, ("b.txt", b"a dog")], [], "no classes"),
    ([A, ("a.cls", b"-1")], [], "a.tar: sample a has label -1"),
    ([A, ("a.cls", b"99999999999")], [], "has label 99999999999"),
    ([*GOOD, B, ("b.cls", b"cat")], [], "choose --label"),
    ([("a.cls", b"1")], [], "no sample has an image and a label, by --label cls"),
    (GOOD, ["--label", "csv"], "should be one of auto, cls"),
    (GOOD, ["--split", "train=b*.tar"], "no tar that is left has such a path"),
    (GOOD, ["--split", "train"], "--split train: should be NAME=GLOB, such as train=train-*.tar"),
    (GOOD, ["--split", "train=*", "--split", "val=*"], "--split val=*: an earlier --split has all tars; put this"),
    ([("a.cls", b"1")], ["--classes", "/nowhere"], "--classes /nowhere cannot be read: No such file or directory"),
]


def test_what_cannot_be_classes_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for members, options, said in NO_CLASSES:
        write_tar(tmp_path / "t/a.tar", members)
        assert index(tmp_path / "t", *options) == 2
        assert said in refused(capsys)
        assert not (tmp_path / "t/dataset.json").exists()


def test_class_names_come_from_a_file_or_a_folder_in_the_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_tar(tmp_path / "p/train.tar", [(f"set/{name}/{n}.v2.jpg", image(n)) for n, name in enumerate("bab")])
    assert index(tmp_path / "p") == 0
    split = ShardSplit(tmp_path / "p", "train", 2)
    assert (split.classes, split.labels.tolist()) == (("a", "b"), [1, 0, 1])
    write_tar(tmp_path / "t/a.tar", [("a.jpg", image(0)), ("a.cls", b"1")])
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    assert index(tmp_path / "t", "--classes", str(names)) == 0
    assert read_dataset_record(tmp_path / "t").classes == ["cat", "dog"]
    assert read_dataset_record(tmp_path / "t").splits["train"].empty_classes == ["cat"]
    assert "1 class without a sample" in capsys.readouterr().out


def test_numbered_classes_have_the_names_that_timm_and_open_clip_wrote(tmp_path: Path) -> None:
    def members(names: tuple[str, ...]) -> list[tuple[str, bytes]]:
        files: list[tuple[str, bytes]] = []
        for number, name in enumerate(names):
            said = json.dumps({"class_name": name, "label": number}).encode()
            files += [(f"{number}.jpg", image(number)), (f"{number}.cls", b"%d" % number), (f"{number}.json", said)]
        return files

    for folder, names, expected in (
        ("timm", ("cat", "dog"), ["cat", "dog"]),
        ("one has none", ("cat", ""), ["0", "1"]),
        ("twice", ("crane", "crane"), ["0", "1"]),
    ):
        write_tar(tmp_path / folder / "train.tar", members(names))
        assert index(tmp_path / folder) == 0
        assert read_dataset_record(tmp_path / folder).classes == expected
    for lines, expected in (("ant\nbee\nwasp\n", ["ant", "bee", "wasp"]), ("ant\n", ["cat", "dog"])):
        (tmp_path / "timm" / "classnames.txt").write_text(lines)  # of open_clip
        assert index(tmp_path / "timm") == 0
        assert read_dataset_record(tmp_path / "timm").classes == expected


def test_the_last_line_says_what_the_tars_are_good_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tars, said in {
        "train val": "Train with data.path={out}",
        "train test": "Train with data.path={out} data.val_split=test",
        "train": "Train with data.path={out}, once it has a validation split: add --split val=GLOB",
        "test": "It has nothing to train on; evaluate a run on it with `karat eval RUN --on {out}`",
    }.items():
        out = tmp_path / tars.replace(" ", "-")
        for name in tars.split():
            write_tar(out / f"{name}.tar", [("a.jpg", image(0)), ("a.cls", b"0")])
        assert index(out) == 0
        assert capsys.readouterr().out.splitlines()[-1].endswith(f" {said.format(out=out)}")


def test_splits_follow_words_in_paths_or_rules(tmp_path: Path) -> None:
    for name in ("train/0.tar", "train/1.tar", "valid/0.tar", "more.tar"):
        write_tar(tmp_path / "t" / name, [("a.jpg", image(0)), ("a.cls", b"0")])
    assert index(tmp_path / "t") == 0
    record = read_dataset_record(tmp_path / "t")
    assert {name: [shard.name for shard in split.shards] for name, split in record.splits.items()} == {
        "train": ["more.tar", "train/0.tar", "train/1.tar"],
        "val": ["valid/0.tar"],
    }
    assert len(ShardSplit(tmp_path / "t", "val", 1)) == 1
    assert index(tmp_path / "t", "--split", "val=*/1.tar", "--split", "train=*") == 0
    assert [s.name for s in read_dataset_record(tmp_path / "t").splits["val"].shards] == ["train/1.tar"]


def test_no_tars_damaged_ones_and_our_own_shards_are_one_line(shards, tmp_path, capsys):
    assert index(shards) == 2
    assert "needs no index" in refused(capsys)
    (tmp_path / "empty").mkdir()
    assert index(tmp_path / "empty") == 2
    assert "has no *.tar" in refused(capsys)
    for name, data, said in (("a.tar.gz", b"x", "decompress them first"), ("a.tar", b"x" * 2000, "not a tar")):
        (tmp_path / "empty" / name).write_bytes(data)
        assert index(tmp_path / "empty") == 2
        assert said in refused(capsys)


def test_a_class_whose_name_is_no_utf8_is_skipped_and_a_worker_that_dies_is_one_line(tmp_path, capsys, monkeypatch):
    def json_sample(number, label):
        return [(f"{number}.jpg", image(number)), (f"{number}.json", f'{{"label": "{label}"}}'.encode())]

    for name, rule, members in (
        ("path", "path", [("\udce9t\udce9/0.jpg", image(0)), ("b/1.jpg", image(1))]),
        ("json", "json:label", [*json_sample(0, "\\ud800"), *json_sample(1, "b")]),
        ("name", "cls", [*sample(0), ("s0.json", b'{"class_name": "\\ud800"}')]),
    ):
        write_tar(tmp_path / name / "train.tar", members)
        assert index(tmp_path / name, "--label", rule) == 0
        skipped = read_dataset_record(tmp_path / name).splits["train"].skipped
        said = "no label: the name of the class is not UTF-8"
        assert (said in [one.reason for one in skipped]) == (name != "name")
    monkeypatch.setattr(indexing, "read_samples", lambda *arguments, **more: os._exit(9))
    capsys.readouterr()
    assert index(tmp_path / "path") == 2
    assert "a worker process died; use fewer cores" in refused(capsys)


def script(name: str, *arguments: str) -> None:
    run_script(f"data_prep/{name}.py", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("hashes", [False, True], ids=["headers", "hashes"])
def test_the_scripts_take_an_index_like_shards(hub: Path, tmp_path: Path, hashes: bool) -> None:
    out, staged = tmp_path / "index", tmp_path / "staged"
    assert index(hub, "--out", str(out), *(["--hash"] if hashes else [])) == 0
    script("verify", "--src", str(out))
    script("stage", "--src", str(out), "--out", str(staged))
    hub.rename(tmp_path / "away")
    assert ShardSplit(staged, "train", 3).read(4) == image(4)
    script("verify", "--src", str(staged))
    script("make_dali_index", "--src", str(staged), "--out", str(tmp_path / "dali"))
    assert len(list((tmp_path / "dali").glob("*.idx"))) == 3
    script("make_ffcv", "--src", str(staged), "--out", str(tmp_path / "betons"))


def test_verify_finds_what_has_changed_in_a_tar(hub: Path, tmp_path: Path) -> None:
    assert index(hub, "--out", str(tmp_path / "index")) == 0
    tar = hub / "imagenet1k-train-0001.tar"
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"n01_7.jpg", b"n01_x.jpg", 1))  # its checksum no longer fits
    done = run_script("data_prep/verify.py", "--src", str(tmp_path / "index"), check=False)
    assert done.returncode == 2
    assert "has no tar header at byte" in done.stderr
    at = content.index(image(7))
    tar.write_bytes(content[:at] + b"\0" * 300 + content[at + 300 :])
    done = run_script("data_prep/verify.py", "--src", str(tmp_path / "index"), check=False)
    assert done.returncode == 2
    assert "sample n01_7 cannot be decoded" in done.stderr


def test_a_terminal_acts_on_no_name_in_a_tar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil, names = "\x1b]0;owned\x07", tmp_path / "classes.txt"
    names.write_text(evil)
    good = [("0.jpg", image(0)), ("0.txt", evil.encode()), ("1.jpg", image(1)), ("1.txt", evil.encode())]
    write_tar(tmp_path / "tars" / "train.tar", [*good, (f"{evil}.jpg", image(9))])
    out = tmp_path / f"out{evil}"
    assert index(tmp_path / "tars", "--label", "txt", "--out", str(out), "--classes", str(names)) == 0
    assert karat_here("data", str(out), "--out", str(tmp_path / "page.html")) == 0
    printed = capsys.readouterr().out
    assert "\\x1b]0;owned" in printed
    assert not {"\x1b", "\x07"} & set(printed)


@pytest.mark.parametrize("where", ["size", "record", "cls", "json"])
def test_a_number_of_thousands_of_digits_is_told_in_a_line(where, tmp_path, capsys):
    number = "9" * 5000
    members = [(f"{n}.{suffix}", content) for n in range(2) for suffix, content in (("jpg", image(n)), ("cls", b"0"))]
    if where in ("cls", "json"):
        text = number if where == "cls" else f'{{"label": {number}}}'
        write_tar(tmp_path / "a.tar", [*members, ("2.jpg", image(2)), (f"2.{where}", text.encode())])
        assert index(tmp_path, "--label", "cls") == 0
        why = "cls is a number of 5000 digits" if where == "cls" else ".cls is missing"
        assert f"skipped 1: no label: {why}" in capsys.readouterr().out
        return
    record = f"5011 size={number}\n" if where == "size" else f"{number} path=a.jpg\n"
    extended = tarfile.TarInfo("extended")
    extended.type, extended.size = tarfile.XHDTYPE, len(record)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(extended, io.BytesIO(record.encode()))
        for name, content in members:
            plain = tarfile.TarInfo(name)
            plain.size = len(content)
            tar.addfile(plain, io.BytesIO(content))
    assert index(tmp_path) == (2 if where == "size" else 0)
    assert ("is cut short at" in capsys.readouterr().err) == (where == "size")


def test_what_macos_packs_beside_files_is_no_sample(tmp_path: Path) -> None:
    """macOS's `._` files are skipped. Before the fix, with the class in the path, training stopped at the first one."""
    names = ("./cat/a.1.jpg", "./cat/._a.1.jpg", "./._cat", "__MACOSX/cat/a.jpg", "./cat/.thumbs/a.jpg")
    write_tar(tmp_path / "train.tar", [(name, image(0)) for name in names])
    assert index(tmp_path, "--label", "path") == 0
    split = read_dataset_record(tmp_path).splits["train"]
    assert (split.samples, read_dataset_record(tmp_path).classes) == (1, ["cat"])
    assert [one.path for one in split.skipped] == [f"train.tar: {name}" for name in names[1:]]


def test_tars_behind_links_are_found_and_none_is_left_out_in_silence(tmp_path: Path, capsys) -> None:
    """Clusters and caches of the hub use many links, so links are followed, and tars that are left out are named."""
    source = tmp_path / "source"
    write_tar(source / "train" / "0.tar", sample(0))
    write_tar(tmp_path / "elsewhere" / "1.tar", sample(1))
    (source / "val").symlink_to(tmp_path / "elsewhere")
    (source / "train" / "back").symlink_to(source)
    (source / "train" / "2.tar").symlink_to(tmp_path / "blob")
    (source / "train" / "3.tar.gz").write_bytes(b"")
    write_tar(source / "train" / "4.TAR", sample(4))
    (source / "train" / "._0.tar").write_bytes(b"what macOS keeps beside it on other disks")
    assert index(source) == 2
    assert "train/2.tar is a link to " in refused(capsys)
    write_tar(tmp_path / "blob", sample(2))
    assert index(source) == 0
    record = read_dataset_record(source)
    assert {name: [tar.name for tar in split.shards] for name, split in record.splits.items()} == {
        "train": ["train/0.tar", "train/2.tar"],
        "val": ["val/1.tar"],
    }
    said = capsys.readouterr().out
    assert "note: 1 compressed tar left out, such as train/3.tar.gz" in said
    assert "note: 1 misnamed tar left out, such as train/4.TAR" in said
    assert ShardSplit(source, "val", 1).read(0) == image(1)


def test_tars_that_others_made_are_never_made_again(image_folder: Path, tmp_path: Path) -> None:
    """Before the fix, indexed tars with names like ours were taken for leftovers of our own and removed."""
    source = tmp_path / "source"
    write_tar(source / "train-000000.tar", sample(0))
    assert index(source) == 0
    content = (source / "train-000000.tar").read_bytes()
    with pytest.raises(DataError, match="has tars that others made, and karat index has indexed; use another --out"):
        make_webdataset.main(["--src", str(image_folder), "--out", str(source)])
    assert (source / "train-000000.tar").read_bytes() == content


def test_a_source_that_is_not_there_is_refused_and_not_made(tmp_path: Path) -> None:
    assert "nowhere is not a directory" in karat_refuses("index", str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
