"""KArAt in a model that is already built: weights stay, and it computes what a model built with KArAt computes."""

import pytest
import timm
import torch

from karat_scale.foundation.errors import RecipeError
from karat_scale.models import create_model, swap_attention
from karat_scale.recipe import AttentionConfig, ModelConfig
from tests.models.test_variants import HOSTS

KINDS = ("vit", "swin", "convit")


@pytest.mark.parametrize("host", KINDS)
def test_what_starts_as_softmax_changes_nothing(host: str) -> None:
    torch.manual_seed(0)
    model = ModelConfig(**HOSTS[host], num_classes=3)
    network = create_model(model, AttentionConfig()).eval()
    images = torch.randn(2, 3, model.image_size, model.image_size)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        before = network(images)
        swap_attention(network, AttentionConfig(kind="karat", rank=3, grid=2, residual=True), model.image_size)
        torch.testing.assert_close(network(images), before, rtol=1e-5, atol=1e-6)
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert any(".operator." in name for name in after)


def test_it_is_the_model_that_a_recipe_builds() -> None:
    model = ModelConfig(**HOSTS["vit"], num_classes=3)
    attention = AttentionConfig(kind="karat", rank=3, grid=2)
    built = create_model(model, attention).eval()
    network = create_model(model, AttentionConfig()).eval()
    swap_attention(network, attention, model.image_size)
    network.load_state_dict(built.state_dict())
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(network(images), built(images))


def test_operators_have_the_dtype_of_their_layer_and_others_keep_theirs() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).bfloat16()
    network.norm.float()
    swap_attention(network, AttentionConfig(kind="karat"), image_size=32)
    wide = {name for name, parameter in network.named_parameters() if parameter.dtype != torch.bfloat16}
    assert wide == {"norm.weight", "norm.bias"}


def test_what_cannot_be_swapped_is_one_line() -> None:
    with torch.device("meta"):
        swapped = timm.create_model("vit_tiny_patch16_224", depth=1)
        swap_attention(swapped, AttentionConfig(kind="karat"))
        tied = timm.create_model("vit_tiny_patch16_224", depth=2)
        tied.blocks[1].attn = tied.blocks[0].attn
        for network, section, said in (
            ("vit_tiny_patch16_224", {}, "attention.kind = softmax is what the model has"),
            ("vit_tiny_patch16_384", {"kind": "karat"}, "image_size = 224 does not fit VisionTransformer"),
            ("vit_tiny_patch16_224", {"kind": "karat", "softmax_heads": 5}, "softmax_heads = 5 leaves no head"),
            ("resnet18", {"kind": "karat"}, "it has no attention that KArAt can replace"),
            (swapped, {"kind": "karat"}, "has learned attention already"),
            (tied, {"kind": "karat"}, "blocks of this VisionTransformer share an attention layer; give each its own"),
        ):
            network = timm.create_model(network) if isinstance(network, str) else network
            with pytest.raises(RecipeError, match=said):
                swap_attention(network, AttentionConfig(**section))


@pytest.mark.parametrize("host", KINDS)
def test_dropout_of_the_matrix_is_refused_and_nothing_has_changed(host: str) -> None:
    model = ModelConfig(**HOSTS[host], num_classes=3)
    network = create_model(model, AttentionConfig(), attn_drop_rate=0.1)
    classes = [type(module) for module in network.modules()]
    with pytest.raises(RecipeError, match="attn_drop has no meaning for KArAt: the attention matrix is never formed"):
        swap_attention(network, AttentionConfig(kind="karat", rank=3), model.image_size)
    assert [type(module) for module in network.modules()] == classes


def test_a_section_that_a_later_block_refuses_changes_none() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, embed_dim=45, num_heads=3)
    classes = [type(module) for module in network.modules()]
    section = AttentionConfig(kind="karat", blocks={"2": {"kind": "differential"}})  # needs heads of an even width
    with pytest.raises(RecipeError, match="differential"):
        swap_attention(network, section, 32)
    assert [type(module) for module in network.modules()] == classes


def test_images_that_are_not_square() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=1, num_classes=3)
    swap_attention(network, AttentionConfig(kind="karat"), (32, 64))
    assert network(torch.zeros(2, 3, 32, 64)).shape == (2, 3)
    assert network.blocks[0].attn.operator.num_tokens == 9


@pytest.mark.parametrize(("key", "value"), [("form", "smooth"), ("init", "softmax_like")])
def test_modes_of_a_square_are_refused_for_other_images(key: str, value: str) -> None:
    own = {"kind": "karat", key: value}
    for section in (own, {"blocks": {"0": own}}):
        network = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=1, num_classes=3)
        said = rf"attention.{key} = {value} needs square images, but image_size = \(32, 64\); use attention.{key}="
        with pytest.raises(RecipeError, match=said):
            swap_attention(network, AttentionConfig(**section), (32, 64))
    swap_attention(network, AttentionConfig(kind="karat", form="full_rank", init="softmax_like"), (32, 64))
    square = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    swap_attention(square, AttentionConfig(**own, rank=3, **({"modes": 4} if key == "form" else {})), (32, 32))


def test_a_model_of_other_channels() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, in_chans=1, num_classes=3)
    swap_attention(network, AttentionConfig(kind="karat"), image_size=32)
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
