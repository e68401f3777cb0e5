"""Folders that timm loads: a minimal one, and one for a model hub."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from karat_scale.checkpoint.weights import preprocessing
from karat_scale.errors import RunDirectoryError
from karat_scale.export.model_card import model_card
from karat_scale.export.source import Source
from karat_scale.files import file_sha256, flush_to_disk, write_atomically
from karat_scale.temporaries import temporary_folder

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
