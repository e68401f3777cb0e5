"""Import this and timm knows `karat`: any model of a recipe, and what `karat export` wrote as a folder.

    import karat_scale.timm_models
    import timm

    model = timm.create_model("local-dir:FOLDER", pretrained=True)

A new head (`num_classes=`), another image size (`img_size=`) and `features_only=True` work as for timm's own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from karat_scale.models import create_model
from karat_scale.models.init_from import take_weights
from karat_scale.models.init_operators import spread_operator
from karat_scale.recipe import AttentionConfig, ModelConfig
from karat_scale.trust import require_trust

_FEATURE_MAPS = 3
"""The number of feature maps of `features_only` without `out_indices`, if the model has as many."""


@register_model
def karat(
    pretrained: bool = False,
    model: Mapping[str, Any] | None = None,
    attention: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's entry point.

    Args:
        pretrained: load the weights that timm's `pretrained_cfg` names.
        model, attention: a recipe's sections.
        kwargs: timm's own; of a model's arguments `num_classes`, `img_size`, `drop_path_rate`, `proj_drop_rate`.

    Raises:
        ValueError: an argument that these models do not have.
        UserError: the model cannot be built.
    """
    if model is None:
        raise ValueError("karat needs model={...} and attention={...}, or a folder of karat export: local-dir:FOLDER")
    sections = (dict(model), dict(attention or {}))
    require_trust(AttentionConfig(**sections[1]), "timm's configuration of this model")
    if "num_classes" in model:  # else timm asks for the 1,000 of its default configuration
        kwargs.setdefault("num_classes", model["num_classes"])
    features: dict[str, Any] = {"feature_cls": "getter"}
    if kwargs.get("features_only") and "out_indices" not in kwargs:
        features["out_indices"] = min(_FEATURE_MAPS, _levels(sections))
    return build_model_with_cfg(
        _build,
        "karat",
        pretrained,
        pretrained_filter_fn=_fit,
        feature_cfg=features,
        sections=sections,
        **kwargs,
    )


def _build(
    sections: tuple[dict[str, Any], dict[str, Any]],
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    drop_path_rate: float | None = None,
    proj_drop_rate: float | None = None,
    **unknown: Any,
) -> nn.Module:
    sizes = (img_size, img_size) if isinstance(img_size, int) else img_size
    if in_chans != 3 or unknown or (sizes and sizes[0] != sizes[1]):
        raise ValueError(f"karat models take square RGB images and no {', '.join(unknown) or 'other'} arguments")
    asked = {"image_size": sizes and sizes[0], "drop_path": drop_path_rate, "proj_drop": proj_drop_rate}
    config = ModelConfig(**{**sections[0], **{key: value for key, value in asked.items() if value is not None}})
    built = create_model(config, AttentionConfig(**sections[1]))
    timms: Any = built
    if num_classes not in (None, timms.num_classes):
        timms.reset_classifier(num_classes)
    return built


def _levels(sections: tuple[dict[str, Any], dict[str, Any]]) -> int:
    """Return the number of feature maps of a model: that of its blocks or its stages."""
    with torch.device("meta"):
        built: Any = create_model(ModelConfig(**sections[0]), AttentionConfig(**sections[1]))
    return len(built.feature_info)


def _fit(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights under every name the model has for them, interpolated where its images are of another size."""
    own = model.state_dict()
    whole = spread_operator(model, weights)
    classifiers = model.pretrained_cfg["classifier"]
    head = tuple(f"{name}." for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    fitting = (whole[name].shape == x.shape for name, x in own.items() if name in whole and not name.startswith(head))
    if all(fitting):
        return whole
    take_weights(model, {name: x for name, x in whole.items() if name in own})
    fitted: dict[str, Tensor] = model.state_dict()
    return fitted
