"""torch.export: a graph in a `.pt2` file that `torch.export.load` runs without this package or timm."""

import io
import json
import warnings
from pathlib import Path

import torch

from karat_scale.commands.export.likeness import check_likeness, example_images
from karat_scale.commands.export.source import Source
from karat_scale.foundation.errors import UserError, one_line
from karat_scale.foundation.files import replace_file

FACTS = "karat_scale.json"
"""The extra file inside, which `torch.export.load(path, extra_files={FACTS: ""})` fills."""


def write_torch_export(source: Source, path: Path) -> str:
    """Export the model on normalised images [B, 3, S, S] for any B; returns a note on what was checked.

    Raises:
        UserError: the model cannot be exported, or its logits differ.
        OSError: `path` cannot be written.
    """
    model = source.traceable_model()
    size = source.recipe.model.image_size
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            shapes = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(model, (example_images(size, 2),), dynamic_shapes=shapes)
            torch.export.save(program, buffer, extra_files={FACTS: json.dumps(source.facts)})
        except Exception as error:  # torch.export raises many kinds
            reason = one_line(error)
            raise UserError(f"the model cannot be exported: {reason}; use --format safetensors") from error
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
    difference = check_likeness(model, loaded, size)
    replace_file(path, buffer.getvalue())
    return f"logits within {difference:.1e}"
