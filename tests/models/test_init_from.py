import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import VisionTransformer

from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.models.init_from import differences, take_weights
from karat_scale.recipe import AttentionConfig, ModelConfig

SMALL = {"name": "vit_mini_patch4_28", "image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def model(
    seed: int, image_size: int = 16, num_classes: int = 4, sizes: dict[str, object] | None = None, **attention: object
) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes = {**SMALL, "image_size": image_size, "num_classes": num_classes, **(sizes or {})}
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


@pytest.mark.parametrize(
    "attention",
    [
        {"kind": "static"},
        {"kind": "static_softmax"},
        {"kind": "softmax_bias"},
        {"kind": "query_only"},
        {"kind": "centred", "softmax_heads": 1},
        {"form": "smooth", "modes": 4},
        {"form": "content"},
        {"kind": "scaled_softmax"},
        {"softmax_heads": 1},
        {"residual": True},
        {"init": "softmax_like", "mode": "universal"},
        {"basis": "bspline"},
        {"basis": "rational", "form": "two_operators"},
        {"form": "full_rank"},
        {"mode": "universal"},
    ],
    ids=str,
)
def test_every_kind_of_operator_goes_to_another_size_and_back(attention: dict[str, object]) -> None:
    source, target = model(0, **attention), model(1, image_size=24, **attention)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01)
    line = take_weights(target, source.state_dict())
    assert line == ("" if attention.get("kind") == "scaled_softmax" else "interpolated from 4 x 4 patches")
    assert target(torch.randn(2, 3, 24, 24)).isfinite().all()
    back = model(2, **attention)
    take_weights(back, target.state_dict())
    assert [x.shape for x in back.state_dict().values()] == [x.shape for x in source.state_dict().values()]
    assert back(torch.randn(8, 3, 16, 16)).isfinite().all()
    assert torch.equal(back.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    again = model(3, **attention)
    assert take_weights(again, source.state_dict()) == ""
    assert same(source, again)


def test_another_number_of_classes_gets_a_new_head() -> None:
    source, target = model(0), model(1, num_classes=7)
    head = target.head.weight.clone()
    assert take_weights(target, source.state_dict()) == "the head is new: the weights have 4 classes, the model 7"
    assert torch.equal(target.head.weight, head)
    assert same(source, target, but="head.")
    with pytest.raises(RecipeError, match=r"head.weight is \[4, 32\] in the weights and \[7, 32\] in the model"):
        take_weights(model(1, num_classes=7), source.state_dict(), new_head=False)


def test_softmax_weights_leave_the_operators_at_their_start() -> None:
    source, target, start = model(0, kind="softmax"), model(1), model(1)
    assert "operators keep their initial values" in take_weights(target, source.state_dict())
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
    if image_size == 16:  # the same patches, so the same numbers
        assert torch.equal(after.cos_coef, before.cos_coef[:, :, 1:])
        assert torch.equal(after.proj, before.proj[:, 1:])
        assert torch.equal(target.pos_embed, source.pos_embed[:, 1:])


def test_one_operator_for_all_blocks_may_become_one_for_each_but_not_back() -> None:
    source, target = model(0, mode="universal"), model(1)
    take_weights(target, source.state_dict())
    assert same(target, source)
    with pytest.raises(
        RecipeError, match=r"blocks.0.* and blocks.1.* differ in the weights.* use attention.mode=blockwise"
    ):
        take_weights(model(1, mode="universal"), model(0).state_dict())


def test_weights_of_another_model_are_named_and_counted() -> None:
    weights = model(0).state_dict()
    fewer = {name: x for name, x in weights.items() if ".mlp." not in name}
    there = r"blocks.0.attn.operator: "
    for target, given, message in (
        (model(1), model(0, grid=3).state_dict(), rf"{there}cos_coef is \[2, 4, 17, 3\] there, \[2, 4, 17, 2\] exp"),
        (
            model(1),
            model(0, basis="bspline").state_dict(),
            f"{there}expected cos_coef, sin_coef, proj, not weight, coef, proj",
        ),
        (model(1), {**weights, "blocks.9.mlp": torch.zeros(1)}, "have blocks.9.mlp, which the model lacks; use the mo"),
        (model(1), fewer, "lack blocks.0.mlp.fc1.bias and 7 more, which the model has"),
        (model(1, kind="softmax"), weights, "have .*operator.* and .* more, which the model lacks"),
    ):
        with pytest.raises(RecipeError, match=message):
            take_weights(target, given)


@pytest.mark.parametrize("form", ["modular", "full_rank"])
@pytest.mark.parametrize("image_size", [16, 24])
def test_a_class_token_that_the_weights_lack_is_new(image_size: int, form: str) -> None:
    source, target = model(0, sizes={"pool": "avg"}, form=form), model(1, image_size=image_size, form=form)
    start = model(1, image_size=image_size, form=form)
    notes = take_weights(target, source.state_dict())
    assert notes.startswith("with a new class token")
    assert torch.equal(target.cls_token, start.cls_token)
    assert torch.equal(target.pos_embed[:, 0], start.pos_embed[:, 0])
    before, after, fresh = (x.blocks[0].attn.operator.cos_coef for x in (source, target, start))
    assert torch.equal(after[:, :, 0], fresh[:, :, 0])
    patches = after[:, :, 1:] if form == "modular" else after[:, 1:, 1:]
    if form == "full_rank":
        assert torch.equal(after[:, 0], fresh[:, 0])
    if image_size == 16:
        assert torch.equal(target.pos_embed[:, 1:], source.pos_embed)
        assert torch.equal(patches, before)


def deit(distilled: bool, attention: AttentionConfig) -> VisionTransformer:
    torch.manual_seed(int(distilled))
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    return create_model(ModelConfig(**{**SMALL, "name": name, "num_classes": 4}), attention)


@pytest.mark.parametrize("attention", [AttentionConfig(), AttentionConfig(kind="karat", grid=2, rank=4)])
def test_a_distillation_token_and_its_head_come_and_go(attention: AttentionConfig) -> None:
    plain, distilled, start = deit(False, attention), deit(True, attention), deit(True, attention)
    assert take_weights(distilled, plain.state_dict()) == "with a new distillation token"
    assert torch.equal(distilled.head_dist.weight, start.head_dist.weight)
    assert torch.equal(distilled.pos_embed[:, 1], start.pos_embed[:, 1])
    again = deit(False, attention)
    torch.nn.init.zeros_(again.pos_embed)
    assert take_weights(again, distilled.state_dict()) == "without its distillation token"
    assert all(torch.equal(x, plain.state_dict()[name]) for name, x in again.state_dict().items())


@pytest.mark.parametrize("kind", ["softmax", "karat"])
def test_positions_and_operators_of_a_pit_go_to_another_size(kind: str) -> None:
    attention = AttentionConfig(kind=kind, **({"rank": 2} if kind == "karat" else {}))
    small, large = (create_model(ModelConfig(name="pit_ti_224", image_size=size), attention) for size in (48, 80))
    with torch.no_grad():
        small.pos_embed.copy_(torch.linspace(0, 1, small.pos_embed.shape[-1]).expand_as(small.pos_embed))
    take_weights(large, small.state_dict())
    left, *_, right = large.pos_embed[0, 0, 0].tolist()
    assert left < 0.2 < 0.8 < right
    assert torch.equal(large.head.weight, small.head.weight)


def test_positions_of_prefix_tokens_may_be_in_the_tokens_themselves() -> None:
    """Weights go both ways between models with positions for all tokens and with positions for patches alone.

    The first block gets the same input.
    """

    def registers(**options: object) -> VisionTransformer:
        torch.manual_seed(0)
        built = create_model(ModelConfig(**SMALL), AttentionConfig(), reg_tokens=2, **options).eval()
        for token in (built.cls_token, built.reg_token):
            torch.nn.init.normal_(token)
        return built

    images = torch.randn(2, 3, 16, 16)
    for source, target in (({}, {"no_embed_class": True}), ({"no_embed_class": True}, {})):
        left, right = registers(**source), registers(**target)
        assert take_weights(right, left.state_dict()) == ""
        torch.testing.assert_close(left(images), right(images))


@pytest.mark.parametrize(
    ("name", "damaged", "message"),
    [
        (
            "pos_embed",
            torch.zeros(1, 15, 32),
            "pos_embed in the weights has 15 positions: not 1 prefix tokens and a square",
        ),
        ("pos_embed", torch.zeros(3), r"pos_embed is \[3\] in the weights and \[1, 17, 32\] in the model"),
        ("pos_embed", torch.zeros(1, 26, 16), "pos_embed has a width of 16 in the weights and 32 in the model"),
        ("cls_token", torch.zeros(32), r"cls_token is \[32\] in the weights and \[1, 1, 32\] in the model"),
        ("patch_embed.proj.weight", torch.zeros(()), r"patch_embed.proj.weight is \[\] in the weights"),
        ("patch_embed.proj.weight", torch.zeros(32, 5), "cannot be adapted to a VisionTransformer: shape"),
        ("head.bias", torch.zeros(()), r"head.bias is \[\] in the weights and \[4\] in the model"),
        (
            "blocks.1.mlp.fc1.bias",
            torch.full((128,), torch.nan),
            "fc1.bias in the weights has numbers that are not finite",
        ),
        (
            "blocks.1.attn.operator.proj",
            torch.full((2, 17, 4), torch.inf),
            "proj in the weights has numbers that are not finite",
        ),
        ("pos_embed", torch.zeros(1, 26, 32, dtype=torch.int32), "pos_embed in the weights is torch.int32"),
        ("norm.weight", torch.ones(32, dtype=torch.bool), "norm.weight in the weights is torch.bool"),
    ],
)
def test_a_damaged_tensor_is_named(name: str, damaged: torch.Tensor, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        take_weights(model(1), {**model(0).state_dict(), name: damaged})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("image_size", [16, 24])
def test_a_fixed_position_embedding_is_the_one_that_the_weights_had(image_size: int) -> None:
    """Before the fix, the computed one replaced the one of a run whose images had grown, which resamples it."""
    fixed, said = {"pos_embed": "sincos2d"}, "its position embedding is not the computed one, and stays as it is"
    target = model(1, image_size=image_size, sizes=fixed)
    for source, notes in ((model(0), 1), (model(0, sizes=fixed), image_size != 16)):
        assert take_weights(target, source.state_dict()).count(said) == notes
        assert torch.equal(target.pos_embed, resample_abs_pos_embed(source.pos_embed, [image_size // 4] * 2))
        assert not target.pos_embed.requires_grad
        grown = model(2, image_size=image_size, sizes=fixed)
        take_weights(grown, target.state_dict())
        assert torch.equal(grown.pos_embed, target.pos_embed)


def test_a_resampled_patch_embedding_is_told() -> None:
    source, target = model(0), model(1, image_size=32, sizes={"patch_size": 8})
    assert take_weights(target, source.state_dict()) == "the patch embedding is resampled from 4 x 4 pixels"


SWIN = {"name": "swin_mini_patch2_window4_32", "image_size": 32, "num_classes": 4}
CONVIT = {**SMALL, "name": "convit_tiny", "num_classes": 4}
KARAT = AttentionConfig(kind="karat", grid=2, rank=4)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ({**SMALL, "depth": 2}, {**SMALL, "depth": 3}, "have 2 blocks, the model has 3; use model.depth=2"),
        ({**SMALL, "depth": 2}, {**SMALL, "depth": 1}, "have 2 blocks, the model has 1; use model.depth=2"),
        ({**CONVIT, "depth": 4}, {**CONVIT, "depth": 5}, "have 4 blocks, the model has 5; use model.depth=4"),
        (SWIN, SMALL, "have no operator for blocks.0.attn and 1 more, .* use the model.name"),
        (SMALL, SWIN, "have no operator for layers.0.blocks.0.attn and 3 more, .* use the model.name"),
        ({**CONVIT, "depth": 4}, {**SMALL, "depth": 4}, "have no operator for blocks.0.attn and 1 more"),
    ],
)
def test_operators_of_other_blocks_are_refused(there: dict[str, object], here: dict[str, object], message: str) -> None:
    weights = create_model(ModelConfig(**there), KARAT).state_dict()
    with pytest.raises(RecipeError, match=message):
        take_weights(create_model(ModelConfig(**here), KARAT), weights)


@pytest.mark.parametrize(
    ("there", "here", "field"),
    [
        ({}, {"residual": True}, "attention.residual=false and no attention.kind=static_softmax"),
        ({"residual": True}, {}, "attention.residual=true or attention.kind=static_softmax"),
        ({"kind": "static_softmax"}, {"kind": "static"}, "attention.residual=true or attention.kind=static_softmax"),
        ({}, {"softmax_heads": 1}, "attention.softmax_heads=0"),
        ({"softmax_heads": 1}, {}, "attention.softmax_heads=1"),
        ({"softmax_heads": 1, "residual": True}, {"residual": True}, "attention.softmax_heads=1"),
        ({"form": "content"}, {}, "attention.form=content"),
        ({}, {"form": "content"}, "another attention.form than content"),
        ({"form": "content", "residual": True}, {"residual": True}, "attention.form=content"),
        ({"form": "content", "softmax_heads": 1}, {"softmax_heads": 1}, "attention.form=content"),
        ({"bound": 2.0}, {}, "a number as attention.bound"),
        ({}, {"bound": 2.0}, "attention.bound=null"),
        ({"bound": 2.0, "form": "content", "softmax_heads": 1}, {"bound": 2.0}, "attention.softmax_heads=1"),
        ({"scores": False}, {}, "attention.scores=false"),
        ({}, {"scores": False}, "attention.scores=true"),
        ({"scores": False, "softmax_heads": 1}, {"softmax_heads": 1}, "attention.scores=false"),
        ({"softmax_heads": 1}, {"scores": False}, "attention.softmax_heads=1"),
        ({"kind": "centred"}, {}, "attention.kind=centred"),
        ({}, {"kind": "centred"}, "another attention.kind than centred"),
        ({"kind": "centred", "softmax_heads": 1}, {"kind": "centred"}, "attention.softmax_heads=1"),
    ],
)
def test_what_wraps_an_operator_is_told_by_its_field(there, here, field) -> None:
    with pytest.raises(RecipeError, match=f"blocks.0.attn.operator was trained with {field}, but the recipe has "):
        take_weights(model(1, **here), model(0, **there).state_dict())


def test_splines_of_equal_number_differ_by_grid_and_degree() -> None:
    sizes = ModelConfig(**SMALL)
    there, here = ({"kind": "karat", "basis": "bspline", "grid": g, "degree": k} for g, k in ((4, 2), (3, 3)))
    take_weights(model(1, **here), model(0, **there).state_dict())  # the shapes are the same
    assert differences((sizes, AttentionConfig(**there)), (sizes, AttentionConfig(**here))) == [
        "attention.grid = 4 in the weights, 3 here",
        "attention.degree = 2 in the weights, 3 here",
    ]


def test_kinds_without_parameters_differ_by_name() -> None:
    sizes = ModelConfig(**SMALL)
    there, here = AttentionConfig(), AttentionConfig(kind="sigmoid")
    assert take_weights(model(1, kind="sigmoid"), model(0, kind="softmax").state_dict()) == ""
    assert differences((sizes, there), (sizes, here)) == ["attention.kind = softmax in the weights, sigmoid here"]
    assert differences((sizes, there), (sizes, AttentionConfig(kind="karat"))) == []
    hybrid = AttentionConfig(kind="sigmoid", softmax_heads=1)
    assert differences((sizes, hybrid), (sizes, here)) == ["attention.softmax_heads = 1 in the weights, 0 here"]


def test_only_keys_that_a_kind_takes_differ() -> None:
    sizes = ModelConfig(**SMALL)
    there, here = AttentionConfig(kind="centred", base="silu", degree=2), AttentionConfig(kind="centred")
    assert differences((sizes, there), (sizes, here)) == ["attention.base = silu in the weights, zero here"]


@pytest.mark.parametrize("mode", ["universal", "blockwise"])
@pytest.mark.parametrize("attention", [{}, {"residual": True}])
def test_an_operator_stored_once_is_every_layers(mode: str, attention: dict[str, object]) -> None:
    source, target = model(0, mode="universal", **attention), model(1, mode=mode, **attention)
    once = {name: x for name, x in source.state_dict().items() if "blocks.1.attn.operator" not in name}
    assert take_weights(target, once) == ""
    assert same(target, source)
