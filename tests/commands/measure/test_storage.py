import os
from pathlib import Path

import pytest

from karat_scale.commands.measure.loading import _random_spans, _sequential_spans, measure_storage


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.bin" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(os.urandom((number + 1) << 20))
        with path.open("rb") as file:  # what is not on the disk yet cannot be given up
            os.fsync(file.fileno())
    return paths


@pytest.mark.parametrize("readers", [1, 3])
def test_real_bytes_are_read_past_the_page_cache(files: list[Path], readers: int) -> None:
    speed = measure_storage(files, block=50_000, readers=readers, seconds=0.3)
    assert min(speed.sequential, speed.random, speed.random_again) > 0
    assert speed.readers == readers
    if speed.state != "unknown":
        assert (speed.cached_share or 0) > 0  # just written
    assert speed.state in ("cold", "warm", "unknown")


def test_files_smaller_than_a_block_or_a_page_are_read_too(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(b"x" * 100)
    assert measure_storage([small], block=1000, readers=2, seconds=0.1).random > 0


def test_nothing_is_read_twice_and_each_rank_reads_other_places(files: list[Path]) -> None:
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    try:
        whole = _random_spans(descriptors, block=3 << 20, rank=0)  # as a folder's files, an image each
        assert sorted(descriptor for descriptor, _, _ in whole) == descriptors
        first, second = (_random_spans(descriptors, block=50_000, rank=rank) for rank in (0, 1))
        assert len(first) == len(second) == 20 + 41 + 62
        assert first != second
        assert sorted(_sequential_spans(descriptors, 1)) == sorted(_sequential_spans(descriptors, 0))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        measure_storage([tmp_path / "gone"], block=1000, readers=1, seconds=0.1)
