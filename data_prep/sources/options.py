"""The options of the command line that say how a source is read."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Encoding = Literal["png", "jpeg"]


@dataclass(frozen=True)
class SourceOptions:
    """Options for reading a source.

    val_labels, synsets: files with ImageNet's validation labels, as in val_labels.py. encoding: of images that a
    source holds as raw pixels; None uses the source's own. any_hash: accept files of a published data set with
    another hash than the published one.
    """

    val_labels: Path | None = None
    synsets: Path | None = None
    encoding: Encoding | None = None
    any_hash: bool = False

    @classmethod
    def of(cls, options: argparse.Namespace) -> "SourceOptions":
        """Return the options from a script's command line."""
        return cls(options.val_labels, options.synsets, options.encoding, options.any_hash)
