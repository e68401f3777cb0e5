"""Building the CPU kernel: once for all processes, and a plain answer where it cannot be built."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest

from karat_scale.foundation import native_build

pytestmark = pytest.mark.skipif(not native_build._available_instruction_sets(), reason="no AVX2 on this machine")

PROGRAM = """
import warnings, torch
from karat_scale.attention import fourier_karat_attention
from karat_scale.foundation import native_build
generator = torch.Generator().manual_seed(0)
normal = lambda *shape: torch.randn(shape, generator=generator)
heads, coefficients = (1, 2, 9, 8), (2, 4, 9, 3)
call = [normal(*shape) for shape in (heads, heads, heads, coefficients, coefficients, (2, 9, 4))]
"""


def start(code, cache, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("KARAT_CPU_ISA", "CXX")}
    environment = {**inherited, "KARAT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", PROGRAM + code]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(code, cache, **environment):
    process = start(code, cache, **environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err


@pytest.fixture
def counting_compiler(tmp_path):
    """A compiler that writes a line for each build, and the file it writes to."""
    log, script = tmp_path / "builds", tmp_path / "compiler"
    log.touch()
    script.write_text(f'#!/bin/sh\ncase "$*" in *attention.cpp*) echo built >> {log}; sleep 1;; esac\nexec c++ "$@"\n')
    script.chmod(0o755)
    return str(script), log


ATTEND = 'print(fourier_karat_attention(*call, implementation="cpu").sum().item())'


@pytest.mark.slow
def test_racing_processes_build_once_and_later_ones_not_at_all(tmp_path, counting_compiler):
    compiler, log = counting_compiler
    processes = [start(ATTEND, tmp_path / "cache", CXX=compiler) for _ in range(4)]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, results
    assert len({out for out, _ in results}) == 1
    run(ATTEND, tmp_path / "cache", CXX=compiler)
    assert log.read_text().count("built") == 1
    assert len(list((tmp_path / "cache").glob("*.so"))) == 1
    assert not list((tmp_path / "cache").glob("building-*"))


@pytest.mark.slow
def test_each_instruction_set_and_compiler_has_a_library_of_its_own(tmp_path):
    available = native_build._available_instruction_sets()
    for isa in available:
        run(ATTEND, tmp_path, KARAT_CPU_ISA=isa)
    libraries = {path.name for path in tmp_path.glob("*.so")}
    assert {name.split("-")[1] for name in libraries} == set(available)
    script = tmp_path / "other"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo other 1.0 && exit\nexec c++ "$@"\n')
    script.chmod(0o755)
    run(ATTEND, tmp_path, CXX=str(script))
    assert len(list(tmp_path.glob("*.so"))) == len(libraries) + 1


AUTO = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    outputs = [fourier_karat_attention(*call) for _ in range(3)]
print(len(caught), caught[0].message)
assert torch.equal(outputs[0], fourier_karat_attention(*call, implementation="streaming"))
try:
    fourier_karat_attention(*call, implementation="cpu")
except ValueError as error:
    print(error)
"""


def test_without_a_compiler_auto_streams_with_one_warning(tmp_path):
    out, _ = run(AUTO, tmp_path, CXX="no-such-compiler")
    warning, error = out.split("\n")
    assert warning.startswith('1 implementation "cpu" of KArAt attention is not available')
    assert "no C++ compiler (no-such-compiler) is on PATH; install g++" in warning
    assert error.startswith("implementation = 'cpu' cannot take this call: its kernel cannot be built")


