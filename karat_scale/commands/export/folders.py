"""Folders that timm loads: a minimal one, and one for a model hub, with its README.md.

The README.md says what the model is, how it was trained, and how to load and check it. The folder is uploaded to the
Hugging Face hub, or to the server that HF_ENDPOINT names.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from karat_scale.checkpoint.weights import preprocessing
from karat_scale.commands.export.source import Source
from karat_scale.foundation.errors import RunDirectoryError, UserError, one_line
from karat_scale.foundation.files import file_sha256, flush_to_disk, temporary_folder, write_atomically
from karat_scale.models import parameter_count
from karat_scale.recipe import AttentionConfig
from karat_scale.recipe.attention import KARAT, describe_attention


def check_push(repository: str) -> None:
    """Raise UserError if the name is no USER/NAME, or nobody is logged in; before anything is exported."""
    from huggingface_hub import get_token

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repository):
        raise UserError(f"--push {repository}: should be USER/NAME, such as jane/owls")
    if get_token() is None:
        raise UserError(f"--push {repository}: not logged in to the hub; run `hf auth login`, or set HF_TOKEN")


def push_folder(folder: Path, repository: str, private: bool) -> str:
    """Upload all files in one commit. Returns the repository's address.

    Args:
        private: make it private if there is none yet; else it is as its owner's are.

    Raises:
        UserError: the hub refuses it or cannot be reached; the same command tries again.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by karat export")
    except Exception as error:  # of the hub's client, and of the HTTP library below it
        raise UserError(f"--push {repository}: {one_line(error)}; nothing else is lost, try again") from error
    return str(url)


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


CONFIG, WEIGHTS, RECIPE, CARD, SUMS = "config.json", "model.safetensors", "recipe.yaml", "README.md", "SHA256SUMS"


def write_timm_folder(source: Source, path: Path) -> str:
    """Write config.json in timm's form and model.safetensors, for `timm.create_model("local-dir:...")`.

    Raises:
        UserError: the model needs a teacher, or `path` is a folder that is not empty.
        OSError: `path` cannot be written.
    """
    return _write(path, _timm_files(source))


def write_hub_folder(source: Source, path: Path) -> str:
    """Write the same with the recipe, a model card and every file's SHA-256. Raises the same as `write_timm_folder`."""
    card = model_card(source.facts, source.model, source.recipe.run.name)
    return _write(
        path, {**_timm_files(source), RECIPE: source.facts["recipe"].encode(), CARD: card.encode()}, sums=True
    )


def _timm_files(source: Source) -> dict[str, bytes]:
    source.refuse_student()
    return {
        CONFIG: (json.dumps(timm_config(source), indent=2) + "\n").encode(),
        WEIGHTS: save(_state_once(source.model), source.facts),
    }


def timm_config(source: Source) -> dict[str, Any]:
    """Return what timm reads for `local-dir:` and `hf-hub:`: the entry point, its arguments, and the pretrained_cfg."""
    facts, model = source.facts, source.model
    attention = {**json.loads(facts["attention"]), "implementation": "auto"}  # for the reader's machine
    classes = json.loads(facts.get("classes", "[]"))
    return {
        "architecture": "karat",
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": {"model": json.loads(facts["model"]), "attention": attention},
        "pretrained_cfg": {
            **preprocessing(source.recipe),
            "fixed_input_size": True,
            "num_classes": model.num_classes,
            **{key: model.pretrained_cfg[key] for key in ("first_conv", "classifier")},
            **({"label_names": classes} if classes else {}),
        },
        "karat_scale": facts,
    }


def _state_once(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the state with shared parameters once; `karat_scale.timm_models` shares them again."""
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in names}


def _write(path: Path, files: dict[str, bytes], sums: bool = False) -> str:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunDirectoryError(f"{path} exists already; remove it or choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as unfinished:
        for name, content in files.items():
            write_atomically(unfinished / name, content)
        if sums:
            lines = [f"{file_sha256(unfinished / name)}  {name}\n" for name in sorted(files)]
            write_atomically(unfinished / SUMS, "".join(lines))
        unfinished.chmod(0o755)
        unfinished.replace(path)
        flush_to_disk(path.parent)
    return f"{len(files) + sums} files"
