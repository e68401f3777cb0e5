"""Whether an exported model answers as the one it was made from."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from karat_scale.errors import RunDirectoryError

TOLERANCE = 1e-4
BATCHES = (1, 3)
_MEND = "it is not written; use --format safetensors, and please report this recipe"


def example_images(image_size: int, batch: int) -> Tensor:
    """Normal noise [batch, 3, S, S], which is what normalised images are to a model; always the same."""
    return torch.randn(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(batch))


def check_likeness(model: nn.Module, exported: Callable[[Tensor], Tensor], image_size: int) -> float:
    """The largest difference of a logit over batches of several sizes.

    Raises:
        RunDirectoryError: it is more than 1e-4 of the largest logit, or of 1 where all are smaller, or it fails.
    """
    worst = 0.0
    for batch in BATCHES:
        images = example_images(image_size, batch)
        with torch.no_grad():
            expected = model(images)
            try:
                got = exported(images)
            except Exception as error:  # of whatever runs it
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise RunDirectoryError(f"the exported model fails on a batch of {batch}: {reason}; {_MEND}") from error
        difference = float((got - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise RunDirectoryError(
                f"the exported model's logits differ by {difference:.1e} from the trained one's; {_MEND}"
            )
        worst = max(worst, difference)
    return worst
