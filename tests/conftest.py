"""Real parts that many tests share: shards made by data_prep, and `karat` as a user starts it.

Which tests run (tests/selection.py):

- `pytest` runs all tests except those marked `slow` (more than about five seconds, or one of many alike) or `night`
  (many minutes). What the README promises first, ImageNet in three steps and resume, is not marked slow, however long
  it takes.
- `pytest --slow=all` runs every test.
- `pytest --turn=N` runs only a twelfth of the slow tests: those whose hashed name, or `turn`, is N modulo 12. So twelve
  turns in a row run each slow test once. `.ci/run` takes the number of the CI run for N. Night tests do not fit into
  CI's 40 minutes: they run only by `--slow=all`, or by name.
"""

import errno
import fcntl
import gc
import io
import itertools
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings
from PIL import Image

from tests.selection import pytest_addoption, pytest_collection_modifyitems, pytest_xdist_make_scheduler
from tests.warm import run_program

__all__ = ["pytest_addoption", "pytest_collection_modifyitems", "pytest_xdist_make_scheduler"]

# Before torch is imported. Threads of several test processes on few cores spend their time waiting for each other.
os.environ["OMP_NUM_THREADS"] = "1"

# The same cases in each run, however slow the machine is.
settings.register_profile("karat", deadline=None, derandomize=True)
settings.load_profile("karat")

# Under nohup SIGHUP is ignored, which the processes that tests start would inherit.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def nothing_blocked() -> Iterator[None]:
    """Unblock SIGUSR2, which a run in the tests' own process blocks, before and after each test.

    Otherwise the processes that tests and fixtures start would inherit the block. Jobs of a SLURM that a fixture of the
    session starts would then never receive the signal.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})


ROOT = Path(__file__).resolve().parent.parent
CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS, SIZE = 4, 16, 7, 20

# A model and schedule that train in a second; a test's own overrides come after these.
SMALL = (
    "model.name=vit_mini_patch4_28",
    "model.image_size=16",
    "model.patch_size=4",
    "model.embed_dim=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.num_classes=4",
    "attention.grid=2",
    "attention.rank=4",
    "data.workers=1",
    "augment.mix_prob=1.0",
    "augment.label_smoothing=0.1",
    "augment.scale=[0.5, 1.0]",
    "train.global_batch=8",
    "train.epochs=2",
    "train.eval_batch=8",
    "train.ema_decay=0.9",
    "log.every_steps=1",
    "log.trackers=[]",
)


def make_image_folder(root: Path, per_class: dict[str, int], seed: int = 0) -> Path:
    """Write an ImageFolder of noisy JPEGs, where the brightness shows the class."""
    rng = np.random.default_rng(seed)
    for split, count in per_class.items():
        for label in range(CLASSES):
            directory = root / split / f"class{label}"
            directory.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 80, (SIZE, SIZE, 3)) + 40 * label
                Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{number:03d}.jpg", quality=95)
    return root


def run_script(script: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script of the project, as `python SCRIPT ...` does in the clone."""
    done = run_program(str(ROOT / script), arguments, [karat_environment()], timeout=300, directory=ROOT)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a directory that all test processes read: the first one makes it, and the others wait."""
    base = factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = directory.with_suffix(".done")
    with FileLock(directory.with_suffix(".lock")):
        if not done.exists():
            shutil.rmtree(directory, ignore_errors=True)  # of a process that failed
            directory.mkdir()
            make(directory)
            done.touch()
    return directory


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    per_class = {"train": TRAIN_PER_CLASS, "val": VAL_PER_CLASS}
    return made_once(tmp_path_factory, "images", lambda root: make_image_folder(root, per_class))


@pytest.fixture(scope="session")
def shards(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return tar shards of 64 training and 28 validation images."""

    def make(out: Path) -> None:
        source = ("--src", str(image_folder), "--out", str(out), "--shard-samples", "20")
        run_script("data_prep/make_webdataset.py", *source)

    return made_once(tmp_path_factory, "shards", make)


