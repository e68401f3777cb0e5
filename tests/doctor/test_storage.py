import os
from pathlib import Path

import pytest

from karat_scale.doctor.storage import measure_storage


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


def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        measure_storage([tmp_path / "gone"], block=1000, readers=1, seconds=0.1)
