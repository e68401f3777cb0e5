"""Tests of what make_webdataset.py and make_ffcv.py share: equal bytes, checks of existing files, one-line errors."""

import sys

import pytest

from karat_scale.data.prepare import finished, make_ffcv, make_webdataset
from karat_scale.foundation.errors import DataError, run_script
from tests.conftest import ROOT, output_of, run_to_end
from tests.data.backends.helpers import flip
from tests.data.betons import need_ffcv
from tests.data.prepare.conftest import SCRIPTS
from tests.data.prepare.images import WNIDS, contents, jpeg, write
from tests.data.prepare.making import run

FILES = {"shards": ("train-000001.tar", "val-000000.index.npz"), "betons": ("train.beton", "val.beton.index.npz")}
RIGHT = {"shards": "train: 18 samples in 3 shards", "betons": "train: 18 samples in train.beton"}


@pytest.fixture(params=["shards", "betons"])
def kind(request):
    if request.param == "betons":
        need_ffcv()
    return request.param


def make(kind, src, out, *options):
    script, size = (make_webdataset, ("--shard-samples", "6")) if kind == "shards" else (make_ffcv, ())
    run(script, src, out, *size, *options)


def test_the_same_source_gives_the_same_bytes_whatever_the_workers(kind, folder, tmp_path):
    for name, options in {"one": (), "two": ("--workers", "3"), "other": ("--seed", "1")}.items():
        make(kind, folder, tmp_path / name, *options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    first = {"shards": "train-000000.tar", "betons": "train.beton"}[kind]
    assert contents(tmp_path / "one")[first] != contents(tmp_path / "other")[first]


def test_running_again_verifies_and_fixes(kind, folder, tmp_path, capsys):
    out, (damaged, lost) = tmp_path / "out", FILES[kind]
    make(kind, folder, out)
    before = contents(out)
    capsys.readouterr()
    make(kind, folder, out)
    assert f"{RIGHT[kind]} are complete and correct" in capsys.readouterr().out
    assert contents(out) == before
    flip(out / damaged, -1000)
    (out / lost).unlink()
    make(kind, folder, out)
    said = capsys.readouterr().out
    assert f"{damaged} has changed since it was written: its SHA-256 differs; making it again" in said
    assert f"{lost} is missing" in said
    assert contents(out) == before


def test_other_settings_or_another_source_are_refused(kind, folder, tmp_path):
    out = tmp_path / "out"
    make(kind, folder, out)
    with pytest.raises(DataError, match=r"made with seed = 0, now 3; use another --out"):
        make(kind, folder, out, "--seed", "3")
    write(folder / "train" / WNIDS[0] / "new.jpg", jpeg(77))
    said = r"made with source_sha256 = \w{12}, now \w{12}, since --src has other images; use another --out"
    with pytest.raises(DataError, match=said):
        make(kind, folder, out)


def test_an_output_that_is_the_source_and_an_empty_source_are_refused(kind, folder, tmp_path):
    before = sorted(folder.rglob("*"))
    with pytest.raises(DataError, match=rf"^--out {folder} is also --src; use another directory$"):
        make(kind, folder, folder)
    assert sorted(folder.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"^--src {tmp_path}/empty is empty; correct the path$"):
        make(kind, tmp_path / "empty", tmp_path / "out")


def test_a_dry_run_writes_nothing_and_a_file_of_unknown_origin_stays(kind, folder, tmp_path, capsys):
    make(kind, folder, tmp_path / "out", "--dry-run")
    assert "train: 18 images of 3 classes" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    file = tmp_path / "out" / {"shards": "train-000000.tar", "betons": "train.beton"}[kind]
    write(file, b"precious")
    with pytest.raises(DataError, match=rf"{file} exists and was not (made|finished) by this script"):
        make(kind, folder, tmp_path / "out")
    assert file.read_bytes() == b"precious"


MISTAKES = {
    "--synsets nofile": r"--synsets nofile: the file does not exist",
    "--val-labels nofile": r"--val-labels nofile: the file does not exist",
    "--names nofile --dry-run": r"--names nofile: the file does not exist",
    f"--val-labels {__file__}": r"--val-labels has no effect on folders of image files, as in .*; remove it",
    "--encoding jpeg": r"--encoding has no effect on folders of image files",
    "--any-hash": r"--any-hash has no effect on folders of image files",
    "--split ../x": "is not a name",
    "--split extra": "has no split 'extra'; it has train, val",
    "--val-fraction 1": r"^--val-fraction 1.0 is not between 0 and 1$",
    "--val-fraction nan": r"^--val-fraction nan is not between 0 and 1$",
    "--val-count 3 --split train": r"remove --split, or give that split's folder as --src$",
    "--src SRC/train --val-fraction 0.01": r"^--val-fraction 0.01 is 0 of 18 images; choose a fraction that makes 1",
    "--src SRC/train --val-count 16": r"^--val-count 16 is 16 of 18 images; choose 1 to 15",
    "--src SRC/nowhere": r"--src .*/nowhere is not a directory, a tar or a Parquet file",
    "--src https://a.test/b": "--src https://a.test/b is a URL; for tars there use karat index, else download it first",
    "--src SRC/bare": "bare is empty; correct the path",
    "--src SRC/empty": "has no images in its class folders; put them there, or correct --src",
    "--src SRC/text/ant/a.jpg": r"a.jpg is not a tar, or damaged from its first byte; name another file",
    "--src SRC/text": r"no image of split train is usable; first: ant/a.jpg",
}
OF_SHARDS = {
    "--encoder pillow": r"--encoder pillow needs --resize",
    "--quality 80": "--quality 80 needs --resize",
}
OF_BETONS = {
    "--write-mode smart": "smart needs --smart-threshold BYTES",
    "--smart-threshold 9": "--smart-threshold needs --write-mode smart",
    "--compress-probability 0.5": "--compress-probability needs --write-mode proportion",
    "--write-mode proportion --compress-probability 2": "not between 0 and 1",
    "--quality 101": "more than 100",
}


def test_each_mistake_is_one_line_and_no_data_set(kind, folder, tmp_path):
    (folder / "bare").mkdir()
    (folder / "empty/ant").mkdir(parents=True)
    write(folder / "text/ant/a.jpg", b"text")
    for options, message in (MISTAKES | {"shards": OF_SHARDS, "betons": OF_BETONS}[kind]).items():
        with pytest.raises(DataError, match=message) as caught:
            make(kind, folder, tmp_path / "out", *options.replace("SRC", str(folder)).split())
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "out").glob("[!.]*.json"))


