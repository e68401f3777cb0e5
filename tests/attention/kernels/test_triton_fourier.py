"""The Triton implementation, where it can run and where it cannot."""

import importlib.metadata
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from karat_scale.attention import fourier_karat_attention, functional
from karat_scale.attention.kernels import triton_fourier
from tests.attention.calls import make_call, relative_error
from tests.attention.kernels.in_interpreter import run_interpreted
from tests.compilers import needs_c_compiler
from tests.conftest import output_of


def test_interpreted_kernels_agree_with_the_oracle_at_a_few_sizes():
    run_interpreted("interpreted_triton.py", "-m", "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("share", ["masked_calls", "mask and not masked_calls", "not mask"])  # minutes each
def test_interpreted_kernels_agree_with_the_oracle(share):
    run_interpreted("interpreted_triton.py", "-m", "slow", "--slow=all", "-k", share)


def test_tensors_off_the_gpu_are_refused_by_name_and_left_to_others_by_auto():
    call = make_call(1, 1, 5, 16, 2, 1).to(torch.float32)
    with pytest.raises(ValueError, match="'triton' cannot take this call: it needs tensors on an NVIDIA GPU"):
        fourier_karat_attention(*call, implementation="triton")
    expected = fourier_karat_attention(*call, implementation="reference")
    assert relative_error(fourier_karat_attention(*call), expected) < 2e-6


def test_the_package_imports_without_triton():
    script = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from karat_scale.attention import fourier_karat_attention
tensors = [torch.zeros(1, 1, 5, 16)] * 3 + [torch.zeros(1, 2, 5, 1)] * 2 + [torch.zeros(1, 5, 2)]
fourier_karat_attention(*tensors)
try:
    fourier_karat_attention(*tensors, implementation="triton")
except ValueError as error:
    print(error)
"""
    assert output_of(sys.executable, "-c", script).endswith("the package triton is not installed\n")


@pytest.mark.parametrize(
    ("version", "answer"), [("3.2.0", "needs triton 3.3 or newer and finds 3.2.0"), ("3.10.1", None)]
)
def test_an_old_triton_is_named(version, answer, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    found = triton_fourier._missing_triton()
    assert (found is None) if answer is None else (answer in found)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Yield a CUDA device of capability 9.0 for fake tensors, which needs no GPU."""
    pytest.importorskip("triton")
    device = types.SimpleNamespace(major=9, minor=0, name="fake", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _=None: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    with FakeTensorMode():
        yield torch.device("cuda", 0)


@needs_c_compiler
@pytest.mark.parametrize(
    ("base", "bias", "mask"), [("zero", None, None), ("gelu", (1, 3, 197, 197), None), ("zero", None, (2, 1, 197, 197))]
)
def test_dynamo_makes_one_graph_of_one_operation(fake_cuda, base, bias, mask):
    # No gradients, because they need CUDA's library even on fake tensors. The interpreted tests compile them.
    heads = [torch.empty(2, 3, 197, 64, device=fake_cuda, dtype=torch.bfloat16) for _ in range(3)]
    parameters = [torch.empty(x, device=fake_cuda) for x in ((3, 12, 197, 3), (3, 12, 197, 3), (3, 197, 12))]
    added = None if bias is None else torch.empty(bias, device=fake_cuda)
    keep = None if mask is None else torch.ones(mask, device=fake_cuda, dtype=torch.bool)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()  # otherwise earlier tests decide whether sizes are dynamic
    compiled = torch.compile(fourier_karat_attention, backend=backend, fullgraph=True)
    output = compiled(*heads, *parameters, base=base, bias=added, mask=keep, implementation="triton")
    assert (output.shape, output.dtype, output.device.type) == ((2, 3, 197, 64), torch.bfloat16, "cuda")
    (graph,) = graphs
    assert graph.code.count("karat_scale.triton_forward") == 1
    kept = torch.ops.karat_scale.triton_forward(*heads, *parameters, added, keep, base)
    grads = torch.ops.karat_scale.triton_backward(*kept, *heads, *parameters, added, keep, base, added is not None)
    given = [*heads, *parameters, *([] if added is None else [added])]
    assert [(g.shape, g.dtype) for g in grads[: len(given)]] == [(x.shape, x.dtype) for x in given]


def test_what_was_chosen_for_a_call_is_remembered_by_all_that_matters(monkeypatch):
    monkeypatch.setattr(functional, "_REMEMBERED_DEVICES", ("cpu",))
    monkeypatch.setattr(functional, "_chosen", {})
    checked, check = [], functional.check_call
    monkeypatch.setattr(functional, "check_call", lambda call: checked.append(call) or check(call))
    call = make_call(1, 1, 5, 16, 2, 1).to(torch.float32)
    for _ in range(3):
        fourier_karat_attention(*call)
    assert len(checked) == 1
    fourier_karat_attention(*call, base="silu")
    fourier_karat_attention(*call, bias=torch.zeros(5, 5))
    fourier_karat_attention(*call.to(torch.bfloat16))
    fourier_karat_attention(*call, implementation="streaming")
    assert len(checked) == 5
    with pytest.raises(ValueError, match="base = 'relu'"):
        fourier_karat_attention(*call, base="relu")
