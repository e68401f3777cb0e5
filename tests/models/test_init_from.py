import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer

from karat_scale.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.models.init_from import take_weights
from karat_scale.recipe import AttentionConfig, ModelConfig

SMALL = {"name": "vit_mini_patch4_28", "image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def model(seed: int, image_size: int = 16, num_classes: int = 4, **attention: object) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes = {**SMALL, "image_size": image_size, "num_classes": num_classes}
    settings = {"kind": "karat", "grid": 2, "rank": 4, **attention}
    return create_model(ModelConfig(**sizes), AttentionConfig(**settings))


def same(left: VisionTransformer, right: VisionTransformer, but: str = "nothing") -> bool:
    other = right.state_dict()
    return all(torch.equal(x, other[name]) for name, x in left.state_dict().items() if but not in name)


@pytest.mark.parametrize("mode", ["blockwise", "universal"])
def test_the_same_model_takes_the_same_bits(mode: str) -> None:
    source, target = model(0, mode=mode), model(1, mode=mode)
    assert take_weights(target, source.state_dict()) == ""
    assert same(source, target)


def test_another_number_of_classes_gets_a_new_head() -> None:
    source, target = model(0), model(1, num_classes=7)
    head = target.head.weight.clone()
    assert take_weights(target, source.state_dict()) == "the head is new: 4 classes there, 7 here"
    assert torch.equal(target.head.weight, head)
    assert same(source, target, but="head.")
    with pytest.raises(RecipeError, match=r"head.weight is \[4, 32\] there and \[7, 32\] here"):
        take_weights(model(1, num_classes=7), source.state_dict(), new_head=False)


def test_softmax_weights_leave_the_operators_at_their_start() -> None:
    source, target, start = model(0, kind="softmax"), model(1), model(1)
    assert "operators are left at their start" in take_weights(target, source.state_dict())
    assert same(source, target)
    assert torch.equal(target.blocks[1].attn.operator.cos_coef, start.blocks[1].attn.operator.cos_coef)


@pytest.mark.parametrize("attention", [{}, {"mode": "universal"}, {"softmax_heads": 1}, {"basis": "bspline"}])
def test_a_residual_model_begins_as_the_softmax_model_whose_weights_it_takes(attention: dict[str, object]) -> None:
    source, target = model(0, kind="softmax"), model(1, residual=True, **attention)
    take_weights(target, source.state_dict())
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(target(images), source(images))


def test_another_image_size_interpolates_positions_and_operators() -> None:
    source, target = model(0), model(1, image_size=24)
    assert take_weights(target, source.state_dict()) == "interpolated from 4 x 4 patches"
    assert torch.equal(target.pos_embed, resample_abs_pos_embed(source.pos_embed, [6, 6]))
    before, after = source.blocks[0].attn.operator, target.blocks[0].attn.operator
    assert torch.equal(after.cos_coef[:, :, 0], before.cos_coef[:, :, 0])  # the class token
    torch.testing.assert_close(after.cos_coef[:, :, 1:].sum(2), before.cos_coef[:, :, 1:].sum(2), rtol=0.2, atol=0.2)


@pytest.mark.parametrize("image_size", [16, 24])
def test_a_model_without_class_token_leaves_out_theirs(image_size: int) -> None:
    source = model(0)
    torch.manual_seed(1)
    sizes = {**SMALL, "image_size": image_size, "num_classes": 4}
    attention = AttentionConfig(kind="karat", grid=2, rank=4)
    target = create_model(ModelConfig(**sizes), attention, class_token=False, global_pool="")
    assert take_weights(target, source.state_dict()).startswith("without its class token")
    before, after = source.blocks[0].attn.operator, target.blocks[0].attn.operator
    assert after.num_tokens == (image_size // 4) ** 2
    if image_size == 16:  # the same patches: the same numbers
        assert torch.equal(after.cos_coef, before.cos_coef[:, :, 1:])
        assert torch.equal(after.proj, before.proj[:, 1:])
        assert torch.equal(target.pos_embed, source.pos_embed[:, 1:])


@pytest.mark.parametrize(
    "attention",
    [
        {"softmax_heads": 1},
        {"residual": True},
        {"init": "softmax_like", "mode": "universal"},
        {"basis": "bspline"},
        {"basis": "rational", "form": "two_operators"},
        {"form": "full_rank"},
        {"mode": "universal"},
    ],
)
def test_every_kind_of_operator_goes_to_another_size_and_back(attention: dict[str, object]) -> None:
    source, larger, again = model(0, **attention), model(1, image_size=32, **attention), model(2, **attention)
    take_weights(larger, source.state_dict())
    take_weights(again, larger.state_dict())
    images = torch.randn(8, 3, 16, 16)
    assert again(images).isfinite().all()
    assert torch.equal(again.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


def test_one_operator_for_all_blocks_may_become_one_for_each_but_not_back() -> None:
    source, target = model(0, mode="universal"), model(1)
    take_weights(target, source.state_dict())
    assert same(target, source)
    with pytest.raises(RecipeError, match=r"blocks.0.* and blocks.1.* differ there .* use attention.mode=blockwise"):
        take_weights(model(1, mode="universal"), model(0).state_dict())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"grid": 3}, r"blocks.0.attn.operator.cos_coef is \[2, 4, 17, 3\] there, \[2, 4, 17, 2\] expected"),
        ({"basis": "bspline"}, "expected cos_coef, sin_coef, proj, not weight, coef, proj"),
    ],
)
def test_weights_of_another_operator_are_refused(other: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        take_weights(model(1), model(0, **other).state_dict())


def test_missing_and_unexpected_weights_are_named_and_counted() -> None:
    weights = model(0).state_dict()
    with pytest.raises(RecipeError, match=r"have blocks.9.mlp, which the model lacks; use the model"):
        take_weights(model(1), {**weights, "blocks.9.mlp": torch.zeros(1)})
    fewer = {name: x for name, x in weights.items() if ".mlp." not in name}
    with pytest.raises(RecipeError, match=r"lack blocks.0.mlp.fc1.bias and 7 more, which the model has"):
        take_weights(model(1), fewer)
    with pytest.raises(RecipeError, match=r"have .*operator.* and .* more, which the model lacks"):
        take_weights(model(1, kind="softmax"), weights)
