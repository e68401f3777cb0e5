"""The README.md of a model in a hub: what it is, how it was trained, how to load and check it."""

import json
from collections.abc import Mapping

from torch import nn

from karat_scale.models import parameter_count
from karat_scale.models.describe import KARAT, describe_attention
from karat_scale.recipe import AttentionConfig

_CARD = """---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- karat_scale
---
# {title}

A {name} with {attention}, {parameters:,} parameters, for images of {size} px and {classes} classes. Trained by
karat_scale {version}; these are the {kind} weights after step {step}.

| | |
|---|---|
{rows}

## Use

```python
import karat_scale.timm_models  # from an installed clone of karat_scale
import timm
from PIL import Image, ImageOps

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()  # in a hub: "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")  # upright, as viewers show it
logits = model(transform(image).unsqueeze(0))
```

`model.pretrained_cfg["label_names"]` has the names of the classes, if they are known. `recipe.yaml` is the whole
recipe. `sha256sum -c SHA256SUMS` checks that no file has changed.
"""


def model_card(facts: Mapping[str, str], model: nn.Module, title: str) -> str:
    """Return the card, made only from the metadata."""
    config, attention, preprocessing = (json.loads(facts[key]) for key in ("model", "attention", "preprocessing"))
    has_top5 = config["num_classes"] > 5
    scores = [f"{float(facts[key]):.2f} %" for key in ("top1", *(["top5"] if has_top5 else [])) if key in facts]
    rows = {
        "Resize, short side": f"{int(preprocessing['input_size'][-1] / preprocessing['crop_pct'])} px, "
        f"{preprocessing['interpolation']}",
        "Centre crop": f"{preprocessing['input_size'][-1]} px",
        "Mean, standard deviation": f"{preprocessing['mean']}, {preprocessing['std']}, of RGB in [0, 1]",
        f"{'Top-1, top-5' if has_top5 else 'Top-1'} on its validation split": ", ".join(scores)
        or "not evaluated at this step",
        "Recipe, SHA-256": facts["recipe_sha256"],
        "Weights, SHA-256": facts["weights_sha256"],
    }
    return _CARD.format(
        title=title,
        name=config["name"],
        attention=_linked(describe_attention(AttentionConfig(**attention))),
        parameters=parameter_count(model),
        size=config["image_size"],
        classes=config["num_classes"],
        version=facts["karat_scale"],
        kind="averaged (EMA)" if facts["weights"] == "ema" else "raw",
        step=f"{int(facts['step']):,}",
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
    )


def _linked(attention: str) -> str:
    return attention.replace(KARAT, f"[{KARAT}](https://arxiv.org/abs/2503.10632)")
