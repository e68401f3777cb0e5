"""Where the training of a classifier stands: what a checkpoint's `state.json` says of it."""

from dataclasses import dataclass

from karat_scale.data.streams.progress import StreamState
from karat_scale.engine.run_state import RunState


@dataclass
class TrainState(RunState):
    """Of a run that trains a classifier. Scores are in percent."""

    scores = ("top1", "top5")

    best_top1: float | None = None
    best_top5: float | None = None
    last_top1: float | None = None
    last_top5: float | None = None
    data_digest: int = 0
    bad_samples: int = 0
    distilled_from: str = ""
    """The digest of the weights of `distill.from`."""
    image_size: int = 0
    """Of the model in the checkpoint, in a run with `schedule.image_sizes`."""
    stream: StreamState | None = None
    """Where the lanes stand, in a run with `data.order: stream`."""