@pytest.fixture(scope="session")
def _leaves_at_the_end() -> Iterator[None]:
    from karat_scale.engine import distributed

    yield
    distributed.stop()


@pytest.fixture
def world(_leaves_at_the_end: None) -> Iterator[Any]:
    """Yield the world of this process alone, on the CPU. If a command in this process has left the group, join again.

    A stage 3 engine replaces `torch.nn.functional.linear`; the tests after this one get torch's own back.
    """
    from karat_scale.engine import distributed
    from karat_scale.engine.deepspeed_internals import use_torchs_own_linear

    yield distributed.start("cpu")
    use_torchs_own_linear()


def karat_environment() -> dict[str, str]:
    """Return this environment without a launcher's variables, and with one thread for each process.

    So sums always have the same order, and processes do not compete for cores.
    """
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("RANK", "LOCAL_", "WORLD_", "MASTER_"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def locks_of_nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse an exclusive lock on a file (not a folder) that is not open for writing, as NFS does (flock(2))."""

    def flock(file: Any, kind: int, locked: Callable[[Any, int], None] = fcntl.flock) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        is_read_only = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if kind & fcntl.LOCK_EX and is_read_only and not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        locked(file, kind)

    monkeypatch.setattr(fcntl, "flock", flock)


_PORTS = 200  # of each worker of pytest-xdist
_probed = itertools.count(os.getpid())  # another session of tests rarely probes the same ports


def free_port() -> int:
    """Return a free port that the kernel gives to no other process meanwhile: it hands out ports from 32,768 on."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 13
    for number in itertools.islice(_probed, _PORTS):
        port = 30_000 + _PORTS * worker + number % _PORTS
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"none of {_PORTS} ports is free")


Found = TypeVar("Found")


def wait_until(find: Callable[[], Found], seconds: float = 60.0, what: object = "it") -> Found:
    """Wait until `find` returns something true, and return it. The time only ends a test that would hang."""
    deadline = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < deadline, f"{what}: not in {seconds:g} s"
        time.sleep(0.02)
    return found


