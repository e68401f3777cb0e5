"""TorchScript: a traced model that `torch.jit.load` runs without this package or timm. torch has deprecated it."""

import io
import json
import warnings
from pathlib import Path

import torch

from karat_scale.errors import UserError
from karat_scale.export.likeness import check_likeness, example_images
from karat_scale.export.source import Source
from karat_scale.files import replace_file

FACTS = "karat_scale.json"
"""The extra file inside, which `torch.jit.load(path, _extra_files={FACTS: ""})` fills."""


def write_torchscript(source: Source, path: Path) -> str:
    """Trace the model on normalised images [B, 3, S, S] for any B; returns a note on what was checked.

    Raises:
        UserError: the model cannot be traced, or its logits differ.
        OSError: `path` cannot be written.
    """
    model = source.traceable_model()
    size = source.recipe.model.image_size
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about checks of shapes, which are fixed except for the batch; and deprecation
        try:
            traced = torch.jit.trace(model, example_images(size, 2), check_trace=False)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise UserError(f"the model cannot be traced: {reason}; use --format safetensors") from error
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer, _extra_files={FACTS: json.dumps(source.facts)})
    buffer.seek(0)
    difference = check_likeness(model, torch.jit.load(buffer), size)
    replace_file(path, buffer.getvalue())
    return f"logits within {difference:.1e}; torch has deprecated TorchScript, and torch-export takes its place"
