import io
import pickle
from typing import Any

import pytest
import timm
import torch

import karat_scale.timm_models  # noqa: F401

KARAT = {"kind": "karat", "grid": 2, "rank": 4}
VIT = {"name": "vit_mini_patch4_28", "image_size": 16, "embed_dim": 32, "num_heads": 2, "num_classes": 4}


@pytest.mark.parametrize(
    ("model", "sides"),
    [
        ({**VIT, "depth": 2}, [4, 4]),
        ({**VIT, "depth": 4}, [4, 4, 4]),
        ({"name": "swin_mini_patch2_window4_32", "image_size": 16, "num_classes": 4}, [8, 4]),
    ],
)
def test_a_model_has_as_many_feature_maps_as_it_can_up_to_three(model: dict[str, object], sides: list[int]) -> None:
    network = timm.create_model("karat", model=model, attention=KARAT, features_only=True)
    maps = network(torch.zeros(1, 3, 16, 16))
    assert [x.shape[-1] for x in maps] == sides


@pytest.mark.parametrize(("asked", "classes"), [({}, 4), ({"num_classes": 7}, 7), ({"num_classes": 0}, 0)])
def test_a_model_has_the_classes_of_its_section_unless_others_are_asked_for(asked, classes) -> None:
    network = timm.create_model("karat", model={**VIT, "depth": 2}, attention=KARAT, **asked)
    assert network.num_classes == classes
    assert network(torch.zeros(1, 3, 16, 16)).shape == (1, classes or 32)


HOSTS: list[dict[str, Any]] = [
    {**VIT, "depth": 2},
    {"name": "swin_mini_patch2_window4_32", "image_size": 16, "num_classes": 4},
    {"name": "convit_tiny", "image_size": 32, "depth": 3, "num_heads": 4, "embed_dim": 48, "num_classes": 4},
]


def images(model: dict[str, Any], channels: int = 3) -> torch.Tensor:
    return torch.randn(1, channels, model["image_size"], model["image_size"])


@pytest.mark.parametrize("model", HOSTS, ids=lambda model: model["name"])
@pytest.mark.parametrize("attention", [KARAT, {"kind": "karat", "basis": "bspline"}, {"kind": "softmax"}])
def test_a_model_is_saved_whole_and_pickled(model: dict[str, Any], attention: dict[str, Any]) -> None:
    network = timm.create_model("karat", model=model, attention=attention).eval()
    whole = io.BytesIO()
    torch.save(network, whole)
    whole.seek(0)
    x = images(model)
    for copy in (torch.load(whole, weights_only=False), pickle.loads(pickle.dumps(network))):
        assert torch.equal(copy(x), network(x))


@pytest.mark.parametrize("model", HOSTS, ids=lambda model: model["name"])
def test_other_channels_take_the_weights_of_three_as_timms_models_do(model: dict[str, Any]) -> None:
    network = timm.create_model("karat", model=model, attention=KARAT).eval()
    config: dict[str, Any] = {"state_dict": network.state_dict(), "first_conv": "patch_embed.proj"}
    config |= {
        "input_size": (3, 16, 16),
        "num_classes": 4,
        "classifier": "head.fc" if "swin" in model["name"] else "head",
    }
    options: dict[str, Any] = {"pretrained": True, "pretrained_cfg": config, "in_chans": 1}
    grey = timm.create_model("karat", model=model, attention=KARAT, **options).eval()
    x = images(model, channels=1)
    # timm sums the filters over the channels, so that a grey image gives what it gives as RGB.
    torch.testing.assert_close(grey(x), network(x.repeat(1, 3, 1, 1)), rtol=1e-4, atol=1e-5)
    larger = timm.create_model("karat", model=model, attention=KARAT, img_size=2 * model["image_size"], **options)
    assert larger(torch.zeros(1, 1, 2 * model["image_size"], 2 * model["image_size"])).shape == (1, 4)


def test_another_pooling_is_timms() -> None:
    model = HOSTS[0]
    network = timm.create_model("karat", model=model, attention=KARAT, global_pool="avg").eval()
    tokens = network.forward_features(images(model))
    assert torch.allclose(network.forward_head(tokens), network.head(tokens[:, 1:].mean(1)), atol=1e-6)
    assert timm.create_model("karat", model=model, attention=KARAT, global_pool="")(images(model)).shape == (1, 17, 4)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"global_pool": "sum"}, "global_pool = 'sum' is not a pooling of vit_mini_patch4_28"),
        ({"img_size": (16, 12)}, r"img_size = \(16, 12\): karat models take square images"),
        ({"qkv_bias": False}, "no argument qkv_bias; set model={...} and attention={...}"),
    ],
)
def test_what_a_model_does_not_have_is_named(argument: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        timm.create_model("karat", model=HOSTS[0], attention=KARAT, **argument)
