from pathlib import Path

import pytest
import torch
from timm.layers import Attention

from karat_scale.attention import KaratOperator
from karat_scale.engine.distributed import ALONE
from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model
from karat_scale.recipe import AttentionConfig
from karat_scale.training.initial_weights import initialise
from karat_scale.training.tasks.detection.backbone import (
    ViTBackbone,
    build_vit,
    join_windows,
    split_windows,
    take_backbone_weights,
)

KARAT = AttentionConfig(kind="karat", grid=2, rank=4)


def operators(vit) -> list[KaratOperator]:
    return [module for module in vit.modules() if isinstance(module, KaratOperator)]


def test_windows_are_squares_of_the_map() -> None:
    tokens = torch.arange(2 * 36).view(2, 36, 1)
    windows = split_windows(tokens, 3)
    assert windows.shape == (8, 9, 1)
    assert windows[1, :, 0].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17]  # the upper right one
    assert torch.equal(join_windows(windows, 6, 3), tokens)


@pytest.mark.parametrize(
    ("kind", "global_blocks", "message"),
    [
        ("karat", 5, "detector.global_blocks = 5, but the model has 2 blocks, .* use 1 at most"),
        ("karat", 2, "no block would keep KArAt; use 1 at most"),
        ("softmax", 5, "the model has 2 blocks; use 2 at most"),
    ],
)
def test_more_global_blocks_than_there_are_to_give_are_refused(
    small, kind: str, global_blocks: int, message: str
) -> None:
    recipe = small(model={"image_size": 128}, detector={"global_blocks": global_blocks}, attention={"kind": kind})
    with pytest.raises(RecipeError, match=message):
        ViTBackbone(build_vit(recipe), recipe)


def test_softmax_may_see_the_whole_image_in_every_block(small) -> None:
    recipe = small(model={"image_size": 128}, detector={"global_blocks": 2}, attention={"kind": "softmax"})
    assert ViTBackbone(build_vit(recipe), recipe).global_blocks == {0, 1}


@pytest.mark.parametrize("global_blocks", [0, 1])
def test_n_is_that_of_a_window_whatever_the_image(small, global_blocks: int) -> None:
    torch.manual_seed(0)
    recipe = small(model={"image_size": 128}, detector={"global_blocks": global_blocks})
    backbone = ViTBackbone(build_vit(recipe), recipe).eval()
    assert {operator.num_tokens for operator in operators(backbone)} == {64}
    assert len(operators(backbone)) == 2 - global_blocks
    images = torch.randn(1, 3, 128, 128)
    changed = images.clone()
    changed[:, :, 64:, 64:] += 1.0
    before, after = (backbone.vit.patch_embed(x) for x in (images, changed))
    maps = [[level[..., 0, 0] for level in backbone(x).values()] for x in (images, changed)]
    assert not torch.equal(before, after)
    # Without a block that sees all, what happens in one window stays there, but for the pyramid's 3 x 3 convolutions.
    alone = all(torch.equal(a, b) for a, b in zip(*maps, strict=True))
    assert alone == (global_blocks == 0)


def test_one_window_is_the_plain_vit(small) -> None:
    recipe = small()
    vit = build_vit(recipe).eval()
    backbone = ViTBackbone(vit, recipe)
    images = torch.randn(2, 3, 64, 64)
    expected = backbone.pyramid(vit.forward_features(images).transpose(1, 2).reshape(2, 64, 8, 8))
    for name, level in backbone(images).items():
        torch.testing.assert_close(level, expected[name], msg=name)


def test_a_block_that_sees_all_keeps_the_weights_it_began_with(small) -> None:
    recipe = small(model={"image_size": 128}, detector={"global_blocks": 1})
    vit = build_vit(recipe)
    qkv = vit.blocks[1].attn.qkv.weight.clone()
    backbone = ViTBackbone(vit, recipe)
    assert type(backbone.vit.blocks[1].attn) is Attention
    assert torch.equal(backbone.vit.blocks[1].attn.qkv.weight, qkv)
    assert backbone.vit.pos_embed.shape == (1, 256, 64)


@pytest.mark.parametrize("attention", [AttentionConfig(), KARAT])
def test_a_classifiers_weights_lose_class_token_and_head(small, attention: AttentionConfig) -> None:
    torch.manual_seed(0)
    recipe = small()
    classifier = create_model(recipe.window_model, attention)  # 65 tokens
    vit = build_vit(recipe)
    start = operators(vit)[0].cos_coef.clone()
    notes = take_backbone_weights(vit, classifier.state_dict())
    assert notes.startswith("without its class token")
    assert torch.equal(vit.pos_embed, classifier.pos_embed[:, 1:])
    assert torch.equal(vit.blocks[1].mlp.fc1.weight, classifier.blocks[1].mlp.fc1.weight)
    if attention.kind == "karat":
        assert torch.equal(operators(vit)[0].cos_coef, operators(classifier)[0].cos_coef[:, :, 1:])
        assert torch.equal(operators(vit)[0].proj, operators(classifier)[0].proj[:, 1:])
    else:
        assert torch.equal(operators(vit)[0].cos_coef, start)
        assert "operators keep their initial values" in notes


def test_weights_of_another_width_are_refused(small) -> None:
    wide = create_model(small(model={"embed_dim": 96}).window_model, KARAT)
    with pytest.raises(RecipeError, match=r"96.* in the weights and .*64.* in the model"):
        take_backbone_weights(build_vit(small()), wide.state_dict())


def test_init_from_a_file_gives_the_backbone_its_weights(small, tmp_path: Path) -> None:
    classifier = create_model(small().window_model, AttentionConfig())
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    vit = build_vit(small())
    recipe = small().model_copy(update={"init_from": str(tmp_path / "classifier.pth")})
    line = initialise(vit, recipe, ALONE, take_backbone_weights)
    assert "without its class token; the attention operators keep their initial values" in line
    assert torch.equal(vit.blocks[0].attn.qkv.weight, classifier.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("name", ["convit_tiny", "swin_tiny_patch4_window7_224"])
def test_only_a_plain_vit_is_a_map(small, name: str) -> None:
    with pytest.raises(RecipeError, match=f"model.name = {name} is not a plain ViT"):
        build_vit(small(model={"name": name}))
