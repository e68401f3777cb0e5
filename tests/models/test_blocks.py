"""`attention.blocks`: ranges of blocks with attention of their own, in every family of models."""

import pytest
import timm
import torch
from pydantic import ValidationError

import karat_scale.timm_models  # noqa: F401  # timm knows `karat`
from karat_scale.attention import HybridHeads
from karat_scale.foundation.errors import RecipeError
from karat_scale.foundation.tables import UntrustedError
from karat_scale.models import create_model, parameter_count
from karat_scale.models.attention_matrices import content_of, reaches
from karat_scale.models.flops import flops_per_image
from karat_scale.models.init_from import differences, take_weights
from karat_scale.models.layers import attention_layers
from karat_scale.models.operators import head_parameters, heads_of, operators
from karat_scale.recipe import AttentionConfig, ModelConfig
from karat_scale.recipe.attention import describe_attention
from karat_scale.recipe.loading import differing_keys, dump_recipe, flatten, load_recipe

VIT = {"name": "vit_mini_patch4_28", "image_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}
CONVIT = {"name": "convit_tiny", "image_size": 32, "depth": 4, "num_heads": 4, "embed_dim": 48}
SWIN = {"name": "swin_mini_patch2_window4_32", "image_size": 32}
LAST = {"3": {"kind": "karat", "grid": 5}}


def model(host: dict[str, object], seed: int = 0, **section: object):
    torch.manual_seed(seed)
    return create_model(ModelConfig(**host, num_classes=3), AttentionConfig(**{"rank": 3, **section}))


def names(network) -> list[str | None]:
    return [type(own).__name__ if (own := heads_of(layer.attention)) else None for layer in attention_layers(network)]


@pytest.mark.parametrize("host", [VIT, CONVIT, SWIN], ids=["vit", "convit", "swin"])
def test_each_block_has_its_own_attention_and_learns(host: dict[str, object]) -> None:
    blocks = {"2": {"kind": "static"}, "3": {"kind": "karat", "grid": 5, "softmax_heads": 1}}
    network = model(host, blocks=blocks)
    assert names(network) == [None, None, "StaticHeads", "FourierKaratOperator"]
    assert [own and own.grid for own in operators(network)] == [None, None, None, 5]
    assert isinstance(attention_layers(network)[3].attention.operator, HybridHeads)
    images = torch.randn(2, 3, host["image_size"], host["image_size"])
    network(images).square().sum().backward()
    learned = {(block, name) for name, block, parameter in head_parameters(network) if parameter.grad is not None}
    assert learned == {(2, "matrix"), (3, "cos_coef"), (3, "sin_coef"), (3, "W")}
    assert list(reaches(network)) == [3]
    assert len(content_of(network.eval(), network, images)["by_query"]) == 4
    sizes, plain = ModelConfig(**host, num_classes=3), AttentionConfig(rank=3)
    mixed = plain.changed(blocks={"3": blocks["3"]})
    assert flops_per_image(sizes, mixed).forward != flops_per_image(sizes, plain).forward
    operator = sum(parameter.numel() for name, block, parameter in head_parameters(network) if block == 3)
    assert parameter_count(create_model(sizes, mixed)) == parameter_count(create_model(sizes, plain)) + operator


def test_a_section_of_karat_leaves_blocks_to_softmax_and_gives_others_a_grid_of_their_own() -> None:
    network = model(VIT, kind="karat", residual=True, blocks={"0-1": {"kind": "softmax"}, "3": {"grid": 1}})
    assert [own and own.grid for own in operators(network)] == [None, None, 3, 1]
    section = AttentionConfig(kind="karat", form="content", bound=2.0, rank=5, blocks={"1": {"kind": "static"}})
    assert section.of_block(1) == AttentionConfig(kind="static", rank=5)
    assert section.of_block(0) == AttentionConfig(kind="karat", form="content", bound=2.0, rank=5)
    assert not AttentionConfig(blocks={"0": {"kind": "softmax"}}).learns


def test_an_implementation_is_that_of_the_blocks_that_have_it() -> None:
    network = model(VIT, kind="karat", implementation="cpu", blocks={"0": {"kind": "static"}, "1": {"kind": "softmax"}})
    assert names(network) == ["StaticHeads", None, "FourierKaratOperator", "FourierKaratOperator"]
    assert [own and own.implementation for own in operators(network)] == [None, None, "cpu", "cpu"]
    section = AttentionConfig(
        kind="sigmoid", implementation="flex", blocks={"0": {"kind": "gated"}, "1": {"kind": "polynomial"}}
    )
    assert [section.of_block(block).implementation for block in range(3)] == ["auto", "flex", "flex"]
    with pytest.raises(ValidationError, match=r"implementation = cpu does not support attention\.kind=static"):
        AttentionConfig(kind="static", implementation="cpu", blocks={"0": {"kind": "karat"}})


def test_shared_operators_are_those_of_the_blocks_that_learn() -> None:
    network = model(VIT, kind="karat", mode="universal", blocks={"0-1": {"kind": "softmax"}})
    first, second = (layer.attention.operator for layer in attention_layers(network)[2:])
    assert first is second
    with pytest.raises(RecipeError, match=r"share one operator, but .* gives them 2 different ones"):
        model(VIT, kind="karat", mode="universal", blocks={"0-1": {"grid": 5}})


@pytest.mark.parametrize(
    ("host", "blocks", "message"),
    [
        (VIT, {"2-4": {"kind": "karat"}}, "attention.blocks.2-4: vit_mini_patch4_28 has the blocks 0 to 3"),
        (VIT, {"7": {"kind": "softmax"}}, "attention.blocks.7: vit_mini_patch4_28 has the blocks 0 to 3"),
        (CONVIT, {"1-3": {"kind": "karat"}}, "1-3: block 1 of convit_tiny keeps its own attention; only 2, 3 can"),
        (VIT, {"0": {"kind": "karat", "softmax_heads": 2}}, "leaves no head for KArAt in a layer of vit_mini"),
        (VIT, {"0": {"kind": "karat", "form": "smooth", "modes": 18}}, "modes = 18 is more than N = 17 tokens"),
    ],
)
def test_blocks_that_a_model_cannot_have_are_one_line(host, blocks, message) -> None:
    with pytest.raises(RecipeError, match=message):
        model(host, blocks=blocks)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "{8-11: {kind: karat}, 9: {kind: static}}",
            "attention.blocks.9: block 9 is also in 8-11; leave it in one of them",
        ),
        ("{8-11: {xyz: 3}}", "attention.blocks.8-11.xyz: unknown key; the keys are kind, basis, "),
        ("{8-11: softmax}", "attention.blocks.8-11 = 'softmax': should be a section of keys, such as {kind: karat}"),
        ("{8-11: {grid: true}}", "attention.blocks.8-11.grid = true: should be a number"),
        ("{8-11: {gird: 3}}", "attention.blocks.8-11.gird: unknown key; did you mean grid?"),
        ("{8-11: {grid: 50}}", "attention.blocks.8-11.grid = 50: should be at most 16"),
        ("{8: {orders: [1]}}", "attention.blocks.8.orders = [1]: too few values"),
        ("{8: {orders: [1, 99]}}", "attention.blocks.8.orders[1] = 99: should be at most 8"),
        (
            "{8: {simplex: hiden}}",
            "attention.blocks.8.simplex = 'hiden': should be true, false or 'hidden'; did you mean",
        ),
        ("{eight: {kind: karat}}", "attention.blocks.eight: should be the number of a block, such as 8, or a range"),
        ("{11-8: {kind: karat}}", "attention.blocks.11-8: its last block is before its first; swap the two"),
        ("{8: {}}", "attention.blocks.8: has no keys; give it some, such as {kind: karat}"),
        ("{8: 5}", "attention.blocks.8 = 5: should be a section of keys"),
        ("8-11", "attention.blocks = '8-11': should be a section for each range of blocks, such as {8-11: "),
        ("{8: {mode: universal}}", "attention.blocks.8.mode: holds for all blocks; set attention.mode"),
        ("{8: {kind: karat, basis: dog, init: fourier_kan}}", "attention.blocks.8: attention.init = fourier_kan needs"),
    ],
)
def test_blocks_that_mean_nothing_are_one_line(value: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("imagenet_vit_tiny", [f"attention.blocks={value}"])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_student_of_a_teachers_matrices_has_no_blocks_of_its_own() -> None:
    with pytest.raises(ValidationError, match="blocks has no effect with attention"):
        AttentionConfig(transfer_from="runs/x", blocks=LAST)


def test_a_recipe_says_and_keeps_its_blocks(tmp_path) -> None:
    recipe = load_recipe("imagenet_vit_tiny", ["attention.blocks={8-11: {kind: karat, grid: 5}, 3: {kind: static}}"])
    assert describe_attention(recipe.attention) == (
        "softmax attention; blocks 8-11: Kolmogorov-Arnold attention (fourier, modular, blockwise, grid 5, rank 12); "
        "block 3: a learned constant matrix as attention (blockwise)"
    )
    for basis, own in {"rational": "orders 5 and 4, ", "bspline": "grid 3, degree 3, ", "morlet": ""}.items():
        karat = load_recipe("imagenet_vit_tiny", ["attention.kind=karat", f"attention.basis={basis}"])
        assert describe_attention(karat.attention).endswith(f" ({basis}, modular, blockwise, {own}rank 12)")
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    other = load_recipe("imagenet_vit_tiny", ["attention.blocks.8-11.kind=karat"])
    assert differing_keys(recipe, other) == ["attention.blocks"]
    assert flatten(other)["attention.blocks"] == {"8-11": {"kind": "karat"}}


def test_weights_fit_the_blocks_they_were_trained_with_at_another_image_size() -> None:
    source, target = model(VIT, blocks=LAST), model({**VIT, "image_size": 24}, 1, blocks=LAST)
    assert "interpolated from" in take_weights(target, source.state_dict())
    own, other = (attention_layers(network)[3].attention.operator for network in (source, target))
    torch.testing.assert_close(other.cos_coef.sum(2), own.cos_coef.sum(2), rtol=0.2, atol=0.2)
    fresh = model(VIT, 1, blocks=LAST)
    assert "operators keep their initial values" in take_weights(fresh, model(VIT).state_dict())
    with pytest.raises(RecipeError, match=r"have no operator for blocks\.2\.attn, but the model has one; use"):
        take_weights(model(VIT, blocks={"2-3": LAST["3"]}), source.state_dict())
    sizes = ModelConfig(**VIT, num_classes=3)
    sections = [AttentionConfig(blocks={"3": {"kind": "karat", "base": base}}) for base in ("silu", "zero")]
    (difference,) = differences((sizes, sections[0]), (sizes, sections[1]))
    assert difference.startswith("attention.blocks = ")


def test_a_class_that_a_block_names_needs_trust() -> None:
    sections = {"model": VIT, "attention": {"blocks": {"3": {"kind": "karat", "basis": "somebodys:Class"}}}}
    with pytest.raises(UntrustedError, match="somebodys"):
        timm.create_model("karat", **sections)
