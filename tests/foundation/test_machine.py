"""Tests of a machine's limits, its caches, its GPUs, and the versions that a run records."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch

from karat_scale.commands import cli
from karat_scale.commands.parsers import preparing
from karat_scale.engine.engine import slow_precision
from karat_scale.foundation.errors import UserError
from karat_scale.foundation.machine import (
    cpu_quota,
    gpu_faults,
    is_local,
    known_gpu,
    may_have_gpu,
    memory_limit,
    use_local_caches,
)
from tests.conftest import output_of
from tests.nvml import nvml_environment


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


@pytest.fixture
def membership(tmp_path) -> Path:
    return tmp_path / "membership"


def test_the_tightest_group_of_version_2_counts(tmp_path, membership) -> None:
    membership.write_text("0::/job/step/task\n")
    write(tmp_path, job__cpuDOTmax="150000 100000", job__step__cpuDOTmax="400000 100000")
    write(tmp_path, job__step__task__cpuDOTmax="max 100000", job__step__task__memoryDOTmax="2097152")
    write(tmp_path, job__memoryDOTmax="max", job__step__memoryDOTmax="1048576")
    assert cpu_quota(tmp_path, membership) == 1.5
    assert memory_limit(tmp_path, membership) == 1 << 20


def test_version_1_has_a_directory_per_controller(tmp_path, membership) -> None:
    membership.write_text("4:memory:/job\n1:cpu,cpuacct:/\n0::/\n")
    write(tmp_path, cpu__cpuDOTcfs_quota_us="50000", cpu__cpuDOTcfs_period_us="100000")
    write(tmp_path, memory__memoryDOTlimit_in_bytes=str(2**63 - 4096), memory__job__memoryDOTlimit_in_bytes="4096")
    assert cpu_quota(tmp_path, membership) == 0.5
    assert memory_limit(tmp_path, membership) == 4096


def test_no_limit_is_none(tmp_path, membership) -> None:
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


def test_bf16_is_advised_against_where_the_processor_has_no_instructions(monkeypatch) -> None:
    cpu = torch.device("cpu")
    for flags in ({"avx2"}, {"avx512_bf16"}, set()):
        monkeypatch.setattr("karat_scale.foundation.machine.cpu_flags", lambda flags=flags: flags)
        assert bool(slow_precision("bf16", cpu)) == (flags == {"avx2"})
        assert not slow_precision("fp32", cpu)
        assert not slow_precision("bf16", torch.device("cuda"))


BOTH = {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that mounts folders as given file systems and returns the resulting environment."""
    for folder in ("home", "tmp"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    (tmp_path / "mounts").write_text("")

    def environment(given: dict[str, str] | None = None, **kinds: str) -> dict[str, str]:
        lines = ["/dev/sda1 / ext4 rw 0 0"]
        lines += [f"server:/x {tmp_path / folder} {kind} rw 0 0" for folder, kind in kinds.items()]
        (tmp_path / "mounts").write_text("\n".join(lines) + "\n")
        environ = dict(given or {})
        use_local_caches(environ, tmp_path / "mounts")
        return environ

    return environment


def test_a_home_or_a_temporary_directory_on_the_network_is_left(machine, tmp_path) -> None:
    assert machine() == {}  # local defaults stay
    directory = tmp_path / "tmp" / f"karat-{os.getuid()}"
    for kind in ("nfs4", "lustre", "fuse.glusterfs"):
        assert machine(home=kind) == {"TRITON_CACHE_DIR": str(directory / "triton")}
    assert directory.stat().st_mode & 0o777 == 0o700
    found = machine(home="nfs", tmp="nfs")
    assert found.keys() == BOTH
    for value in found.values():
        assert value.startswith((f"/tmp/karat-{os.getuid()}/", f"/dev/shm/karat-{os.getuid()}/"))


def test_what_the_user_set_stays_and_tritons_own_home_counts(machine, tmp_path) -> None:
    given = dict.fromkeys(BOTH, "/scratch/mine")
    assert machine(given, home="nfs", tmp="nfs") == given
    given = {"TRITON_HOME": str(tmp_path / "tmp")}
    assert machine(given, home="nfs") == given


def test_a_home_that_cannot_be_written_and_what_others_can_write_are_left(machine, tmp_path):
    (tmp_path / "home" / ".triton").write_text("")
    assert machine().keys() == {"TRITON_CACHE_DIR"}
    (tmp_path / "home" / ".triton").unlink()
    directory = tmp_path / "tmp" / f"karat-{os.getuid()}"
    directory.mkdir(exist_ok=True)
    directory.chmod(0o777)
    assert not machine(home="nfs").get("TRITON_CACHE_DIR", "").startswith(str(directory))


def test_the_deepest_and_latest_mount_counts(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "s:/ / nfs rw 0 0\n/dev/b /disk\\0401 xfs rw 0 0\n/dev/c /later nfs rw 0 0\nx /later tmpfs rw 0 0\n"
    )
    found = {path: is_local(Path(path), mounts) for path in ("/a", "/disk 1/b", "/disk 11", "/later/c")}
    assert found == {"/a": False, "/disk 1/b": True, "/disk 11": False, "/later/c": True}
    assert is_local(Path("/a"), tmp_path / "none")


def test_a_home_that_may_not_be_searched_is_left(machine, monkeypatch) -> None:
    def forbidden(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", forbidden)
    assert machine() == {}


def test_every_command_sets_them_before_it_imports_anything(monkeypatch):
    called = []
    monkeypatch.setattr(cli, "use_local_caches", lambda: called.append("caches"))
    monkeypatch.setattr(preparing, "_plan", lambda _: called.append("plan") or 0)
    assert cli.main(["plan", "imagenet_vit_tiny_g3b"]) == 0
    assert called == ["caches", "plan"]


PROGRAM = """
import errno, os, resource
from karat_scale.foundation.machine import library_versions

resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
try:
    while True:
        os.open(os.devnull, os.O_RDONLY)
except OSError:
    pass
try:
    library_versions()
except OSError as error:
    print(errno.errorcode[error.errno])
"""


def test_a_lack_of_descriptors_is_not_taken_for_a_missing_package() -> None:
    assert output_of(sys.executable, "-c", PROGRAM) == "EMFILE\n"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("ecc", "7 memory errors that ECC could not correct"),
        ("pending", "its memory needs a reset of the GPU to replace a row"),
        ("no row", "its memory has no row left to replace a bad one"),
        ("slowdown", "heat or a lack of power lowers its clock"),
        ("heat", "heat or a lack of power lowers its clock"),
        ("lanes", "8 of 16 PCIe lanes"),
        ("link", "3 of 4 NVLinks"),
        ("no links", None),  # such as GPUs without a bridge
        ("everything unknown", None),
        ("none", None),
    ],
)
def test_a_gpu_that_is_not_sound_is_named_with_its_node(tmp_path: Path, fault: str, said: str | None) -> None:
    program = "from karat_scale.foundation.machine import gpu_faults; print(*gpu_faults(), sep='\\n')"
    environment = os.environ | nvml_environment(tmp_path, fault) | {"SLURMD_NODENAME": "node7"}
    found = output_of(sys.executable, "-c", program, env=environment)
    assert found.strip() == (f"GPU 1 on node7: {said}" if said else "")


@pytest.mark.skipif(may_have_gpu(), reason="there may be a driver with NVML")
def test_gpus_without_nvml_are_not_called_sound() -> None:
    assert gpu_faults() is None
