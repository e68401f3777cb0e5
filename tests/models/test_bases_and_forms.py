"""A ViT of every basis and form learns, and settings that do not go together are refused in one line."""

import sys
from typing import get_args, get_type_hints

import pytest
import torch
from pydantic import ValidationError

from karat_scale.attention import BASES, KaratOperator
from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.models.factory import no_weight_decay_names
from karat_scale.recipe import AttentionConfig, ModelConfig

MINI = ModelConfig(name="vit_mini_patch4_28", image_size=16, patch_size=4, num_classes=10, depth=2)

TRIANGLE = """
from dataclasses import dataclass
from karat_scale.attention import FeatureBasis

@dataclass(frozen=True)
class Triangles(FeatureBasis):
    grid: int
    num_features = property(lambda self: self.grid)

    def value(self, x):
        return [(1 - (x - i).abs()).clamp(min=0) for i in range(self.grid)]

    def derivative(self, x):
        return [((x - i).abs() < 1) * (i - x).sign() for i in range(self.grid)]

class Half(FeatureBasis):
    num_features = 1
    def value(self, x):
        return [x / 2]

class Not:
    pass
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "shapes_of_mine.py").write_text(TRIANGLE)
    (tmp_path / "shapes_of_mine_fails.py").write_text("import numpy\nnumpy.nothing\n")
    (tmp_path / "shapes_of_mine_lacks.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "shapes_of_mine"
    sys.modules.pop("shapes_of_mine", None)


def losses_of_two_steps(**settings) -> list[float]:
    torch.manual_seed(0)
    model = create_model(MINI, AttentionConfig(kind="karat", rank=3, **settings))
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    return losses


LEARNS = [
    *({"basis": basis} for basis in BASES),
    *({"form": form, "basis": basis} for form in ("project_first", "two_operators") for basis in ("fourier", "dog")),
    *({"simplex": simplex} for simplex in (True, "hidden")),
    {"form": "full_rank", "basis": "dog", "softmax_heads": 1, "mode": "universal"},
    *({"bound": 2.0, "form": form} for form in get_args(get_type_hints(AttentionConfig)["form"])),
    {"bound": 2.0, "basis": "bspline"},
    {"bound": 2.0, "simplex": "hidden"},
]


@pytest.mark.parametrize("settings", LEARNS, ids=str)
def test_every_basis_and_form_learns(settings):
    first, second = losses_of_two_steps(**settings)
    assert second < first


def test_a_basis_of_ones_own_learns(own_module):
    first, second = losses_of_two_steps(basis=f"{own_module}:Triangles", grid=2)
    assert second < first


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("{}:Half", "the class lacks derivative"),
        ("{}:Not", "expected a subclass of FeatureBasis or ElementwiseBasis"),
        ("{}:Nothing", "has no Nothing"),
        ("{}_fails:Half", "fails cannot be imported: module 'numpy' has no attribute 'nothing'"),
        ("{}_lacks:Half", "lacks cannot be imported: No module named 'no_such_library'"),
        ("no_such_module_of_mine:Half", "No module named 'no_such_module_of_mine'; put its directory on PYTHONPATH"),
    ],
)
def test_a_basis_that_cannot_be_had_is_one_line(own_module, place, part):
    basis = place.format(own_module)
    with pytest.raises(RecipeError, match=f"^attention.basis = '{basis}': .*{part}"):
        create_model(MINI, AttentionConfig(kind="karat", basis=basis))


def test_settings_reach_the_basis():
    config = AttentionConfig(kind="karat", basis="bspline", grid=5, degree=2, range=4.0)
    operator = create_model(MINI, config).blocks[0].attn.operator
    assert isinstance(operator, KaratOperator)
    assert (operator.basis.grid, operator.basis.degree, operator.basis.range) == (5, 2, 4.0)
    assert operator.coef.shape == (2, 7, 12, 17)


def test_operators_of_any_kind_go_without_weight_decay():
    model = create_model(MINI, AttentionConfig(kind="karat", basis="dog", softmax_heads=1))
    exempt = no_weight_decay_names(model, False)
    assert {f"blocks.0.attn.operator.operator.{n}" for n in ("weight", "translation", "scale", "proj")} <= exempt
    residual = create_model(MINI, AttentionConfig(kind="karat", residual=True))
    gate = "blocks.0.attn.operator.gate"
    assert gate in no_weight_decay_names(residual, True)
    everything = no_weight_decay_names(residual, "all")
    assert gate not in everything
    assert "norm.weight" in everything


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"basis": "furier"}, "'fourier', 'bspline', .* or package.module:Class"),
        ({"basis": "pack age:Class"}, "package.module:Class"),
        ({"basis": "dog", "implementation": "cpu"}, "needs attention.basis=fourier, attention.form=modular"),
        ({"simplex": True, "implementation": "triton"}, "needs attention.basis=fourier, attention.form=modular"),
        ({"simplex": "hidden", "form": "full_rank"}, "hidden needs attention.form=modular, not full_rank"),
        ({"orders": (0, 4)}, "orders"),
        ({"degree": 0}, "degree"),
        ({"range": 0}, "range"),
        ({"form": "modulr"}, "form"),
        ({"softmax_heads": -1}, "softmax_heads"),
        ({"init": "softmax_like", "basis": "dog"}, "needs attention.basis=fourier"),
        ({"kind": "static", "form": "full_rank"}, "attention.form = full_rank has no effect with attention.kind = "),
        ({"kind": "static", "scores": False}, "attention.scores = false has no effect with attention.kind = "),
        (
            {"kind": "karat", "form": "smooth", "init": "paper"},
            "attention.init = paper does not work with attention.form = smooth; use var",
        ),
        (
            {"kind": "karat", "form": "smooth", "basis": "bspline"},
            "attention.basis = bspline does not work with attention.form = smooth",
        ),
        ({"kind": "karat", "form": "smooth", "gains": True}, "does not work with attention.form = smooth; use false"),
        ({"kind": "karat", "basis": "dog", "init": "fourier_kan"}, "needs attention.basis=fourier, not dog"),
        ({"kind": "karat", "base": "silu", "gains": True}, "needs attention.basis=fourier and attention.base=zero"),
        ({"bound": 0}, "bound"),
        ({"bound": 2.0, "scores": False}, "attention.bound = 2 has no effect with attention.scores = false"),
        ({"kind": "static", "bound": 2.0}, "attention.bound = 2.0 has no effect with attention.kind = static"),
        ({"kind": "static", "gains": True}, "attention.gains = true has no effect with attention.kind = "),
        ({"kind": "softmax", "scores": False}, "attention.scores = false has no effect with attention.kind = "),
        ({"kind": "softmax", "residual": True}, "attention.residual = true has no effect with attention.kind = "),
        ({"kind": "softmax", "softmax_heads": 1}, "attention.softmax_heads = 1 has no effect with attention.kind = "),
        ({"kind": "static", "implementation": "cpu"}, "attention.implementation = cpu does not support"),
    ],
)
def test_what_a_recipe_cannot_mean(settings, part):
    with pytest.raises(ValidationError, match=part):
        AttentionConfig(**{"kind": "karat", **settings})