def test_a_mistake_ends_the_script_with_one_line(tmp_path, capsys):
    for options in (("--src", "nowhere"), ("--src", ".", "--workers", "0"), ()):
        with pytest.raises(SystemExit, match="2"):
            run_script(lambda options=options: make_webdataset.main([*options, "--out", str(tmp_path / "out")]))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
    for script in (make_webdataset.main, finished.join_splits):
        with pytest.raises(SystemExit, match="2"):
            run_script(lambda script=script: script(["--src", ".", "--out", __file__]))
        assert "test_scripts.py is a file; name a directory" in capsys.readouterr().err


def test_folders_are_read_without_torch(folder, tmp_path):
    """A source of folders, right or wrong, does not wait for torch, whose import takes seconds."""
    write(tmp_path / "flat/1.jpg", jpeg(1))
    (tmp_path / "bare/ant").mkdir(parents=True)
    code = (
        "import sys\nfrom karat_scale.data.prepare import make_webdataset\n"
        "for src in sys.argv[1:]:\n"
        "    try: make_webdataset.main(['--src', src, '--out', 'out', '--workers', '1'])\n"
        "    except Exception as error: print(error)\n"
        "    assert 'torch' not in sys.modules, src\n"
    )
    out = output_of(sys.executable, "-c", code, "flat", "bare", folder, cwd=tmp_path)
    flat, bare = out.splitlines()[:2]
    assert flat == "flat has no class folders; expected flat/<class>/<image>"
    assert bare == "bare has no images in its class folders; put them there, or correct --src"
    assert (tmp_path / "out/dataset.json").exists()


@pytest.mark.slow
def test_the_script_ends_as_promised(kind, folder, tmp_path):
    script = {"shards": "make_webdataset.py", "betons": "make_ffcv.py"}[kind]
    for src, code, said in ((folder, 0, "train: writing: 18 of 18 images"), ("nowhere", 2, "")):
        command = (sys.executable, SCRIPTS / script, "--src", src, "--out", tmp_path / "out")
        done = run_to_end(*command, env={"PYTHONPATH": str(ROOT), "PATH": ""})
        assert (done.returncode, said in done.stdout) == (code, True)
        refusal = "error: --src nowhere is not a directory, a tar or a Parquet file; correct the path\n"
        assert done.stderr == (refusal if code else "")
