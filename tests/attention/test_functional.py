"""Tests of the public functions: they agree, and they refuse every bad call clearly."""

import re
import sys

import pytest
import torch

from karat_scale.attention import fourier_karat_attention, fourier_karat_scores
from tests.attention.calls import make_call, relative_error
from tests.conftest import output_of


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


@pytest.mark.parametrize("name", BAD_TENSORS)
@pytest.mark.parametrize("function", [fourier_karat_attention, fourier_karat_scores])
def test_a_wrong_shape_is_named(function, name):
    for shape in BAD_TENSORS[name]:
        arguments = make_call(2, 3, 7, 8, 4, 2)._asdict()
        arguments[name] = torch.ones(shape, dtype=torch.bool if name == "mask" else torch.float64)
        # A wrong query shows in whichever tensor no longer fits it.
        subject = r"\w+" if name == "query" else name
        stated = r"\[.*\]" if name == "query" else re.escape(str(list(shape)))
        with pytest.raises(ValueError, match=rf"^{subject} has shape {stated} .*: expected "):
            function(**arguments)


def test_bad_arguments_are_named():
    call = make_call(1, 2, 6, 4, 3, 2)
    cases = [
        *(
            ({name: torch.ones(1, 2, 6, 4, dtype=dtype)}, rf"{name} has shape .* dtype {dtype}: expected float16")
            for name in (*call._fields, "bias")
            for dtype in (torch.int64, torch.bool, torch.complex64)
        ),
        ({"mask": torch.zeros(6, 6)}, r"mask has shape \[6, 6\] .* expected torch.bool.* bias"),
        ({"proj": None}, "proj is a NoneType: expected a tensor"),
        ({"proj": call.proj.to("meta")}, "proj is on meta: expected query's device, cpu"),
        *(
            ({name: value}, rf"{name} = {value!r}: expected one of \w+, ")
            for name, value in (("base", "relu"), ("implementation", "fast"), ("base", None))
        ),
    ]
    for changed, message in cases:
        with pytest.raises(ValueError, match=f"^{message}"):
            fourier_karat_attention(**{**call._asdict(), **changed})


def test_importing_brings_in_no_library_but_torch_and_none_of_our_rooms_but_the_lowest():
    program = (
        "import sys, torch; before = set(sys.modules); import karat_scale.attention; "
        "new = {m for m in set(sys.modules) - before if not m.startswith('karat_scale')}; "
        "ours = {m for m in sys.modules if m.startswith('karat_scale')}; "
        "print(sorted(m for m in new if m.split('.')[0] not in sys.stdlib_module_names)); "
        "print(sorted({'.'.join(m.split('.')[:2]) for m in ours}))"
    )
    ours = ["karat_scale", "karat_scale.attention", "karat_scale.foundation"]
    assert output_of(sys.executable, "-c", program).splitlines() == ["[]", str(ours)]
