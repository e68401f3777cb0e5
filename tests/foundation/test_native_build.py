"""Tests of building the CPU kernel: once for all processes, and a plain answer where it cannot be built."""

import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from karat_scale.foundation import native_build
from tests.compilers import needs_kernels
from tests.conftest import ROOT, karat_environment, output_of, run_to_end
from tests.warm import run_code

pytestmark = needs_kernels

PROGRAM = """
import warnings, torch
from karat_scale.attention import fourier_karat_attention
from karat_scale.foundation import native_build
generator = torch.Generator().manual_seed(0)
normal = lambda *shape: torch.randn(shape, generator=generator)
heads, coefficients = (1, 2, 9, 8), (2, 4, 9, 3)
call = [normal(*shape) for shape in (heads, heads, heads, coefficients, coefficients, (2, 9, 4))]
"""


def run(code, cache, processes=1, **environment):
    """Run PROGRAM followed by `code` in `processes` processes at once; return their output and standard error."""
    inherited = {k: v for k, v in karat_environment().items() if k not in ("KARAT_CPU_ISA", "CXX")}
    environments = processes * [{**inherited, "KARAT_CACHE_DIR": str(cache), **environment}]
    done = run_code(PROGRAM + code, environments=environments, directory=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def write_compiler(path, script):
    """Write a program that stands in for the compiler; return its path."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a cache for this test alone; a source file is in the folder above it."""
    monkeypatch.setenv("KARAT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "source.cpp").write_text('// Build with: portable\nextern "C" int answer() { return 1; }\n')
    return tmp_path / "cache"


def loaded(cache):
    """Build or find the library of the source; return it and its file."""
    library = native_build._load(cache.parent / "source.cpp", native_build._available_instruction_sets()[0])
    (file,) = cache.glob("*.so")
    return library, file


ATTEND = 'print(fourier_karat_attention(*call, implementation="cpu").sum().item())'


def test_a_compiler_may_be_a_command_with_arguments(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "env LANG=C g++")
    program, *arguments = native_build.find_compiler()
    assert (program, arguments) == (shutil.which("env"), ["LANG=C", "g++"])
    assert "Free Software" in native_build._run([program, *arguments, "--version"])
    blank = tmp_path / "my tools"
    write_compiler(blank, "exec c++")
    monkeypatch.setenv("CXX", str(blank))
    assert native_build.find_compiler() == [str(blank)]
    for wrong in ("'g++", "  "):
        monkeypatch.setenv("CXX", wrong)
        with pytest.raises(native_build.LoadError, match="is on PATH; install g"):
            native_build.find_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(native_build.LoadError, match=r"no C\+\+ compiler \(no-such-compiler -O2\) is on PATH"):
        native_build.find_compiler()


@pytest.mark.slow
def test_racing_processes_build_once_and_later_ones_not_at_all(tmp_path):
    log = tmp_path / "builds"
    noting = f'case "$*" in *attention.cpp*) echo built >> {log}; sleep 1;; esac\nexec c++ "$@"'
    compiler = write_compiler(tmp_path / "compiler", noting)
    out, _ = run(ATTEND, tmp_path / "cache", processes=4, CXX=compiler)
    assert len(set(out.splitlines())) == 1
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
    other = '[ "$1" = --version ] && echo other 1.0 && exit\nexec c++ "$@"'
    run(ATTEND, tmp_path, CXX=write_compiler(tmp_path / "other", other))
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
    log, says = tmp_path / "builds", 'echo "attention.cpp:1: error: no such luck" >&2\nexit 1'
    script = f'[ "$1" = --version ] && exit 0\necho built >> {log}\n{says}'
    out, _ = run(AUTO, tmp_path / "cache", CXX=write_compiler(tmp_path / "compiler", script))
    assert "failed with attention.cpp:1: error: no such luck" in out
    assert log.read_text().count("built") == len(native_build._available_instruction_sets())
    assert not list((tmp_path / "cache").glob("building-*"))
    assert not list((tmp_path / "cache").glob("*.so"))


def test_a_compiler_that_knows_less_than_the_cpu_builds_what_it_knows(cache, tmp_path, monkeypatch):
    # A portable source can always fall back, on a CPU with one instruction set too.
    best, second = (*native_build._available_instruction_sets(), native_build.PLAIN)[:2]
    known = native_build.INSTRUCTION_SETS.get(second, ())
    unknown = next(flag for flag in native_build.INSTRUCTION_SETS[best] if flag not in known)
    old = f'case "$*" in *{unknown}*) echo "error: unknown option" >&2; exit 1;; esac\nexec c++ "$@"'
    monkeypatch.setenv("CXX", write_compiler(tmp_path / "old", old))
    monkeypatch.delenv("KARAT_CPU_ISA", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native_build.load(tmp_path / "source.cpp", "the answer").answer() == 1
    (library,) = cache.glob("*.so")
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


def test_nobody_else_may_write_to_the_cache_or_a_library(cache):
    cache.mkdir()
    cache.chmod(0o777)
    built, library = loaded(cache)
    assert built.answer() == 1
    assert cache.stat().st_mode & 0o777 == 0o755
    assert library.stat().st_mode & 0o777 == 0o700
    library.chmod(0o777)
    before = library.stat().st_ino
    loaded(cache)
    assert library.stat().st_ino != before
    assert library.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_what_another_user_owns_is_not_loaded(cache, monkeypatch):
    monkeypatch.setattr(native_build, "_TRUSTED_OWNERS", (os.getuid(),))
    _, library = loaded(cache)
    os.chown(library, 12345, 12345)
    assert loaded(cache)[1].stat().st_uid == 0
    os.chown(cache, 12345, 12345)
    with pytest.raises(native_build.LoadError, match="belongs to another user; set KARAT_CACHE_DIR"):
        loaded(cache)


def test_a_lock_that_is_not_a_file_is_named_and_harms_nothing(cache, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    loaded(cache)[1].unlink()
    (lock,) = cache.glob("*.lock")
    for put in (lambda: lock.symlink_to(precious), lambda: os.mkfifo(lock)):
        lock.unlink()
        put()
        with pytest.raises((native_build.LoadError, OSError), match=str(lock)):
            loaded(cache)
        assert precious.read_text() == "mine"


def test_a_cache_that_cannot_be_written_and_an_instruction_set_the_cpu_lacks_are_named(tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in run(AUTO, tmp_path / "file" / "cache")[0]
    quiet = AUTO.replace("print(len(caught), caught[0].message)", "print(len(caught))")
    out, _ = run(quiet, tmp_path, KARAT_CPU_ISA="mmx")
    assert out.split("\n")[0] == "0"
    assert "KARAT_CPU_ISA = 'mmx': this CPU offers " in out


def test_a_changed_header_is_built_anew(cache, tmp_path):
    (tmp_path / "source.cpp").write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "answer.h").write_text(f"constexpr int ANSWER = {number};\n")
        source = shutil.copy(tmp_path / "source.cpp", folder)
        assert native_build.load(Path(source), "the answer").answer() == number


def test_what_a_compiler_says_is_text_in_any_encoding(tmp_path):
    version, error = r'printf "g++ \377 13\n"', r'printf "x: err\377or: \033[31m bad\n" >&2'
    script = f'case "$1" in --version) {version};; *) {error}; exit 1;; esac'
    code = 'print(fourier_karat_attention(*call, implementation="auto").shape)'
    out, err = run(code, tmp_path / "cache", CXX=write_compiler(tmp_path / "compiler", script))
    assert out == "torch.Size([1, 2, 9, 8])"
    assert r"failed with x: err\xffor: \x1b[31m bad" in err


def test_a_machine_of_another_kind_has_other_instruction_sets(monkeypatch):
    for machine, offered in (("aarch64", ("neon",)), ("riscv64", ())):
        monkeypatch.setattr(native_build.platform, "machine", lambda machine=machine: machine)
        assert native_build._available_instruction_sets() == offered


SHARES = """
import ctypes, sys
from karat_scale.foundation import native_build
hidden = ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_LOCAL)
try:
    ctypes.CDLL(sys.argv[1])
except OSError as error:
    assert "omp_get_num_procs" in str(error)
    native_build._share_openmp()
    print(ctypes.CDLL(sys.argv[1]).processors() == hidden.omp_get_num_procs())
"""


def test_openmp_that_torch_keeps_to_itself_is_found(tmp_path):
    source, library = tmp_path / "source.cpp", tmp_path / "library.so"
    source.write_text('extern "C" { int omp_get_num_procs(); int processors() { return omp_get_num_procs(); } }\n')
    output_of("c++", "-shared", "-fPIC", source, "-o", library)
    assert output_of(sys.executable, "-c", SHARES, library, cwd=ROOT) == "True\n"


ENDS_DURING_A_CALL = """
import threading, time
from karat_scale.foundation import native_build
begun = threading.Event()
def work():
    own = native_build.PerThread(lambda: 42, lambda pointer: print("freed", flush=True))
    own.handle()
    begun.set()
    time.sleep(60)
threading.Thread(target=work, daemon=True).start()
begun.wait()
"""


def test_what_a_thread_may_be_using_is_not_freed_at_the_end():
    # Not in a fork, which skips what Python does at its end.
    done = run_to_end(sys.executable, "-c", ENDS_DURING_A_CALL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_library_beside_the_source_is_loaded_without_a_compiler(cache, tmp_path, monkeypatch):
    loaded(cache)
    (built,) = cache.glob("*.so")
    isa = native_build._available_instruction_sets()[0]
    built.rename(native_build.in_the_package(tmp_path / "source.cpp", isa))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("KARAT_CPU_ISA", isa)
    assert native_build.load(tmp_path / "source.cpp", "the answer").answer() == 1
    assert list(cache.glob("*.so")) == []
