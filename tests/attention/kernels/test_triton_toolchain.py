"""If Triton cannot build its launcher on a machine with a GPU, another implementation is used."""

import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from karat_scale.attention.kernels import triton_toolchain
from tests.compilers import needs_c_compiler
from tests.conftest import ROOT, output_of

LACKS_COMPILER = "Triton needs a C compiler, and none of gcc, clang is on PATH; install gcc or set CC"


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """Set up a machine where nothing is wrong and no answer is remembered."""
    for name in ("CC", "TRITON_INTERPRET", "TRITON_CACHE_MANAGER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    triton_toolchain._launch_problem.cache_clear()
    yield
    triton_toolchain._launch_problem.cache_clear()


@needs_c_compiler
def test_the_answer_is_found_once(monkeypatch):
    assert triton_toolchain.launch_problem() is None
    monkeypatch.setenv("PATH", "")
    assert triton_toolchain.launch_problem() is None


@needs_c_compiler
def test_what_is_missing_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    no_headers = f"Triton needs Python's headers, and there is no {tmp_path}/Python.h; install python3-dev"
    for variables, problem in (
        ({"PATH": ""}, LACKS_COMPILER),
        ({"PATH": "", "TRITON_INTERPRET": "1"}, None),
        ({"CC": "/no/such/cc"}, ".*/no/such/cc does not run"),
        ({"TRITON_CACHE_DIR": str(cache)}, rf"Triton's cache {cache} cannot be written \(.*\); set TRITON_CACHE_DIR$"),
    ):
        triton_toolchain._launch_problem.cache_clear()
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            found = triton_toolchain.launch_problem()
        assert found is None if problem is None else re.match(problem, found), variables
    triton_toolchain._launch_problem.cache_clear()
    monkeypatch.setattr("sysconfig.get_paths", lambda *_: {"include": str(tmp_path)})
    assert triton_toolchain.launch_problem() == no_headers


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho cannot find crti.o >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert str(triton_toolchain.launch_problem()).endswith("builds no extension of Python: cannot find crti.o")


@needs_c_compiler
def test_tritons_own_driver_has_the_last_word(monkeypatch):
    """Where torch reports a GPU, Triton's own driver is started too. Here that fails, because there is no GPU."""
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("triton.runtime.driver._active", None)
    monkeypatch.setattr("triton.runtime.driver._default", None)
    assert str(triton_toolchain.launch_problem()).startswith("Triton's driver does not start: ")


@pytest.mark.parametrize(("functions", "problem"), [({"launch": print}, None), ({}, LACKS_COMPILER)])
def test_what_is_built_already_needs_no_compiler(monkeypatch, functions, problem):
    """No compiler is needed if one function of the driver launches every kernel.

    Older versions of Triton lack it: they build a launcher for each signature.
    """
    pytest.importorskip("triton")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("triton.runtime.driver._active", SimpleNamespace(utils=SimpleNamespace(**functions)))
    assert triton_toolchain.launch_problem() == problem


# As much of a GPU as attention looks at: tensors with shapes, and a compute capability.
SLIM_IMAGE = """
import os
import re
from types import SimpleNamespace
import torch
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0)
from torch._subclasses.fake_tensor import FakeTensorMode
from karat_scale.attention import fourier_karat_attention
from karat_scale.attention.kernels import triton_toolchain
from karat_scale.models import create_model
from karat_scale.models.operators import check_implementation, describe_implementation
from karat_scale.recipe import AttentionConfig, ModelConfig

size = ModelConfig(name="vit_mini_patch4_28", image_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
model = create_model(size, AttentionConfig(kind="karat", grid=2, rank=4))
device = torch.device("cuda", 0)

def show(module, _):
    print(*(node.target for node in module.graph.nodes))
    return module.forward

def attend():
    check_implementation(model, device)
    print(describe_implementation(model, device))
    query, coefficients = torch.empty(1, 2, 17, 16, device=device), torch.empty(2, 4, 17, 2, device=device)
    arguments = (query, query, query, coefficients, coefficients, torch.empty(2, 17, 4, device=device))
    torch.compile(fourier_karat_attention, fullgraph=True, backend=show)(*arguments)

with FakeTensorMode():
    attend()
    os.environ["PATH"] = os.environ["PATH_WITH_COMPILER"]
    triton_toolchain._launch_problem.cache_clear()
    torch.compiler.reset()
    attend()
"""


@needs_c_compiler
@pytest.mark.slow
def test_auto_falls_back_with_its_reason_where_there_is_no_compiler(tmp_path):
    """With a compiler, auto takes the kernels. In both cases it compiles into one graph."""
    pytest.importorskip("triton")
    ours = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "PATH": ""}
    environment = {**os.environ, **ours, "PATH_WITH_COMPILER": os.environ["PATH"]}
    said = output_of(sys.executable, "-c", SLIM_IMAGE, env=environment)
    without, its_graph, with_one, other_graph = said.splitlines()
    assert without == f"attention: 2 learned layers, implementation streaming (triton cannot: {LACKS_COMPILER})"
    assert "karat_scale.streaming" in its_graph
    assert with_one == "attention: 2 learned layers, implementation triton"
    assert "karat_scale.triton_forward" in other_graph


def test_asked_for_by_name_it_is_refused_with_the_reason(monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from karat_scale.attention import fourier_karat_attention

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _=None: (9, 0))
    with FakeTensorMode():
        query = torch.empty(1, 1, 5, 16, device="cuda")
        coefficients = torch.empty(1, 4, 5, 2, device="cuda")
        with pytest.raises(ValueError, match="implementation = 'triton' cannot take this call: Triton needs a C comp"):
            fourier_karat_attention(
                *(query, query, query, coefficients, coefficients),
                torch.empty(1, 5, 4, device="cuda"),
                implementation="triton",
            )
