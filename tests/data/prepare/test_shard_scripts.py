"""Tests of verify.py, stage.py, join_splits.py and make_dali_index.py on shards of make_webdataset.py."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from karat_scale.data.prepare import finished, make_webdataset
from karat_scale.data.prepare.making import alone_in
from karat_scale.data.prepare.sources.tars import ShardSource
from karat_scale.data.shards.shard_format import SplitRecord, read_dataset_record, write_dataset_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.data.shards.tars import EncodedSample, write_shard
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.files import file_sha256
from tests.conftest import ROOT, karat_done, karat_environment, karat_here, run_script, wait_until
from tests.data.backends.helpers import flip
from tests.data.prepare.images import contents, jpeg, write_folders
from tests.data.prepare.making import make_shards
from tests.data.tars import image, sample, write_tar
from tests.warm import start


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    write_folders(root / "src")
    make_shards(root / "src", root / "out", "--shard-samples", "6")
    return root / "out"


@pytest.fixture
def shards(made, tmp_path):
    return shutil.copytree(made, tmp_path / "shards")


def check(directory, *options):
    finished.verify(["--src", str(directory), *options])


def test_problems_are_counted_and_the_first_is_named(shards, capsys):
    check(shards)
    assert "train: right: 18 samples of 3 classes in 3 shards" in capsys.readouterr().out
    flip(shards / "train-000001.tar", 3000)
    (shards / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000001.tar has changed .*\(2 problems in total\)") as caught:
        check(shards)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out.count("problem: ") == 2
    done = run_script("data_prep/verify.py", "--src", str(shards), "--split", "train", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_worker_that_dies_is_one_line(shards, monkeypatch):
    monkeypatch.setattr(finished, "verify_shard", lambda *arguments: os._exit(9))
    with pytest.raises(DataError, match="a worker process died; use fewer --workers if memory is short"):
        check(shards, "--workers", "2")


def replace_first_shard(directory, samples):
    record = read_dataset_record(directory)
    record.splits["train"].shards[0] = write_shard(directory, "train-000000", samples)
    write_dataset_record(directory, record)


def test_bad_samples_are_named_and_counts_compared(shards):
    for bad, message in (
        (EncodedSample("bad", "jpg", jpeg(1)[:-200], 0), "sample bad cannot be decoded"),
        (EncodedSample("bad", "jpg", jpeg(1), 7), "sample bad has label 7 of 3 classes"),
    ):
        replace_first_shard(shards, [bad])
        with pytest.raises(DataError, match=message):
            check(shards)
    replace_first_shard(shards, [EncodedSample("one", "jpg", jpeg(1), 0)])
    with pytest.raises(DataError, match=r"split train has 13 samples, dataset.json says 18"):
        check(shards)
    with pytest.raises(DataError, match=r"lists 3 classes, ImageNet has 1000 .\d+ problems in total"):
        check(shards, "--imagenet")
    right = SplitRecord(samples=50_000, bytes=1, shards=[])
    assert finished.count_problems("val", right, [50] * 1000, True) == []
    found = finished.count_problems("val", right, [51, 49] + [50] * 998, True)
    assert found[0] == "split val has 51 samples of class 0, ImageNet 50 to 50"
    assert "ImageNet has 1281167" in " ".join(finished.count_problems("train", right, [50] * 1000, True))


def test_a_label_in_the_tar_that_differs_from_the_index(shards):
    path = shards / "train-000000.tar"
    with tarfile.open(path) as tar:
        flip(path, tar.getmembers()[0].offset_data, by=0x01)
    record = json.loads((shards / "dataset.json").read_text())
    record["splits"]["train"]["shards"][0]["sha256"] = file_sha256(path)
    (shards / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match="has another label in the tar than in the index"):
        check(shards)


def test_staging_copies_and_resumes(shards, tmp_path, capsys):
    local = tmp_path / "local"
    finished.stage(["--src", str(shards), "--out", str(local)])
    assert contents(local) == contents(shards) | {".staged": b""}
    flip(local / "train-000001.tar", 2000)
    (local / "val-000000.tar").unlink()
    kept = (local / "train-000000.tar").stat().st_mtime_ns
    finished.stage(["--src", str(shards), "--out", str(local)])
    assert "2 were copied" in capsys.readouterr().out
    assert contents(local) == contents(shards) | {".staged": b""}
    assert (local / "train-000000.tar").stat().st_mtime_ns == kept


def test_staged_tars_without_a_hash_are_copied_again_with_their_new_index(tmp_path):
    tars, local = tmp_path / "tars", tmp_path / "local"
    for numbers in ((0, 1), (1, 0)):
        write_tar(tars / "train.tar", [one for number in numbers for one in sample(number, number)])
        assert karat_here("index", str(tars)) == 0
        finished.stage(["--src", str(tars), "--out", str(local)])
        split = ShardSplit(local, "train", 2)
        assert [(int(split.labels[at]), split.read(at)) for at in range(2)] == [(n, image(n)) for n in numbers]


def stage_split(shards, local, split):
    finished.stage(["--src", str(shards), "--out", str(local), "--split", split])


def test_splits_staged_in_turn_are_one_data_set_and_one_that_fails_spares_the_others(shards, tmp_path, capsys):
    local = tmp_path / "local"
    stage_split(shards, local, "train")
    assert "Stage val too before you train from it" in capsys.readouterr().out
    stage_split(shards, local, "val")
    assert f"Train with data.path={local}" in capsys.readouterr().out
    assert contents(local) == contents(shards) | {".staged": b""}
    for directory in (local, shards):
        flip(directory / "val-000000.tar", 2000)
    with pytest.raises(DataError, match=r"val-000000.tar has changed"):
        stage_split(shards, local, "val")
    assert list(read_dataset_record(local).splits) == ["train"]


@pytest.mark.parametrize("change", ["damage", "other classes", "other shards"])
def test_a_staged_split_that_is_not_right_is_listed_no_more(shards, tmp_path, capsys, change):
    local = tmp_path / "local"
    stage_split(shards, local, "train")
    record = read_dataset_record(shards)
    if change == "damage":
        flip(local / "train-000001.tar", 2000)
    elif change == "other classes":
        record.classes[0] = "another"
    else:
        record.splits["train"].shards.reverse()
    write_dataset_record(shards, record)
    stage_split(shards, local, "val")
    assert list(read_dataset_record(local).splits) == ["val"]
    assert "Stage train too before you train from it" in capsys.readouterr().out


def test_one_split_is_staged_and_a_full_disk_names_the_way_out(shards, tmp_path, monkeypatch):
    stage_split(shards, tmp_path / "local", "val")
    assert len(ShardSplit(tmp_path / "local", "val", 3, "hash")) == 9
    assert list(read_dataset_record(tmp_path / "local").splits) == ["val"]
    with pytest.raises(DataError, match="has no split 'test'; the splits there: train, val"):
        stage_split(shards, tmp_path / "other", "test")
    monkeypatch.setattr(finished, "SPARE_BYTES", shutil.disk_usage(tmp_path).total)
    with pytest.raises(DataError, match=r"GB free; train from data.path=.* instead$"):
        finished.stage(["--src", str(shards), "--out", str(tmp_path / "local")])


@pytest.mark.parametrize("was_there", [False, True])
def test_damage_at_the_source_is_not_staged_and_no_copy_that_lacks_it_is_taken_for_whole(shards, tmp_path, was_there):
    local = tmp_path / "local"
    if was_there:
        finished.stage(["--src", str(shards), "--out", str(local)])
        (local / "train-000001.tar").unlink()
    flip(shards / "train-000001.tar", 2000)
    with pytest.raises(DataError, match=r"train-000001.tar has changed since it was written"):
        finished.stage(["--src", str(shards), "--out", str(local)])
    assert not (local / "dataset.json").exists()
    assert not (local / "train-000001.tar").exists()


def test_dali_indexes_point_at_the_members(shards, tmp_path):
    finished.make_dali_index(["--src", str(shards), "--out", str(tmp_path / "idx")])
    assert sorted(path.name for path in (tmp_path / "idx").iterdir()) == sorted(
        f"{path.stem}.idx" for path in shards.glob("*.tar")
    )
    split, sample = ShardSplit(shards, "train", 3), 0
    for path in sorted(shards.glob("train-*.tar")):
        first, *lines = (tmp_path / f"idx/{path.stem}.idx").read_text().splitlines()
        assert first == f"v1.2 {len(lines)}"
        data = path.read_bytes()
        for line in lines:
            words = line.split(" ")
            assert [words[0], words[4]] == ["cls", "jpg"]
            label, image = (data[int(words[at]) :][: int(words[at + 1])] for at in (1, 5))
            assert int(label) == split.labels[sample]
            assert image == split.read(sample)
            assert words[7] == f"{split.locate(sample)[0]}.jpg"
            sample += 1
    assert sample == len(split)


def test_dali_indexes_of_tars_of_one_name_are_in_their_folders(shards, tmp_path):
    tars, out = tmp_path / "tars", tmp_path / "idx"
    for split in ("train", "val"):
        (tars / split).mkdir(parents=True)
        shutil.copy(shards / f"{split}-000000.tar", tars / split / "00000.tar")
    assert karat_here("index", str(tars)) == 0
    finished.make_dali_index(["--src", str(tars), "--out", str(out)])
    for split in ("train", "val"):
        made = (out / split / "00000.idx").read_text()
        assert made == finished.dali_index(tars / split / "00000.tar")
    assert len(list(out.rglob("*.idx"))) == 2


# join_splits.py: runs for one data set take turns, on any file system, and a killed one does not block the others.
@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    """Return two directories with a split each, as the elements of a job array make them."""
    write_folders(tmp_path / "src")
    for split in ("train", "val"):
        make_shards(tmp_path / "src", tmp_path / split, "--split", split)
    return tmp_path / "train", tmp_path / "val"


def test_one_waits_for_the_other_and_none_is_lost(parts: tuple[Path, Path], tmp_path: Path) -> None:
    (train, val), out = parts, tmp_path / "out"
    out.mkdir()
    (out / finished.TURN).symlink_to(val)  # a run that was killed left it
    script, said = str(ROOT / "data_prep/join_splits.py"), tmp_path / "said"
    options = ["--src", str(train), "--out", str(out)]
    waiting = start(script, options, karat_environment(), ROOT, said, tmp_path / "errors")
    wait_until(lambda: said.exists() and f"waiting until {val} is joined" in said.read_text())
    assert not (out / "dataset.json").exists()
    assert finished.join(val, out) == ["val"]  # the next run for the same source takes over
    waiting.join(60)
    assert waiting.exitcode == 0
    assert sorted(read_dataset_record(out).splits) == ["train", "val"]
    assert not os.path.lexists(out / finished.TURN)
    assert not train.exists()
    assert not val.exists()


@pytest.mark.parametrize("command", ["join", "stage"])
def test_a_second_run_of_one_source_waits_and_finds_it_done(command, parts, tmp_path) -> None:
    train, out, said = parts[0], tmp_path / "out", tmp_path / "said"
    out.mkdir()
    script = str(ROOT / "data_prep" / ("stage.py" if command == "stage" else "join_splits.py"))
    options = ["--src", str(train), "--out", str(out)]
    with alone_in(out if command == "stage" else train):
        waiting = start(script, options, karat_environment(), ROOT, said, tmp_path / "errors")
        wait_until(lambda: said.exists() and "waiting for the end of another run" in said.read_text())
        if command == "stage":
            finished.list_splits(out, read_dataset_record(train), {})
            for path in train.iterdir():
                shutil.copy(path, out)
        else:
            (train / "dataset.json").rename(out / "dataset.json")
    waiting.join(60)
    assert waiting.exitcode == (0 if command == "stage" else 2)
    if command == "stage":
        assert "0 were copied" in said.read_text()
    else:
        assert "train has no dataset.json" in (tmp_path / "errors").read_text()


def test_a_join_resumes_after_its_last_step_but_one_and_leaves_other_files(parts, tmp_path):
    (train, val), out = parts, tmp_path / "out"
    (train / "job.log").touch()
    left = (train / "dataset.json").read_bytes()
    assert finished.join(train, out) == ["train"]
    assert [path.name for path in train.iterdir()] == ["job.log"]
    (train / "dataset.json").write_bytes(left)  # as if killed before this was removed
    shutil.copytree(val, tmp_path / "again")
    for src in (train, val):
        finished.join(src, out)
    finished.verify(["--src", str(out)])
    with pytest.raises(DataError, match="has a split val already; use another --out"):
        finished.join(tmp_path / "again", out)


def test_tars_in_folders_are_joined(tmp_path):
    for split in ("train", "val"):
        write_tar(tmp_path / split / split / "0.tar", sample(0))
        assert karat_here("index", str(tmp_path / split)) == 0
        finished.join(tmp_path / split, tmp_path / "out")
    finished.verify(["--src", str(tmp_path / "out")])


def test_tars_of_one_name_are_not_joined(tmp_path):
    for split in ("train", "val"):
        write_tar(tmp_path / split / "0.tar", sample("tv".index(split[0])))
        assert karat_here("index", str(tmp_path / split), "--split", f"{split}=*.tar") == 0
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    with pytest.raises(DataError, match=r"train/0\.tar is there already; use another --out, or rename"):
        finished.join(tmp_path / "val", tmp_path / "train")
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_own_and_indexed_splits_of_one_data_set_are_verified(shards, tmp_path, capsys):
    record = read_dataset_record(shards)
    write_tar(tmp_path / "val" / "v.tar", [("a.jpg", jpeg(1)), ("a.cls", b"1")])
    (tmp_path / "classes.txt").write_text("\n".join(record.classes))
    classes = ("--classes", str(tmp_path / "classes.txt"))
    assert karat_here("index", str(tmp_path / "val"), "--split", "other=*.tar", *classes) == 0
    finished.join(tmp_path / "val", shards)
    check(shards)
    assert "other: right: 1 sample of 3 classes in 1 shard\n" in capsys.readouterr().out


def test_a_damaged_tar_without_a_hash_hides_no_other_problem(tmp_path, capsys):
    for number in range(2):
        write_tar(tmp_path / f"train-{number}.tar", sample(number))
    assert karat_here("index", str(tmp_path)) == 0
    for number in range(2):
        flip(tmp_path / f"train-{number}.tar", 3)  # the checksum of a header
    with pytest.raises(DataError, match="2 problems in total"):
        check(tmp_path)
    assert capsys.readouterr().out.count("problem: ") == 2


def test_a_copy_never_takes_the_place_of_tars_that_were_indexed_where_they_are(tmp_path):
    for name in ("theirs", "source"):
        write_tar(tmp_path / name / "train-0.tar", sample(name == "source"))
        assert karat_here("index", str(tmp_path / name)) == 0
    for _ in range(2):  # a copy may be made again, also one of a version that did not mark copies
        finished.stage(["--src", str(tmp_path / "source"), "--out", str(tmp_path / "copy")])
        (tmp_path / "copy/.staged").unlink()
    before = (tmp_path / "theirs/train-0.tar").read_bytes()
    (tmp_path / "theirs/dataset.json").unlink()
    for place in ("theirs", "unindexed"):
        write_tar(tmp_path / "unindexed/train-0.tar", sample(False))
        with pytest.raises(DataError, match="has files of these names that are not copies; use another directory"):
            finished.stage(["--src", str(tmp_path / "source"), "--out", str(tmp_path / place)])
        assert (tmp_path / place / "train-0.tar").read_bytes() == before


def test_a_copy_beside_the_tars_that_were_indexed_from_elsewhere_is_refused(tmp_path):
    """Before the fix, all tars were removed, as copies without an index, and then could not be copied."""
    write_tar(tmp_path / "tars/train-0.tar", sample(0))
    before = (tmp_path / "tars/train-0.tar").read_bytes()
    assert karat_here("index", str(tmp_path / "tars"), "--out", str(tmp_path / "index")) == 0
    with pytest.raises(DataError, match="has the tars of --src itself; use a directory on the local disk"):
        finished.stage(["--src", str(tmp_path / "index"), "--out", str(tmp_path / "tars")])
    assert (tmp_path / "tars/train-0.tar").read_bytes() == before


def test_tars_of_others_stay_where_karat_index_was_cut_off(tmp_path, image_folder):
    """Before the fix, a tar with an index counted as made by the script, and was removed."""
    write_tar(tmp_path / "train-000000.tar", sample(0))
    before = (tmp_path / "train-000000.tar").read_bytes()
    assert karat_here("index", str(tmp_path)) == 0
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(DataError, match="has tars that others made, and karat index has indexed; use another --out"):
        make_webdataset.main(["--src", str(image_folder), "--out", str(tmp_path)])
    assert (tmp_path / "train-000000.tar").read_bytes() == before


def test_the_fingerprint_of_indexed_tars_is_also_that_of_their_labels(tmp_path):
    """Before the fix, a beton with the labels of an earlier index was called complete and correct."""
    members = [("a.cls", b"1"), ("a.jpg", jpeg(1)), ("a.txt", b"dog"), ("b.cls", b"0"), ("b.jpg", jpeg(2))]
    write_tar(tmp_path / "train-0.tar", [*members, ("b.txt", b"dog")])
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    found = []
    names = ("--classes", str(tmp_path / "classes.txt"))
    for rule in (["cls"], ["txt", *names], ["cls", *names]):
        assert karat_here("index", str(tmp_path), "--label", *rule) == 0
        record = read_dataset_record(tmp_path)
        found += [ShardSource(tmp_path, "train", record).fingerprint() for _ in range(2)]
    assert found[::2] == found[1::2]
    assert len(set(found)) == 3


def test_dalis_index_leaves_out_hidden_files_and_those_without_a_suffix(tmp_path):
    others = [("._a.jpg", b"x"), ("README", b"x")]
    write_tar(tmp_path / "train-0.tar", [("a.jpg", jpeg(1)), ("a.cls", b"1"), *others])
    lines = finished.dali_index(tmp_path / "train-0.tar").splitlines()
    assert lines[0] == "v1.2 1"
    assert [part.partition(" ")[0] for part in lines[1:]] == ["jpg"]


def test_a_directory_without_a_record_is_named_by_its_option(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=rf"^--src = {tmp_path} has no dataset.json; make it with") as error:
        check(tmp_path)
    assert "data.backend" not in str(error.value)


def test_usage_names_the_command_that_was_typed() -> None:
    assert karat_done("prepare", "verify", "--help").stdout.startswith("usage: karat prepare verify ")
    assert run_script("data_prep/verify.py", "--help").stdout.startswith("usage: verify.py ")
