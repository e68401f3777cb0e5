import torch

from karat_scale.training.tasks.detection.backbone import LEVELS, SimpleFeaturePyramid


def test_the_levels_have_vitdets_strides() -> None:
    pyramid = SimpleFeaturePyramid(width=16, channels=8)
    maps = pyramid(torch.randn(2, 16, 14, 14))
    assert {name: 14 / level.shape[-1] for name, level in maps.items()} == {**LEVELS, "pool": 3.5}  # it rounds up
    assert [tuple(level.shape) for level in maps.values()] == [(2, 8, side, side) for side in (56, 28, 14, 7, 4)]
    assert torch.equal(maps["pool"], maps["3"][:, :, ::2, ::2])


def test_a_level_is_normalised_over_channels_and_local() -> None:
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(width=16, channels=8)
    x = torch.randn(1, 16, 14, 14)
    maps = pyramid(x)
    torch.testing.assert_close(maps["2"].mean(1), torch.zeros(1, 14, 14), atol=1e-5, rtol=0)
    x[:, :, 13, 13] += 1.0  # one corner reaches the same corner of every map, and not the other
    for name, level in pyramid(x).items():
        assert torch.equal(level[..., 0, 0], maps[name][..., 0, 0])
        assert not torch.equal(level[..., -1, -1], maps[name][..., -1, -1])
