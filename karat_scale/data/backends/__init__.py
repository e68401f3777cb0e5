"""The sources of batches: one interface, one module per backend."""

from pathlib import Path

from karat_scale.data.backends.base import Backend
from karat_scale.data.formats.checks import must_answer
from karat_scale.data.staged import staged_copy
from karat_scale.recipe import AugmentConfig, DataConfig

__all__ = ["Backend", "open_backend"]


def open_backend(data: DataConfig, augment: AugmentConfig, image_size: int, num_classes: int, seed: int) -> Backend:
    """Open the backend of `data.backend`, on this node's copy of the data if there is one, and check the data.

    Raises DataError or RecipeError.
    """
    # A backend's library is imported only if it is used.
    if data.backend == "synthetic":
        from karat_scale.data.backends.synthetic import SyntheticBackend

        return SyntheticBackend(data, image_size, num_classes, seed)
    if copy := staged_copy(data.path):
        data = data.model_copy(update={"path": copy})
    must_answer(Path(data.path).expanduser(), data.timeout)
    if data.backend == "folder":
        from karat_scale.data.backends.folder import open_folder

        return open_folder(data, augment, image_size, num_classes, seed)
    if data.backend == "ffcv":
        from karat_scale.data.backends.ffcv import open_ffcv

        return open_ffcv(data, augment, image_size, num_classes, seed)
    if data.backend == "dali":
        from karat_scale.data.backends.dali import open_dali

        return open_dali(data, augment, image_size, num_classes, seed)
    from karat_scale.data.backends.webdataset import open_webdataset

    return open_webdataset(data, augment, image_size, num_classes, seed)
