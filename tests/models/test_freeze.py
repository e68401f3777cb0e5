import pytest

from karat_scale.foundation.errors import RecipeError
from karat_scale.models.layers import freeze
from tests.models.test_init_from import model


def test_patterns_freeze_what_they_match() -> None:
    vit = model(0)
    line = freeze(vit, ["patch_embed.*", "blocks.0.*", "*.operator.proj"])
    frozen = {name for name, parameter in vit.named_parameters() if not parameter.requires_grad}
    assert "blocks.0.norm1.weight" in frozen
    assert "blocks.1.attn.operator.proj" in frozen
    assert {"blocks.1.attn.operator.cos_coef", "head.bias", "cls_token"}.isdisjoint(frozen)
    assert line.endswith("parameters are frozen")


def test_a_pattern_that_matches_nothing_and_one_that_leaves_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"train.freeze = blocs.\*: matches no parameter; .* cls_token"):
        freeze(model(0), ["blocs.*"])
    with pytest.raises(RecipeError, match=r"train.freeze = \[\*\] leaves no parameter to train"):
        freeze(model(0), ["*"])
