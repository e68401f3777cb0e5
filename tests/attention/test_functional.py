"""The public functions: agreement of the two, and a clear refusal of every bad call."""

import re
import subprocess
import sys

import pytest
import torch

from karat_scale.attention import fourier_karat_attention, fourier_karat_scores
from tests.attention.calls import make_call, relative_error


@pytest.mark.parametrize("implementation", ["auto", "reference", "streaming"])
@pytest.mark.parametrize("base", ["zero", "gelu"])
def test_scores_times_value_is_attention(implementation, base):
    call = make_call(2, 3, 11, 8, 4, 3)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 1, 11, 11, generator=generator) > 0.3
    bias = torch.randn(3, 11, 11, generator=generator, dtype=torch.float64)
    for options in ({}, {"mask": mask, "bias": bias}):
        learned = fourier_karat_scores(*call, base=base, implementation=implementation, **options)
        output = fourier_karat_attention(*call, base=base, implementation=implementation, **options)
        assert learned.shape == (2, 3, 11, 11)
        assert relative_error(learned @ call.value, output) < 1e-12
    assert (learned[~mask.expand_as(learned)] == 0).all()


def test_scores_need_no_value_and_have_gradients():
    call = make_call(1, 2, 6, 4, 3, 2)
    learned = fourier_karat_scores(call.query, call.key, None, *call[3:])
    learned.square().sum().backward()
    assert call.value.grad is None
    assert call.proj.grad.norm() > 0


def test_auto_is_an_implementation_by_name():
    call = make_call(1, 2, 6, 4, 3, 2)
    assert torch.equal(fourier_karat_attention(*call), fourier_karat_attention(*call, implementation="streaming"))


BAD_TENSORS = {
    "query": [(2, 7, 8), (2, 3, 6, 8), (2, 3, 7, 0)],
    "key": [(2, 3, 6, 8), (2, 3, 7, 4), (7, 8)],
    "value": [(2, 3, 7, 4), (1, 3, 7, 8)],
    "cos_coef": [(3, 4, 6, 2), (2, 4, 7, 2), (3, 0, 7, 2), (3, 4, 7, 0), (3, 4, 7)],
    "sin_coef": [(3, 4, 7, 3), (3, 5, 7, 2)],
    "proj": [(3, 4, 7), (3, 7, 5), (3, 7), (2, 7, 4)],
    "bias": [(6,), (4, 7, 7), (2, 3, 1, 1, 7), (0,)],
    "mask": [(6,), (3, 3, 7, 7), (1, 2, 3, 7, 7)],
}


@pytest.mark.parametrize(("name", "shape"), [(n, s) for n, shapes in BAD_TENSORS.items() for s in shapes], ids=str)
@pytest.mark.parametrize("function", [fourier_karat_attention, fourier_karat_scores])
def test_a_wrong_shape_is_named(function, name, shape):
    arguments = make_call(2, 3, 7, 8, 4, 2)._asdict()
    arguments[name] = torch.ones(shape, dtype=torch.bool if name == "mask" else torch.float64)
    # A wrong query shows in whichever tensor no longer fits it.
    subject = r"\w+" if name == "query" else name
    stated = r"\[.*\]" if name == "query" else re.escape(str(list(shape)))
    with pytest.raises(ValueError, match=rf"^{subject} has shape {stated} .*: expected "):
        function(**arguments)


@pytest.mark.parametrize("name", ["query", "key", "value", "cos_coef", "sin_coef", "proj", "bias"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_dtype_that_is_not_floating_is_named(name, dtype):
    arguments = make_call(2, 3, 7, 8, 4, 2)._asdict()
    arguments[name] = arguments.get(name, torch.ones(7, 7)).detach().to(dtype)
    with pytest.raises(ValueError, match=rf"^{name} has shape .* dtype {dtype}: expected float16"):
        fourier_karat_attention(**arguments)


def test_a_mask_that_is_not_boolean_is_sent_to_bias():
    call = make_call(1, 2, 6, 4, 3, 2)
    with pytest.raises(ValueError, match=r"^mask has shape \[6, 6\] .* expected torch.bool.* bias"):
        fourier_karat_attention(*call, mask=torch.zeros(6, 6))


def test_what_is_no_tensor_is_named():
    call = make_call(1, 2, 6, 4, 3, 2)
    with pytest.raises(ValueError, match=r"^proj is a NoneType: expected a tensor"):
        fourier_karat_attention(*call[:5], None)


def test_a_tensor_on_another_device_is_named():
    call = make_call(1, 2, 6, 4, 3, 2)
    with pytest.raises(ValueError, match=r"^proj is on meta: expected query's device, cpu"):
        fourier_karat_attention(*call[:5], call.proj.to("meta"))


@pytest.mark.parametrize(("name", "value"), [("base", "relu"), ("implementation", "fast"), ("base", None)])
def test_an_unknown_name_is_answered_with_the_choices(name, value):
    call = make_call(1, 2, 6, 4, 3, 2)
    with pytest.raises(ValueError, match=rf"^{name} = {value!r}: expected one of \w+, "):
        fourier_karat_attention(*call, **{name: value})


def test_importing_brings_in_no_library_but_torch_and_none_of_our_rooms_but_the_lowest():
    program = (
        "import sys, torch; before = set(sys.modules); import karat_scale.attention; "
        "new = {m for m in set(sys.modules) - before if not m.startswith('karat_scale')}; "
        "ours = {m for m in sys.modules if m.startswith('karat_scale')}; "
        "print(sorted(m for m in new if m.split('.')[0] not in sys.stdlib_module_names)); "
        "print(sorted({'.'.join(m.split('.')[:2]) for m in ours}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    ours = ["karat_scale", "karat_scale.attention", "karat_scale.foundation"]
    assert result.stdout.split("\n")[:2] == ["[]", str(ours)]