def forked(work: Callable[[], object]) -> int:
    """Call `work` in a forked process and return its id; its exit code is 0, or 1 if `work` raises.

    A bare `os.fork()` would go on as a second pytest after an error.
    """
    from karat_scale.foundation.machine import be_killed_with_parent

    if child := os.fork():
        return child
    code = 1
    try:
        be_killed_with_parent()
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def karat_command(arguments: Sequence[str], processes: int = 1) -> list[str]:
    """Return the command line of `karat`, alone or under torchrun."""
    if processes == 1:
        return [sys.executable, "-m", "karat_scale", *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    return [*launcher, f"--master-port={free_port()}", "-m", "karat_scale", *arguments]


def rank_environments(processes: int) -> list[dict[str, str]]:
    """Return the variables that a launcher sets for each rank of one node."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    return [
        {**karat_environment(), **meeting, **sizes, **dict.fromkeys(("RANK", "LOCAL_RANK"), str(number))}
        for number in range(processes)
    ]


def karat(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run `karat` to its end, alone or on several ranks."""
    environments = rank_environments(processes) if processes > 1 else [karat_environment()]
    return run_program("karat_scale", arguments, environments, timeout=300, directory=Path.cwd())


def karat_done(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run `karat` like `karat()`; it must succeed."""
    done = karat(*arguments, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def karat_run_here(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run `karat` in this process, or like `karat()` if there are several ranks."""
    if processes > 1:
        return karat(*arguments, processes=processes)
    from karat_scale.engine.deepspeed_internals import use_torchs_own_linear

    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as complained:
        code = karat_here(*arguments)
    # A new process would begin with torch's linear. Collecting releases the lock of a run that failed to start.
    use_torchs_own_linear()
    if code:
        gc.collect()
    return subprocess.CompletedProcess(arguments, code, said.getvalue(), complained.getvalue())


def karat_here(*arguments: str) -> int:
    """Run `karat` in this process and return its exit code; an error line, for example, needs no new process."""
    from karat_scale.commands.cli import main

    with signals_restored():
        try:
            return main(list(arguments))
        except SystemExit as end:  # argparse's, for a mistake in the call
            return int(end.code or 0)


def karat_says(*arguments: str) -> str:
    """Run `karat` in this process, where it must succeed; return what it prints."""
    with redirect_stdout(io.StringIO()) as said:
        assert karat_here(*arguments) == 0
    return said.getvalue()


def karat_refuses(*arguments: str) -> str:
    """Run `karat` in this process, where it must refuse its arguments; return the error, which is the last line."""
    with redirect_stderr(io.StringIO()) as said:
        assert karat_here(*arguments) == 2
    *before, line = said.getvalue().splitlines()
    assert line.startswith("error: ")
    assert not any(other.startswith(("error: ", "Traceback")) for other in before)
    return line


@contextmanager
def signals_restored() -> Iterator[None]:
    """Undo what a run does to this process's signals, which data workers of later tests would inherit."""
    from karat_scale.foundation.machine import STOP_SIGNALS

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_to_end(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run any program to its end; return its result. By default it runs in the clone, with `karat_environment()`."""
    given: dict[str, Any] = {"cwd": ROOT, "env": karat_environment(), "timeout": 600, **options}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **given)


def output_of(*command: object, **options: Any) -> str:
    """Run a program that must succeed; return what it prints."""
    done = run_to_end(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def benchmark(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m benchmarks.NAME` to its end."""
    return run_program(f"benchmarks.{name}", arguments, [karat_environment()], timeout=300, directory=Path.cwd())


TrainOnce = Callable[..., Path]


@pytest.fixture(scope="session")
def train_once(tmp_path_factory: pytest.TempPathFactory) -> TrainOnce:
    """Return a function that trains the small model once for each name and returns the run's directory.

    Its argument `data` is the content of the recipe's section `data`. Tests must not write into the directory.
    """

    def train_once(name: str, data: str, *overrides: str) -> Path:
        def train(root: Path) -> None:
            recipe = root / "owls.yaml"
            recipe.write_text(f"data: {{{data}}}\nschedule: {{warmup_epochs: 0.5}}\n")
            done = karat_run_here("train", str(recipe), *SMALL, f"run.dir={root / name}", *overrides)
            assert done.returncode == 0, done.stdout + done.stderr

        return made_once(tmp_path_factory, f"trained-{name}", train) / name

    return train_once


@pytest.fixture
def recipe_file(tmp_path: Path, shards: Path) -> Path:
    """Write a small KArAt recipe over the shards, with its run below tmp_path."""
    from karat_scale.recipe.loading import dump_recipe, load_recipe

    base = tmp_path / "small.yaml"
    base.write_text(f"data: {{path: {shards}}}\nattention: {{kind: karat}}\nschedule: {{warmup_epochs: 0.5}}\n")
    recipe = load_recipe(base, [*SMALL, f"run.dir={tmp_path / 'run'}"])
    base.write_text(dump_recipe(recipe))
    return base


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the events of a run's metrics.jsonl, of all kinds or of one."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    whole = (line for line in lines if line.endswith("\n"))  # a run that goes on may be writing the last one
    return [event for event in map(json.loads, whole) if kind in (None, event["event"])]


def summary(run: Path) -> dict[str, Any]:
    """Return the content of a run's summary.json."""
    return json.loads((run / "summary.json").read_text())


@contextmanager
def disk_of(size: str, place: Path) -> Iterator[Path]:
    """Mount a file system of this size at `place` inside the block; skip the test where that is not allowed."""
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a size-limited tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a file system of 2 MB, which is enough for some small checkpoints."""
    with disk_of("2m", tmp_path / "disk") as disk:
        yield disk


@pytest.fixture
def train_recipe(recipe_file: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `karat train` on the small recipe with overrides."""

    def run(*overrides: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        return karat_run_here("train", str(recipe_file), *overrides, processes=processes)

    return run
