"""Images of a run through its model, with the attention matrices of each block in view."""

import torch
from torch import nn

from karat_scale.commands.analyze.result import Settings
from karat_scale.commands.analyze.trained_run import TrainedRun
from karat_scale.commands.analyze.validation_images import ValidationImages
from karat_scale.models.attention_matrices import Visit, watched


@torch.no_grad()
def visit_images(
    model: nn.Module, run: TrainedRun, images: ValidationImages, settings: Settings, what: str, visit: Visit
) -> int:
    """Call `visit` for each block on each batch of images, and show the progress as `what`; return their number."""
    done = 0
    with watched(model, visit):
        for batch, _ in images.batches(settings.batch, run.device):
            model(batch)
            done += len(batch)
            settings.progress(what, done, len(images))
    return done
