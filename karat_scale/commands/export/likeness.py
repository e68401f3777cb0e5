"""Check that an exported model computes the same logits as its source."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from karat_scale.foundation.errors import RunDirectoryError

TOLERANCE = 1e-4
BATCHES = (1, 3)
_FIX = "it is not written; use --format safetensors, and please report this recipe"


def example_images(image_size: int, batch: int) -> Tensor:
    """Return normal noise [batch, 3, S, S], which resembles normalised images; always the same."""
    return torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(batch))


def check_likeness(model: nn.Module, exported: Callable[[Tensor], Tensor], image_size: int) -> float:
    """Return the largest difference of a logit over batches of several sizes.

    Raises:
        RunDirectoryError: the model fails, or the difference exceeds 1e-4 of max(largest logit, 1).
    """
    worst = 0.0
    for batch in BATCHES:
        images = example_images(image_size, batch)
        with torch.no_grad():
            expected = model(images)
            try:
                got = exported(images)
            except Exception as error:  # of the runtime
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise RunDirectoryError(f"the exported model fails on a batch of {batch}: {reason}; {_FIX}") from error
        difference = float((got - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise RunDirectoryError(
                f"the exported model's logits differ by {difference:.1e} from the trained model's; {_FIX}"
            )
        worst = max(worst, difference)
    return worst
