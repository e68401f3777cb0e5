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
def test_a_model_has_the_classes_of_its_section_unless_others_are_asked_for(
    asked: dict[str, int], classes: int
) -> None:
    network = timm.create_model("karat", model={**VIT, "depth": 2}, attention=KARAT, **asked)
    assert network.num_classes == classes
    assert network(torch.zeros(1, 3, 16, 16)).shape == (1, classes or 32)
