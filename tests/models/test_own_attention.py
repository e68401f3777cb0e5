"""Attention that a user wrote, named in a recipe by the place of its class."""

import re
import sys

import pytest
import torch

from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.tables import VARIABLE, UntrustedError, require_trust
from karat_scale.models import create_model
from karat_scale.models.attention_matrices import content_of, watched
from karat_scale.models.flops import flops_per_image
from karat_scale.models.init_from import take_weights
from karat_scale.models.operators import gates
from karat_scale.recipe import AttentionConfig, ModelConfig
from tests.conftest import SMALL, karat_here

MINE = """
import torch
from torch import nn
from karat_scale.attention import AttentionHeads, InputHeads

class Linearised(AttentionHeads):
    '''Linear attention: O = relu(q) relu(k)^T V / N, with a weight of each token.'''

    token_axes = {"weight": (1,)}

    def __init__(self, num_tokens, num_heads, rank, width, embed_dim):
        super().__init__()
        self.num_tokens, self.num_heads, self.given = num_tokens, num_heads, (rank, width, embed_dim)
        self.weight = nn.Parameter(torch.ones(num_heads, num_tokens, 1))

    def forward(self, query, key, value, bias=None, mask=None):
        return self.weight * query.relu() @ (key.relu().mT @ value) / self.num_tokens

class Input(InputHeads, Linearised):
    def forward(self, query, key, value, bias=None, mask=None, *, x):
        return Linearised.forward(self, query, key, value) * (1 + x[..., 0])[:, None, :, None]

class Forgetful(Linearised):
    def __init__(self, num_heads):
        super(Linearised, self).__init__()

class Narrow(Linearised):
    def forward(self, query, key, value, bias=None, mask=None):
        return value[:, :, :1]

class Demanding(Linearised):
    def __init__(self, num_tokens, num_heads, secret):
        pass

class Tempered(Linearised):
    def __init__(self, num_tokens, num_heads):
        super().__init__(num_tokens, num_heads, 1, 1, 1)
        self.temperature = nn.Parameter(torch.ones(()))

class Blind(Linearised):
    def forward(self, query, key, value):
        return value

class Choosy(Linearised):
    def forward(self, query, key, value, bias=None, mask=None):
        return value if query.max() > 0 else -value

class Counted(Choosy):
    def flops(self, tokens, width, masked=False):
        return 7

class Not:
    pass
"""
SIZES = {"name": "vit_mini_patch4_28", "image_size": 16, "embed_dim": 32, "depth": 2, "num_classes": 3}
MODEL = ModelConfig(**SIZES)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "attention_of_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "attention_of_mine"
    sys.modules.pop("attention_of_mine", None)


def build(place, model=MODEL, **settings):
    torch.manual_seed(0)
    return create_model(model, AttentionConfig(kind=place, rank=5, **settings))


