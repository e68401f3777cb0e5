from pathlib import Path

import pytest
import torch

from karat_scale.engine.engine import slow_precision
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.machine import cpu_quota, known_gpu, memory_limit


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    return tmp_path / "membership"


def test_the_tightest_group_of_version_2_counts(tmp_path: Path, membership: Path) -> None:
    membership.write_text("0::/job/step\n")
    write(tmp_path, job__cpuDOTmax="150000 100000", job__step__cpuDOTmax="max 100000")
    write(tmp_path, job__memoryDOTmax="max", job__step__memoryDOTmax="1048576")
    assert cpu_quota(tmp_path, membership) == 1.5
    assert memory_limit(tmp_path, membership) == 1 << 20


def test_version_1_has_a_directory_per_controller(tmp_path: Path, membership: Path) -> None:
    membership.write_text("4:memory:/job\n1:cpu,cpuacct:/\n0::/\n")
    write(tmp_path, cpu__cpuDOTcfs_quota_us="50000", cpu__cpuDOTcfs_period_us="100000")
    write(tmp_path, memory__memoryDOTlimit_in_bytes=str(2**63 - 4096), memory__job__memoryDOTlimit_in_bytes="4096")
    assert cpu_quota(tmp_path, membership) == 0.5
    assert memory_limit(tmp_path, membership) == 4096


def test_no_limit_is_none(tmp_path: Path, membership: Path) -> None:
    assert (cpu_quota(tmp_path, membership), memory_limit(tmp_path, membership)) == (None, None)
    membership.write_text("3:cpu:/\n4:memory:/\n")
    write(tmp_path, cpu__cpuDOTcfs_quota_us="-1", cpu__cpuDOTcfs_period_us="100000")
    write(tmp_path, memory__memoryDOTlimit_in_bytes=str(2**63 - 4096))
    assert (cpu_quota(tmp_path, membership), memory_limit(tmp_path, membership)) == (None, None)


def test_a_gpu_is_found_by_the_beginning_of_its_name_if_only_one_has_it() -> None:
    assert known_gpu("rtx4090").key == "rtx4090-24"
    assert known_gpu("h100").key == "h100-80"
    with pytest.raises(UserError, match="did you mean v100-32 or v100-16"):
        known_gpu("v100")
    with pytest.raises(
        UserError, match=r"did you mean rtx3090-24 .*For any other card, use karat plan RECIPE --memory GB"
    ):
        known_gpu("rtx3060")


@pytest.mark.parametrize("flags", [{"avx2"}, {"avx512_bf16"}, set()])
def test_bf16_is_advised_against_where_the_processor_has_no_instructions(
    flags: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("karat_scale.foundation.machine.cpu_flags", lambda: flags)
    cpu = torch.device("cpu")
    assert bool(slow_precision("bf16", cpu)) == (flags == {"avx2"})
    assert not slow_precision("fp32", cpu)
    assert not slow_precision("bf16", torch.device("cuda"))
