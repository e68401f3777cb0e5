import os
from pathlib import Path

import pytest

from karat_scale.commands import cli
from karat_scale.commands.parsers import preparing
from karat_scale.foundation.machine import is_local, use_local_caches

BOTH = {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that says which folders are mounted how, and tells what the environment becomes."""
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


def test_local_defaults_stay(machine):
    assert machine() == {}


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.glusterfs"])
def test_a_home_on_the_network_is_left(machine, tmp_path, kind):
    directory = tmp_path / "tmp" / f"karat-{os.getuid()}"
    assert machine(home=kind) == {"TRITON_CACHE_DIR": str(directory / "triton")}
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_temporary_directory_on_the_network_is_left_too(machine, tmp_path):
    found = machine(home="nfs", tmp="nfs")
    assert found.keys() == BOTH
    assert all(
        value.startswith((f"/tmp/karat-{os.getuid()}/", f"/dev/shm/karat-{os.getuid()}/")) for value in found.values()
    )


def test_what_the_user_set_stays(machine):
    given = dict.fromkeys(BOTH, "/scratch/mine")
    assert machine(given, home="nfs", tmp="nfs") == given


def test_tritons_own_home_counts(machine, tmp_path):
    assert machine({"TRITON_HOME": str(tmp_path / "tmp")}, home="nfs") == {"TRITON_HOME": str(tmp_path / "tmp")}


def test_a_home_that_cannot_be_written_is_left(machine, tmp_path):
    (tmp_path / "home" / ".triton").write_text("")
    assert machine().keys() == {"TRITON_CACHE_DIR"}


def test_a_directory_that_others_can_write_is_not_trusted(machine, tmp_path):
    directory = tmp_path / "tmp" / f"karat-{os.getuid()}"
    directory.mkdir()
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


def test_every_command_sets_them_before_it_imports_anything(monkeypatch):
    called = []
    monkeypatch.setattr(cli, "use_local_caches", lambda: called.append("caches"))
    monkeypatch.setattr(preparing, "_plan", lambda _: called.append("plan") or 0)
    assert cli.main(["plan", "imagenet_vit_tiny_g3b"]) == 0
    assert called == ["caches", "plan"]
