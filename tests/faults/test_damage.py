"""Damaged files of checkpoints, shards and runs are named in one line, skipped, or read as they were written."""

from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

from karat_scale.checkpoint.restore import choose_checkpoint
from karat_scale.checkpoint.store import CheckpointStore
from karat_scale.commands.status.status import read_standing
from karat_scale.data.shards.shard_format import DatasetRecord, write_dataset_record
from karat_scale.data.shards.shards import ShardSplit
from karat_scale.engine.reporting.progress import PlainDisplay, Reporter, read_events
from karat_scale.foundation.errors import DataError, RunDirectoryError, UserError
from karat_scale.models.transfer import weights_digest
from karat_scale.training.run_directory import RunDirectory
from karat_scale.training.weights_file import load_exported, read_exported
from tests.conftest import karat_done
from tests.data.conftest import CLASSES, sample, write_split
from tests.faults.damage import try_damages
from tests.faults.runs import tiny_recipe

COUNTS = 40, 2000


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a finished run with two checkpoints, snapshots and an exported file of weights."""
    directory = tmp_path_factory.mktemp("run")
    recipe = tiny_recipe(directory, "0")
    for arguments in (
        ["train", str(recipe), f"run.dir={directory / 'run'}"],
        ["export", str(directory / "run"), "--weights", "raw"],
    ):
        karat_done(*arguments)
    return directory / "run"


def one_line(error: UserError, *names: str) -> None:
    """Assert that the message is one line and names one of the files."""
    assert "\n" not in str(error)
    assert any(name in str(error) for name in names), str(error)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in directory.iterdir()}


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, share, tmp_path, capsys):
    whole = run / "checkpoints"
    names = CheckpointStore(whole).names()

    def look(root, damage):
        store = CheckpointStore(root)
        files = [path for name in names for path in sorted((root / name).iterdir())]
        harmed = damage.apply([*files, root / "latest", root / "best"])
        hurt = {name for name in names if contents(root / name) != contents(whole / name)}
        for name in names:
            said = store.damage(name)
            assert (said is not None) == (name in hurt), (harmed, said)
        try:
            found = choose_checkpoint(store, "", Reporter(PlainDisplay(), None))
        except RunDirectoryError as error:
            one_line(error, "checkpoints")
            assert hurt == set(names)
        else:
            assert found is not None
            assert contents(root / found[1]) == contents(whole / found[1])
        for wanted in ("latest", "best"):
            try:
                found_intact = store.find_intact(wanted)
            except RunDirectoryError as error:
                one_line(error, *names, str(root))
            else:
                assert found_intact not in hurt
        capsys.readouterr()

    try_damages(share, COUNTS, whole, tmp_path / "work", look)


@pytest.mark.parametrize("verify", ["size", "hash"])
def test_a_damaged_shard_is_named_or_gives_what_was_written(share, tmp_path, verify):
    whole = tmp_path / "whole"
    whole.mkdir()
    record = DatasetRecord(classes=CLASSES)
    record.splits["train"] = write_split(whole, "train", [sample(number) for number in range(20)])
    write_dataset_record(whole, record)
    expected = [
        (split.read(n), split.labels[n]) for split in [ShardSplit(whole, "train", 3)] for n in range(len(split))
    ]

    def look(directory, damage):
        harmed = damage.apply(sorted(directory.iterdir()))
        try:
            split = ShardSplit(directory, "train", 3, verify)
            assert len(split) == len(expected)
            for number, (data, label) in enumerate(expected):
                assert (split.read(number), split.labels[number]) == (data, label), harmed
            split.close()
        except DataError as error:
            one_line(error, str(directory))
            return
        train = harmed is not None and harmed.name.startswith("train")
        # The hash also finds damage in the padding and the headers of the tar.
        assert not train or verify == "size", harmed

    try_damages(share, COUNTS, whole, tmp_path / "work", look)


def test_a_damaged_log_is_read_as_far_as_it_goes(run, share, tmp_path):
    events, written = list(read_events(run / "metrics.jsonl")), (run / "metrics.jsonl").read_bytes()

    def look(directory, damage):
        damage.apply([directory / "metrics.jsonl", directory / "summary.json"])
        path = directory / "metrics.jsonl"
        found, log = list(read_events(path)), path.read_bytes() if path.is_file() else b""
        lines = zip(written.split(b"\n")[:-1], log.split(b"\n")[:-1], strict=False)
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], lines))
        assert found[:kept] == events[:kept]
        assert len(found) <= len(events) + 1
        read_standing(directory)

    whole = _small_files_of(run, tmp_path)
    try_damages(share, COUNTS, whole, tmp_path / "work", look)
    log = whole / "metrics.jsonl"
    log.write_text(log.read_text().replace('"step"', '"stfp"', 1))
    read_standing(whole)  # an event without its fields must not end it either


def test_a_damaged_file_of_a_run_is_one_line_or_what_it_was(run, share, tmp_path):
    def look(directory, damage):
        damage.apply([directory / name for name in ("recipe.yaml", "classes.json", "summary.json")])
        opened = RunDirectory(directory)
        for read in (opened.recipe, opened.classes, opened.summary):
            try:
                read()
            except UserError as error:
                one_line(error, str(directory))

    directory = _small_files_of(run, tmp_path)
    try_damages(share, COUNTS, directory, tmp_path / "work", look)
    for text in ('{"ant": 1}', "[1]"):
        (directory / "classes.json").write_text(text)
        with pytest.raises(RunDirectoryError, match="not a JSON list"):
            RunDirectory(directory).classes()
    for name in ("classes", "summary"):
        (directory / f"{name}.json").unlink()
        (directory / f"{name}.json").mkdir()
    with pytest.raises(RunDirectoryError, match="not a JSON list"):
        RunDirectory(directory).classes()
    assert RunDirectory(directory).summary() is None


def test_damaged_exported_weights_are_refused(run, share, tmp_path):
    (exported,) = run.glob("*.safetensors")
    model = read_exported(exported)
    whole = tmp_path / "whole"
    whole.mkdir()
    for path in (exported, *(run / "snapshots").iterdir()):
        (whole / path.name).write_bytes(path.read_bytes())
    # A snapshot under the export's name is also a complete file of a model's weights.
    digests = {weights_digest(read_exported(path)) for path in whole.iterdir()}

    def look(directory, damage):
        damage.apply([directory / exported.name, *sorted(directory.glob("step-*"))])
        try:
            found = weights_digest(read_exported(directory / exported.name))
            assert found in digests, damage
        except RunDirectoryError as error:
            one_line(error, exported.name)
        for path in directory.glob("step-*"):
            try:
                load_exported(model, path)  # their values have no hash
            except RunDirectoryError as error:
                one_line(error, path.name)

    try_damages(share, COUNTS, whole, tmp_path / "work", look)


def _small_files_of(run: Path, tmp_path: Path) -> Path:
    whole = tmp_path / "whole"
    whole.mkdir()
    for path in run.iterdir():
        if path.is_file() and path.stat().st_size < 100_000:
            (whole / path.name).write_bytes(path.read_bytes())
    return whole


@pytest.mark.slow
def test_a_damaged_beton_is_named_or_gives_what_was_written(image_folder, share, tmp_path):
    from karat_scale.data.shards.beton import BetonSplit
    from tests.data.betons import make_betons

    whole = make_betons(image_folder)
    split = BetonSplit(whole, "train", 4, "hash")
    expected = [(bytes(split.read(number)), int(split.labels[number])) for number in range(len(split))]

    def look(directory, damage):
        harmed = damage.apply(sorted(directory.glob("train.beton*")))
        try:
            found = BetonSplit(directory, "train", 4, "hash")
            read = [(bytes(found.read(number)), int(found.labels[number])) for number in range(len(found))]
        except DataError as error:
            one_line(error, str(directory))
            return
        assert read == expected, harmed
        assert np.array_equal(found.labels, split.labels)

    try_damages(share, COUNTS, whole, tmp_path / "work", look)
