"""Tests of a machine's errors, which are one line and an exit code, and of the names that are suggested."""

import errno
import io
import os
import resource
import sys
from pathlib import Path

import pytest

from karat_scale.commands.cli import main
from karat_scale.foundation import native_build
from karat_scale.foundation.errors import RunDirectoryError, nearest, not_written, of_the_machine
from tests.conftest import karat_command, run_to_end


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (OSError(24, "Too many open files"), "too few file descriptors; raise `ulimit -n`", 1),
        (RuntimeError("can't start new thread"), "no more processes or threads; raise `ulimit -u`", 1),
        (BlockingIOError(11, "Resource temporarily unavailable"), "no more processes or threads", 1),
        (MemoryError(), "out of memory", 1),
        (OSError(12, "Cannot allocate memory"), "out of memory", 1),
        (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), "out of GPU memory; end what", 2),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "out of GPU memory; end what", 2),
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied", 2),
        (OSError(36, "File name too long", "a" * 10_000), "a" * 200 + ": File name too long", 2),
        (
            RuntimeError("Could not determine home directory."),
            "a path begins with ~, but its home directory is not known; write it without ~",
            2,
        ),
    ],
)
def test_the_machines_errors_are_one_line(error, line, code) -> None:
    found = of_the_machine(error)
    assert found is not None
    assert line in found[0]
    assert found[1] == code
    outer = RuntimeError("outer")
    outer.__cause__ = error
    if code == 1:
        assert of_the_machine(outer) == found


def test_a_file_server_that_fails_while_a_file_is_written_is_not_the_users_mistake() -> None:
    passing = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    with pytest.raises(OSError, match="Stale file handle") as caught:
        raise not_written("run/metrics.jsonl", passing)
    assert of_the_machine(caught.value) == ("run/metrics.jsonl: Stale file handle", 1)
    full = not_written("run/metrics.jsonl", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert isinstance(full, RunDirectoryError)


def test_a_bug_keeps_its_traceback() -> None:
    for error in (RuntimeError("a bug"), ValueError("x"), BrokenPipeError(32, "Broken pipe"), KeyError(1)):
        assert of_the_machine(error) is None


def test_a_user_without_a_home_has_a_place_for_caches(monkeypatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert native_build.home().name == f"karat-home-{os.getuid()}"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_too_few_file_descriptors_are_one_line(tmp_path) -> None:
    own = ("data.backend=synthetic", f"run.dir={tmp_path / 'run'}", "train.max_steps=1", "data.workers=2")
    command = karat_command(["train", "fashion_mnist_demo", *own])
    done = run_to_end(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9)))
    assert done.returncode > 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "Too many open files" in done.stderr.splitlines()[-1]


def test_a_ranks_error_is_one_write_where_python_does_not_buffer(monkeypatch) -> None:
    """Ranks share standard error: a line's end that is written by itself could come after another rank's line."""
    reader, writer = os.pipe2(os.O_DIRECT)  # a packet for each write
    monkeypatch.setenv("RANK", "1")
    with os.fdopen(writer, "wb", 0) as raw, io.TextIOWrapper(raw, write_through=True) as unbuffered:
        monkeypatch.setattr(sys, "stderr", unbuffered)
        assert main(["eval", "no-such-run"]) == 2
    assert os.read(reader, 4096).endswith(b"\n")
    assert os.read(reader, 4096) == b""
    os.close(reader)


NAMES = ("gcvit_tiny", "vit_small_patch16_224", "vit_tiny_patch16_224", "vit_tiny_patch16_384", "swin_tiny")


def test_the_beginning_goes_before_the_whole_and_nothing_alike_is_none() -> None:
    for name, meant in {
        "vit_tinny": ["vit_tiny_patch16_224"],
        "vit_tny_patch16_384": ["vit_tiny_patch16_384"],
        "vit_smal": ["vit_small_patch16_224"],
        "gcvit_tinny": ["gcvit_tiny"],
        "resnet": [],
    }.items():
        assert nearest(name, NAMES) == meant
    assert nearest("vit_tiny", NAMES, count=2) == ["vit_tiny_patch16_224", "vit_tiny_patch16_384"]
