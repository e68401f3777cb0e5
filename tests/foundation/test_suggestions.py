"""Which name is suggested."""

import pytest

from karat_scale.foundation.errors import nearest

NAMES = ("gcvit_tiny", "vit_small_patch16_224", "vit_tiny_patch16_224", "vit_tiny_patch16_384", "swin_tiny")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("vit_tinny", "vit_tiny_patch16_224"),
        ("vit_tny_patch16_384", "vit_tiny_patch16_384"),
        ("vit_smal", "vit_small_patch16_224"),
        ("gcvit_tinny", "gcvit_tiny"),
    ],
)
def test_the_beginning_goes_before_the_whole(name: str, meant: str) -> None:
    assert nearest(name, NAMES) == [meant]


def test_nothing_alike_is_none() -> None:
    assert nearest("resnet", NAMES) == []


def test_as_many_as_asked_for_and_the_nearest_first() -> None:
    assert nearest("vit_tiny", NAMES, count=2) == ["vit_tiny_patch16_224", "vit_tiny_patch16_384"]
