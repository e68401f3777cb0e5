"""Graphs of a model that run without this package and timm: ONNX, and torch.export.

onnxruntime and others run the ONNX file without Python. `torch.export.load` runs the `.pt2` file.
"""

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from karat_scale.commands.export.command import Source, check_likeness, example_images
from karat_scale.foundation.errors import UserError, one_line
from karat_scale.foundation.files import replace_file
from karat_scale.foundation.tables import how_to_install

_NEEDS = ("onnx", "onnxscript", "onnxruntime")


def write_onnx(source: Source, path: Path) -> str:
    """Write float32 `images` [batch, 3, S, S], normalised, to `logits` [batch, classes] for any batch.

    The metadata is in its `metadata_props`. Returns a note on what was checked with onnxruntime.

    Raises:
        UserError: a package is missing, or the model's logits differ.
        OSError: `path` cannot be written.
    """
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format onnx needs {', '.join(missing)}; {how_to_install('export')}")
    model, facts = source.traceable_model(), source.facts
    size = source.run.recipe.model.image_size
    try:
        proto = _convert(model, example_images(size, 2))
        for key, value in facts.items():
            proto.metadata_props.add(key=key, value=value)
        content = proto.SerializeToString()
    except Exception as error:  # from torch.export, onnxscript, onnx and, above 2 GB, protobuf
        reason = one_line(error.__cause__ or error)
        raise UserError(f"the model cannot be written as ONNX: {reason}; use --format torch-export") from error
    difference = check_likeness(model, onnx_session(content), size)
    replace_file(path, content)
    return f"logits within {difference:.1e} in onnxruntime, opset {proto.opset_import[0].version}"


def onnx_session(model: bytes | str) -> Callable[[Tensor], Tensor]:
    """Return an ONNX model, its bytes or its path, as a function of images that onnxruntime runs on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return run


def _convert(model: nn.Module, images: Tensor) -> Any:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    return program.model_proto


FACTS = "karat_scale.json"
"""The extra file inside, which `torch.export.load(path, extra_files={FACTS: ""})` fills."""


def write_torch_export(source: Source, path: Path) -> str:
    """Export the model on normalised images [B, 3, S, S] for any B; returns a note on what was checked.

    Raises:
        UserError: the model cannot be exported, or its logits differ.
        OSError: `path` cannot be written.
    """
    model = source.traceable_model()
    size = source.run.recipe.model.image_size
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