def test_a_failed_build_is_told_and_not_retried(tmp_path):
    log, script = tmp_path / "builds", tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\n'
        f'echo built >> {log}\necho "attention.cpp:1: error: no such luck" >&2\nexit 1\n'
    )
    script.chmod(0o755)
    out, _ = run(AUTO, tmp_path / "cache", CXX=str(script))
    assert "failed with attention.cpp:1: error: no such luck" in out
    assert log.read_text().count("built") == len(native_build._available_instruction_sets())
    assert not list((tmp_path / "cache").glob("building-*"))
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_compiler_that_knows_less_than_the_cpu_builds_what_it_knows(tmp_path, monkeypatch):
    # A portable source can always fall back, on a CPU with one instruction set too.
    best, second = (*native_build._available_instruction_sets(), native_build.PLAIN)[:2]
    known = native_build.INSTRUCTION_SETS.get(second, ())
    unknown = next(flag for flag in native_build.INSTRUCTION_SETS[best] if flag not in known)
    compiler, source = tmp_path / "old", tmp_path / "source.cpp"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *{unknown}*) echo "error: unknown option" >&2; exit 1;; esac\nexec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    source.write_text('extern "C" int answer() { return 1; }\n')
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("KARAT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KARAT_CPU_ISA", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native_build.load(source, "the answer", portable=True).answer() == 1
    (library,) = (tmp_path / "cache").glob("*.so")
    assert library.name.split("-")[1] == second


@pytest.mark.slow
def test_a_damaged_library_is_built_again(tmp_path):
    before, _ = run(ATTEND, tmp_path)
    (library,) = tmp_path.glob("*.so")
    content = library.read_bytes()
    for damage in (content[:1000], b"", content[:5000] + b"?" + content[5001:]):
        library.write_bytes(damage)
        assert run(ATTEND, tmp_path)[0] == before
        assert library.read_bytes()[-32:] == content[-32:]


def small_source(folder):
    source = folder / "source.cpp"
    source.write_text('extern "C" int answer() { return 1; }\n')
    return source


def test_nobody_else_may_write_to_the_cache_or_a_library(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    monkeypatch.setenv("KARAT_CACHE_DIR", str(cache))
    source = small_source(tmp_path)
    isa = native_build._available_instruction_sets()[0]
    assert native_build._load(source, isa, ()).answer() == 1
    assert cache.stat().st_mode & 0o777 == 0o755
    (library,) = cache.glob("*.so")
    assert library.stat().st_mode & 0o777 == 0o700
    library.chmod(0o777)
    built = library.stat().st_ino
    native_build._load(source, isa, ())
    assert library.stat().st_ino != built
    assert library.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("what", ["directory", "library"])
def test_what_another_user_owns_is_not_loaded(tmp_path, monkeypatch, what):
    cache = tmp_path / "cache"
    monkeypatch.setenv("KARAT_CACHE_DIR", str(cache))
    monkeypatch.setattr(native_build, "_TRUSTED_OWNERS", (os.getuid(),))
    source = small_source(tmp_path)
    isa = native_build._available_instruction_sets()[0]
    native_build._load(source, isa, ())
    (library,) = cache.glob("*.so")
    os.chown(cache if what == "directory" else library, 12345, 12345)
    if what == "directory":
        with pytest.raises(native_build.LoadError, match="belongs to another user; set KARAT_CACHE_DIR"):
            native_build._load(source, isa, ())
    else:
        native_build._load(source, isa, ())
        assert library.stat().st_uid == 0


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_not_a_file_is_named_and_harms_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("KARAT_CACHE_DIR", str(tmp_path / "cache"))
    source, precious = small_source(tmp_path), tmp_path / "precious"
    precious.write_text("mine")
    isa = native_build._available_instruction_sets()[0]
    native_build._load(source, isa, ())
    (lock,) = (tmp_path / "cache").glob("*.lock")
    (library,) = (tmp_path / "cache").glob("*.so")
    library.unlink()
    lock.unlink()
    lock.symlink_to(precious) if kind == "link" else os.mkfifo(lock)
    with pytest.raises((native_build.LoadError, OSError), match=str(lock)):
        native_build._load(source, isa, ())
    assert precious.read_text() == "mine"


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    out, _ = run(AUTO, blocked / "cache")
    assert str(blocked) in out


def test_an_instruction_set_the_cpu_lacks_is_refused(tmp_path):
    out, _ = run(
        AUTO.replace("print(len(caught), caught[0].message)", "print(len(caught))"), tmp_path, KARAT_CPU_ISA="mmx"
    )
    assert out.split("\n")[0] == "0"
    assert "KARAT_CPU_ISA = 'mmx': this CPU offers " in out


def test_a_changed_header_is_built_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("KARAT_CACHE_DIR", str(tmp_path / "cache"))
    answers = []
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "answer.h").write_text(f"constexpr int ANSWER = {number};\n")
        source = folder / "source.cpp"
        source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
        answers.append(native_build.load(source, "the answer").answer())
    assert answers == [1, 2]


def test_what_a_compiler_says_is_text_in_any_encoding(tmp_path):
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\ncase "$1" in --version) printf "g++ \\377 13\\n";; '
        '*) printf "x: err\\377or: \\033[31m bad\\n" >&2; exit 1;; esac\n'
    )
    script.chmod(0o755)
    code = 'print(fourier_karat_attention(*call, implementation="auto").shape)'
    out, err = run(code, tmp_path / "cache", CXX=str(script))
    assert out == "torch.Size([1, 2, 9, 8])"
    assert r"failed with x: err\xffor: \x1b[31m bad" in err


ENDS_DURING_A_CALL = """
import threading, time
begun = threading.Event()
def work():
    own = native_build.PerThread(lambda: 42, lambda pointer: print("freed", flush=True))
    own.handle()
    begun.set()
    time.sleep(60)
threading.Thread(target=work, daemon=True).start()
begun.wait()
"""


def test_what_a_thread_may_be_using_is_not_freed_at_the_end(tmp_path):
    assert run(ENDS_DURING_A_CALL, tmp_path) == ("", "")


def test_a_library_of_another_source_is_named(tmp_path, monkeypatch):
    isa = native_build._available_instruction_sets()[0]
    source, other = tmp_path / "ours.cpp", tmp_path / "other.cpp"
    source.write_text('extern "C" int karat_ours() { return 1; }\n')
    other.write_text('extern "C" int karat_other() { return 2; }\n')
    monkeypatch.setenv("KARAT_CACHE_DIR", str(tmp_path / "first"))
    assert native_build._load(other, isa, ()).karat_other() == 2
    assert native_build._load(source, isa, ()).karat_ours() == 1
    (theirs,), (own,) = (list((tmp_path / "first").glob(f"{name}-*.so")) for name in ("other", "ours"))
    monkeypatch.setenv("KARAT_CACHE_DIR", str(tmp_path / "second"))  # the loader knows the path of what it has loaded
    (tmp_path / "second").mkdir()
    shutil.copy(theirs, tmp_path / "second" / own.name)
    with pytest.raises(native_build.LoadError, match="of another source, without karat_ours; remove it"):
        native_build._load(source, isa, ())
