"""What a model card says of the attention."""

import json

import pytest
from torch import nn

from karat_scale.commands.export.command import model_card
from karat_scale.recipe import AttentionConfig, ModelConfig

FACTS = {
    "model": ModelConfig().model_dump_json(),
    "preprocessing": json.dumps(
        {"input_size": [3, 16, 16], "crop_pct": 1, "interpolation": "bicubic", "mean": 0, "std": 1}
    ),
    "recipe_sha256": "0",
    "weights_sha256": "1",
    "karat_scale": "2",
    "weights": "ema",
    "step": "3",
}
KARAT = "[Kolmogorov-Arnold attention](https://arxiv.org/abs/2503.10632)"


@pytest.mark.parametrize(
    ("attention", "said"),
    [
        ({}, "softmax attention"),
        ({"kind": "karat"}, f"{KARAT} (fourier, modular, blockwise, grid 3, rank 12)"),
        (
            {"kind": "karat", "simplex": True, "residual": True, "softmax_heads": 2},
            f"{KARAT} (fourier, modular, blockwise, grid 3, rank 12, on the simplex, residual, 2 softmax heads)",
        ),
        (
            {"kind": "karat", "scores": False},
            f"a variant of {KARAT} (fourier, modular, blockwise, grid 3, rank 12, without scores)",
        ),
        ({"kind": "karat", "form": "content"}, f"a variant of {KARAT} (fourier, content, blockwise, grid 3, rank 12)"),
        ({"kind": "static", "mode": "universal"}, "a learned constant matrix as attention (universal)"),
        ({"kind": "static_softmax"}, "softmax attention plus a learned constant matrix (blockwise)"),
        ({"kind": "scaled_softmax"}, "softmax attention times a learned gain (blockwise)"),
    ],
)
def test_the_attention_is_that_of_the_recipe(attention: dict[str, object], said: str) -> None:
    facts = {**FACTS, "attention": AttentionConfig(**attention).model_dump_json()}
    assert f"A vit_tiny_patch16_224 with {said}, 6 parameters, " in model_card(facts, nn.Linear(2, 2), "owls")


def test_its_snippet_turns_photographs_as_predict_does() -> None:
    card = model_card({**FACTS, "attention": AttentionConfig().model_dump_json()}, nn.Linear(2, 2), "owls")
    assert 'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")' in card
