"""What the command line says about how a source is read."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Encoding = Literal["png", "jpeg"]


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read.

    val_labels, synsets: files with ImageNet's validation labels, as val_labels.py has them. encoding: of images that a
    source holds as raw pixels; None takes the source's own. any_hash: read files of a published data set that have
    another hash than the published one.
    """

    val_labels: Path | None = None
    synsets: Path | None = None
    encoding: Encoding | None = None
    any_hash: bool = False

    @classmethod
    def of(cls, options: argparse.Namespace) -> "SourceOptions":
        """Those of a script's command line."""
        return cls(options.val_labels, options.synsets, options.encoding, options.any_hash)
