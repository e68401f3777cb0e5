import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

from karat_scale.data.prepare import make_ffcv, make_webdataset, making
from karat_scale.data.prepare.images import choose_encoder
from karat_scale.data.prepare.make_webdataset import main, make_split
from karat_scale.data.shards.shard_format import read_dataset_record
from karat_scale.foundation.errors import DataError, run_script
from tests.conftest import ROOT, wait_until
from tests.data.prepare.images import contents
from tests.data.prepare.making import make_shards, run, shard_samples
from tests.warm import run_code


def save(path: Path, seed: int) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path):
    """Write train/ and test/ of three classes; return the folder, and the bytes of each file by its split and key."""
    src = tmp_path / "src"
    files = {}
    for split, count in (("train", 7), ("test", 3)):
        for name in ("ant", "bee", "cat"):
            for number in range(count):
                path = src / split / name / f"img.{number}.JPEG"
                files[f"{split}/{name}/img_{number}"] = save(path, len(files))
    return src, files


def test_an_imagefolder_keeps_its_bytes_labels_and_keys_and_timms_own_reader_knows_the_splits(folder, tmp_path):
    src, files = folder
    record = make_shards(src, tmp_path / "out", "--shard-samples", "6", "--workers", "2")
    assert record.classes == ["ant", "bee", "cat"]
    assert {name: split.samples for name, split in record.splits.items()} == {"train": 21, "val": 9}
    assert [shard.samples for shard in record.splits["train"].shards] == [6, 5, 5, 5]
    for split, origin in (("train", "train"), ("val", "test")):
        found = shard_samples(tmp_path / "out", split)
        assert {f"{origin}/{key}": data for key, _, data in found} == {k: v for k, v in files.items() if origin in k}
        assert found != sorted(found)
        assert all(record.classes[label] == key.split("/")[0] for key, label, _ in found)
    for split, count in (("train", 21), ("val", 9)):
        found = create_dataset("wds/ants", root=str(tmp_path / "out"), split=split)
        assert len(found) == count
        labels = sorted(label for _, label in found)
        assert labels == sorted([0, 1, 2] * (count // 3))


def test_another_encoder_is_refused(folder, tmp_path):
    out, options = tmp_path / "out", ("--resize", "8", "--split", "val")
    assert make_shards(folder[0], out, *options, "--encoder", "pillow").splits["val"].made["encoder"] == "pillow"
    if choose_encoder("auto") == "native":
        with pytest.raises(DataError, match=r"made with encoder = pillow, now native; use another --out"):
            make_shards(folder[0], out, *options)


def test_without_a_compiler_pillow_encodes_and_native_is_an_error(tmp_path):
    code = "from karat_scale.data.prepare.images import choose_encoder as c; print(c('auto')); c('native')"
    environment = {"PATH": "/nowhere", "KARAT_CACHE_DIR": str(tmp_path)}
    done = run_code(code, environments=[environment], directory=ROOT)
    assert done.stdout.strip() == "pillow"
    assert "--encoder native cannot run" in done.stderr


def test_a_second_split_joins_the_first(folder, tmp_path, capsys):
    out = tmp_path / "out"
    make_shards(folder[0] / "train", out)
    make_shards(folder[0], out, "--split", "val")
    splits = make_shards(folder[0], out, "--split", "test").splits
    assert {name: split.samples for name, split in splits.items()} == {"train": 21, "val": 9, "test": 9}
    assert capsys.readouterr().out.count("src: its split test becomes val") == 1
    save(folder[0] / "val/dog/0.jpg", 1)
    with pytest.raises(DataError, match="the split val has the class 'dog', which train does not have; remove it"):
        make_shards(folder[0], out, "--split", "val")
    with pytest.raises(DataError, match="has the class 'dog', which the shards in --out do not"):
        make_shards(folder[0] / "val", out, "--split", "val")


def test_two_runs_at_a_time_for_one_output_lose_no_split(folder, tmp_path, monkeypatch):
    def other_ends_first(job, workers):
        made = make_split(job, workers)
        monkeypatch.undo()
        make_shards(folder[0], job.out, "--split", "val")
        return made

    monkeypatch.setattr(make_webdataset, "make_split", other_ends_first)
    assert make_shards(folder[0], tmp_path / "out", "--split", "train").splits.keys() == {"train", "val"}


@pytest.mark.parametrize("script", [make_webdataset, make_ffcv])
def test_a_run_that_comes_late_keeps_what_another_made_meanwhile(script, folder, tmp_path, monkeypatch, capsys):
    if script is make_ffcv:
        pytest.importorskip("ffcv")
    out, settle = tmp_path / "out", making.settle
    before: dict[str, bytes] = {}

    def other_ends_first(*arguments):
        monkeypatch.undo()
        run(script, folder[0], out)
        before.update(contents(out, "*"))
        settle(*arguments)

    monkeypatch.setattr(making, "settle", other_ends_first)
    run(script, folder[0], out)
    assert contents(out, "*") == before
    assert "train: 21 samples in 1 shard are complete and correct" in capsys.readouterr().out or script is make_ffcv
    with pytest.raises(DataError, match="seed = 0, now 5"):
        run(script, folder[0], out, "--seed", "5")


def test_a_split_of_other_classes_does_not_join_one_that_was_made_meanwhile(folder, tmp_path, monkeypatch):
    out, settle = tmp_path / "out", making.settle
    for split in ("train", "test"):
        shutil.copytree(folder[0] / split / "ant", tmp_path / "other" / split / "wasp")

    def other_ends_first(*arguments):
        monkeypatch.undo()
        make_shards(folder[0], out, "--split", "train")
        settle(*arguments)

    monkeypatch.setattr(making, "settle", other_ends_first)
    with pytest.raises(DataError, match="has shards of other classes by now"):
        make_shards(tmp_path / "other", out, "--split", "val")


@pytest.mark.parametrize("made", [False, True])
def test_who_comes_second_waits_for_the_first(made, tmp_path, capsys):
    order, place = [], tmp_path / "place"
    place.mkdir()

    def second():
        with making.alone_in(place, made):
            order.append("second")

    with making.alone_in(place, made):
        thread = threading.Thread(target=second)
        thread.start()
        wait_until(lambda: f"another run that writes {tmp_path if made else place}" in capsys.readouterr().out)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert place.exists() is not made
    with making.alone_in(place, made=True):
        place.rmdir()  # by another process, on a file system without locks


def test_a_source_whose_name_is_no_utf8_is_recorded(folder, tmp_path):
    src = folder[0].rename(tmp_path / "s\udce9rie")
    assert make_shards(src, tmp_path / "out", "--split", "val").splits["val"].made["source"] == "s\\xe9rie"


def test_unusable_files_are_listed_and_the_rest_is_made(folder, tmp_path, capsys):
    src = folder[0] / "train"
    (src / "ant/empty.jpg").touch()
    (src / "bee/text.jpg").write_text("no image")
    (src / "cat/notes.txt").write_text("notes")
    record = make_shards(src, tmp_path / "out").splits["train"]
    assert record.samples == 21
    assert [(item.path, item.reason) for item in record.skipped] == [
        ("ant/empty.jpg", "the file is empty"),
        ("bee/text.jpg", "not an image in a supported format"),
        ("cat/notes.txt", "the name has no image suffix"),
    ]
    assert "3 skipped" in capsys.readouterr().out


def test_keys_are_unique_short_and_endings_follow_the_content(tmp_path):
    src = tmp_path / "src"
    save(src / "a/x.jpg", 0)
    save(src / "a/x.png", 1)
    save(src / "a/x.1.png", 2)
    save(src / "a" / f"{'long' * 40}.png", 3)
    (src / "a/named.jpg").write_bytes((src / "a/x.png").read_bytes())
    make_shards(src, tmp_path / "out")
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        names = tar.getnames()
    images = [name for name in names if not name.endswith(".cls")]
    assert {"a/x.jpg", "a/x_1.png", "a/named.png"} <= set(images)
    assert len({name.rpartition(".")[0] for name in images}) == 5
    assert names[0::2] == [f"{name.rpartition('.')[0]}.cls" for name in images]


def test_shards_by_bytes_and_the_leftovers_of_an_unfinished_run_which_go(folder, tmp_path):
    total = sum(len(data) for key, data in folder[1].items() if key.startswith("train"))
    made = make_shards(folder[0], tmp_path / "out", "--split", "train", "--shard-bytes", str(total // 3))
    shards = made.splits["train"].shards
    assert len(shards) == 3
    assert all(6 <= shard.samples <= 8 for shard in shards)
    out = tmp_path / "out"
    (out / "dataset.json").unlink()
    (out / ".train-000000.tar.abc").touch()
    make_shards(folder[0], out, "--split", "train", "--shard-samples", "11")
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-000000.tar", "train-000001.tar"]
    assert not (out / ".train-000000.tar.abc").exists()


def test_a_kill_among_the_removal_of_leftovers_blocks_no_later_run(folder, tmp_path, monkeypatch):
    out, options = tmp_path / "out", ("--split", "train", "--shard-samples")
    make_shards(folder[0], out, *options, "6")
    (out / "dataset.json").unlink()
    remove = Path.unlink

    def remove_and_die(path, missing_ok=False):
        remove(path, missing_ok)
        if path.name.startswith("train-"):
            raise KeyboardInterrupt

    for _ in range(3):
        monkeypatch.setattr(Path, "unlink", remove_and_die)
        with pytest.raises(KeyboardInterrupt):
            make_shards(folder[0], out, *options, "11")
        monkeypatch.undo()
    assert make_shards(folder[0], out, *options, "11").splits["train"].samples == 21


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_names_the_file_and_the_fix(folder, small_disk, capsys, workers):
    filler, out = small_disk / "filler", small_disk / "out"
    options = ["--src", str(folder[0]), "--out", str(out), "--shard-samples", "11", "--workers", workers]
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 12_000))
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: main(options))
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {out}/train-00000")
    assert line.endswith(": No space left on device; free space there and run the same command again")
    filler.unlink()
    main(options)
    assert read_dataset_record(out).splits["train"].samples == 21
