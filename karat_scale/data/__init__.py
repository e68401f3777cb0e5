"""Turn shards into an exact sequence of batches: order, plan, reading, decoding, augmentation, mixing.

`ExactLoader`, `EvalLoader` and `SampleFiles` are for any training loop.
"""

from typing import TYPE_CHECKING, Any

from karat_scale.foundation.tables import load

if TYPE_CHECKING:
    from karat_scale.data.backends.own import SampleFiles
    from karat_scale.data.exact import EvalLoader, ExactLoader

__all__ = ["EvalLoader", "ExactLoader", "SampleFiles"]


def __getattr__(name: str) -> Any:
    # Not imported before they are used: every module below this package runs this file first.
    if name in __all__:
        return load(f"karat_scale.data.{'backends.own' if name == 'SampleFiles' else 'exact'}:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
