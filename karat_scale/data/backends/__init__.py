"""The sources of batches: one interface, and one row each in `karat_scale.foundation.tables.BACKENDS`."""

from dataclasses import replace
from pathlib import Path

from karat_scale.data.backends.images import Backend
from karat_scale.data.loading.assemble import ImageSpec
from karat_scale.data.shards.shard_format import must_answer, staged_copy
from karat_scale.foundation.stores import is_url
from karat_scale.foundation.tables import load

__all__ = ["Backend", "ImageSpec", "open_backend"]


def open_backend(spec: ImageSpec) -> Backend:
    """Open the backend of `data.backend`, on this node's copy of the data if there is one, and check the data.

    Raises DataError or RecipeError.
    """
    data = spec.data
    if data.row.files is not None:
        if copy := staged_copy(data.path):
            spec = replace(spec, data=data.changed(path=copy))
        if not is_url(spec.data.path):  # a store has its own time limit
            must_answer(Path(spec.data.path).expanduser(), data.timeout)
    backend: Backend = load(data.row.streams if data.is_stream else data.row.place)(spec)
    return backend
