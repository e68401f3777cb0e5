"""The fixtures that build small engines."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.small_engines import make_checkpoints, make_engine, small_recipe, whole_zero3

__all__ = ["make_checkpoints", "make_engine", "small_recipe", "whole_zero3"]


@pytest.fixture
def unlisted() -> Callable[[Path], AbstractContextManager[None]]:
    """Return a context manager in which the system refuses to list a directory, also for root."""

    @contextmanager
    def refusing(directory: Path) -> Iterator[None]:
        scan = os.scandir

        def scandir(path: Any = ".") -> Any:
            if path == directory:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return scan(path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "scandir", scandir)
            yield

    return refusing
