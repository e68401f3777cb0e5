"""timm's entry `karat`: any model of a recipe, and the folders that `karat export` wrote.

    import karat_scale.timm_models
    import timm

    model = timm.create_model("local-dir:FOLDER", pretrained=True)

The import makes timm know the entry. A new head (`num_classes=`), another image size (`img_size=`), other channels
(`in_chans=`), another pooling (`global_pool=`) and `features_only=True` work as for timm's own models.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from karat_scale.foundation.tables import require_trust
from karat_scale.models import create_model
from karat_scale.models.init_from import spread_operator, take_weights
from karat_scale.recipe import AttentionConfig, ModelConfig

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
        kwargs: timm's own arguments; of a model's arguments `num_classes`, `img_size`, `in_chans`, `global_pool`,
            `drop_path_rate`, `proj_drop_rate`.

    Raises:
        ValueError: an argument that these models do not have.
        UserError: the model cannot be built.
    """
    if model is None:
        raise ValueError("karat needs model={...} and attention={...}, or a folder of karat export: local-dir:FOLDER")
    sections = (dict(model), dict(attention or {}))
    require_trust(AttentionConfig(**sections[1]).classes, "timm's configuration of this model")
    if "num_classes" in model:  # else timm asks for the 1,000 of its default configuration
        kwargs.setdefault("num_classes", model["num_classes"])
    features: dict[str, Any] = {"feature_cls": "getter"}
    if kwargs.get("features_only") and "out_indices" not in kwargs:
        features["out_indices"] = min(_FEATURE_MAPS, _levels(sections))
    return build_model_with_cfg(
        _build, "karat", pretrained, pretrained_filter_fn=_fit, feature_cfg=features, sections=sections, **kwargs
    )


def _build(
    sections: tuple[dict[str, Any], dict[str, Any]],
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    global_pool: str | None = None,
    drop_path_rate: float | None = None,
    proj_drop_rate: float | None = None,
    **unknown: Any,
) -> nn.Module:
    if unknown:
        raise ValueError(f"karat models have no argument {', '.join(unknown)}; set model={{...}} and attention={{...}}")
    sizes = (img_size, img_size) if isinstance(img_size, int) else img_size
    if sizes and sizes[0] != sizes[1]:
        raise ValueError(f"img_size = {sizes}: karat models take square images")
    asked = {"image_size": sizes and sizes[0], "drop_path": drop_path_rate, "proj_drop": proj_drop_rate}
    config = ModelConfig(**{**sections[0], **{key: value for key, value in asked.items() if value is not None}})
    channels = {} if in_chans == 3 else {"in_chans": in_chans}
    built: Any = create_model(config, AttentionConfig(**sections[1]), **channels)
    if global_pool is not None or num_classes not in (None, built.num_classes):
        try:
            built.reset_classifier(built.num_classes if num_classes is None else num_classes, global_pool)
        except (AssertionError, TypeError) as error:
            raise ValueError(f"global_pool = {global_pool!r} is not a pooling of {config.name}: {error}") from error
    network: nn.Module = built
    return network


def _levels(sections: tuple[dict[str, Any], dict[str, Any]]) -> int:
    """Return the number of feature maps of a model: the number of its blocks or its stages."""
    with torch.device("meta"):
        built: Any = create_model(ModelConfig(**sections[0]), AttentionConfig(**sections[1]))
    return len(built.feature_info)


def _fit(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return weights under every name the model has for them, interpolated if its images have another size.

    Weights for another number of channels are left as they are, since timm converts them.
    """
    own = model.state_dict()
    whole = spread_operator(model, weights)
    head = tuple(f"{name}." for name in _names(model.pretrained_cfg["classifier"]))
    stem = {f"{name}.weight" for name in _names(model.pretrained_cfg["first_conv"])}
    stem = {name for name in stem if name in whole and whole[name].shape[1] != own[name].shape[1]}
    compared = [name for name in own if name in whole and not name.startswith(head) and name not in stem]
    if all(whole[name].shape == own[name].shape for name in compared):
        return whole
    take_weights(model, {name: x for name, x in whole.items() if name in own} | {name: own[name] for name in stem})
    fitted: dict[str, Tensor] = model.state_dict()
    return fitted | {name: whole[name] for name in stem}


def _names(layers: str | Sequence[str]) -> Sequence[str]:
    return [layers] if isinstance(layers, str) else layers