@pytest.mark.parametrize("more", [{}, {"softmax_heads": 1}, {"mode": "universal"}, {"residual": True}], ids=str)
@pytest.mark.parametrize("name", ["Linearised", "Input"])
def test_it_learns_and_can_be_looked_at(mine, name, more):
    model, images = build(f"{mine}:{name}", **more), torch.randn(4, 3, 16, 16)
    heads = next(module for module in model.modules() if type(module).__name__ == name)
    assert heads.given == (5, 16, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert [gate is not None for gate in gates(model)] == [bool(more.get("residual"))] * 2
    assert content_of(model, model, images)["frobenius_norm"][0] > 0
    seen = []
    with watched(model, lambda block, raw, learned: seen.append(learned)):
        model(images)
    assert [learned.shape for learned in seen] == [(4, 2, 17, 17)] * 2


def test_what_pytorch_runs_is_counted(mine):
    tokens, width, blocks, heads = 17, 16, 2, 2
    product = blocks * heads * 4 * tokens * width * width
    softmax = flops_per_image(MODEL, AttentionConfig())
    ours = flops_per_image(MODEL, AttentionConfig(kind=f"{mine}:Linearised"))
    assert ours.forward == softmax.forward - blocks * heads * 4 * tokens * tokens * width + product
    assert 2.5 * ours.forward < ours.training < 3 * ours.forward


def test_in_a_range_of_blocks_it_keeps_what_works_with_each_class(mine):
    own = {"1": {"kind": f"{mine}:Linearised"}}
    section = AttentionConfig(kind="karat", form="smooth", softmax_heads=1, blocks=own).of_block(1)
    assert (section.softmax_heads, section.form) == (1, "modular")


def test_it_changes_its_image_size(mine):
    source, target = build(f"{mine}:Linearised"), build(f"{mine}:Linearised", MODEL.changed(image_size=24))
    assert take_weights(target, source.state_dict()) == "interpolated from 4 x 4 patches"
    torch.testing.assert_close(target.blocks[0].attn.operator.weight.detach(), torch.ones(2, 37, 1))


def test_what_is_no_attention_is_one_line_and_a_foreign_one_needs_trust(mine, monkeypatch):
    for name, settings, message in (
        ("Not", {}, f"attention.kind = '{mine}:Not': .*expected a subclass of AttentionHeads"),
        ("Nothing", {}, f"attention.kind = '{mine}:Nothing': .*has no Nothing"),
        ("Demanding", {}, f"attention.kind = '{mine}:Demanding': .*cannot be built: .*secret"),
        ("Forgetful", {}, f"attention.kind = '{mine}:Forgetful': .*must set self.num_heads, here to 2"),
        (
            "Tempered",
            {},
            f"attention.kind = '{mine}:Tempered': the first axis of its parameter temperature .. must be the",
        ),
        ("Blind", {}, f"attention.kind = '{mine}:Blind': its forward must take query, key, value, bias, mask by these"),
        ("Linearised", {"form": "content"}, "attention.form = content has no effect with attention.kind = "),
        ("Linearised", {"implementation": "cpu"}, "attention.implementation = cpu does not support attention.kind="),
    ):
        with pytest.raises(RecipeError, match=f"^{message}"):
            build(f"{mine}:{name}", **settings)
    with pytest.raises(RecipeError, match=r"cannot be counted without values .*; define flops.self, tokens, width"):
        flops_per_image(MODEL, AttentionConfig(kind=f"{mine}:Choosy"))
    assert flops_per_image(MODEL, AttentionConfig(kind=f"{mine}:Counted")).forward > 0
    message = f"attention.kind = '{mine}:Narrow': its forward returned [1, 2, 1, 16], not [B, h, N, d] = [1, 2, 17, 16]"
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        build(f"{mine}:Narrow")(torch.zeros(1, 3, 16, 16))
    monkeypatch.delenv(VARIABLE, raising=False)
    require_trust(AttentionConfig(kind="karat").classes, "run")
    with pytest.raises(UntrustedError, match=r"^run: attention.kind = theirs:Heads runs the code of the module theirs"):
        require_trust(AttentionConfig(kind="theirs:Heads").classes, "run")


@pytest.mark.slow
def test_every_command_works_with_it(mine, tmp_path, capsys, monkeypatch):
    import timm

    import karat_scale.timm_models  # noqa: F401

    run, recipe, kind = tmp_path / "run", tmp_path / "mine.yaml", f"attention.kind={mine}:Input"
    recipe.write_text("data: {backend: synthetic, synthetic_samples: 16}\nschedule: {warmup_epochs: 0}\n")
    assert karat_here("plan", str(recipe), *SMALL, kind) == 0
    assert karat_here("train", str(recipe), *SMALL, kind, f"run.dir={run}", "train.max_steps=2") == 0
    monkeypatch.setenv(VARIABLE, "1")
    assert karat_here("analyze", str(run), "--images", "4") == 0, capsys.readouterr().err
    assert (run / "analysis" / "report.html").is_file()
    for form, out in (("safetensors", "a.safetensors"), ("torch-export", "a.pt2"), ("onnx", "a.onnx")):
        assert karat_here("export", str(run), "--weights", "raw", "--format", form, "--out", str(tmp_path / out)) == 0
    for form in ("timm", "hub-folder"):
        assert karat_here("export", str(run), "--weights", "raw", "--format", form, "--out", str(tmp_path / form)) == 0
        model = timm.create_model(f"local-dir:{tmp_path / form}", pretrained=True)
        assert type(model.blocks[0].attn.operator).__name__ == "Input"
    assert f"attention of the class {mine}:Input (blockwise)" in (tmp_path / "hub-folder" / "README.md").read_text()
