"""Betons for tests, made by the project's script. Where FFCV is not installed, the test is skipped."""

from pathlib import Path

import pytest

from karat_scale.data.decoders.libraries import require_ffcv
from karat_scale.data.prepare.make_ffcv import main
from karat_scale.foundation.errors import RecipeError


def need_ffcv() -> None:
    """Skip the test, with the reason, where FFCV is not installed."""
    try:
        require_ffcv()
    except RecipeError as error:
        pytest.skip(str(error))


def make_betons(src: Path, *options: str) -> Path:
    """Make the betons of a source in a directory beside it, and return that directory."""
    need_ffcv()
    out = src.parent / f"{src.name}-betons"
    main(["--src", str(src), "--out", str(out), "--workers", "1", *options])
    return out
