"""The options that several scripts share."""

import argparse
import re
from pathlib import Path

from karat_scale.data.shards.shard_format import dataset_directory
from karat_scale.foundation.arguments import OneLineParser, count
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.machine import usable_cores

DECODED_BELOW = 100_000
"""Images of a source that are all decoded by default: it takes a minute, and finds a truncated photograph."""


def make_parser(description: str, writes: bool = True) -> OneLineParser:
    """Return a parser with the options of every script, or of every script that writes."""
    parser = OneLineParser(description=description, allow_abbrev=False)
    if not writes:
        return parser
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write to")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and write nothing")
    return parser


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of scripts that convert a source: where it is, its images and their order, and odd ones."""
    parser.add_argument("--src", type=Path, required=True, metavar="DIR", help="the directory of the images")
    parser.add_argument("--split", metavar="NAME", help="make only this split (default: all)")
    _add_workers(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the order in the output (default 0)")
    parser.add_argument("--subset", type=count, metavar="N", help="only N images of each class, drawn by the seed")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="divide the only split into train and val, this share of each class",
    )
    held_out.add_argument("--val-count", type=count, metavar="N", help="the same, so many images over all classes")
    parser.add_argument(
        "--check",
        choices=("header", "decode"),
        help=f"read only headers, or decode every image (default: decode below {DECODED_BELOW:,} images)",
    )
    parser.add_argument(
        "--on-odd",
        choices=("convert", "keep", "skip", "stop"),
        default="keep",
        help="what to do with CMYK, misnamed images and corrupt EXIF (default keep); images that cannot be decoded are "
        "skipped, or stop",
    )
    parser.add_argument(
        "--exif",
        choices=("turn", "keep"),
        help="pictures with an EXIF orientation: store them upright, or leave them to --on-odd "
        "(default turn; keep for ImageNet, whose published results are without turning)",
    )
    parser.add_argument(
        "--encoding",
        choices=("png", "jpeg"),
        help="encoding of images that are raw pixels: PNG, lossless, or JPEG (default png; for IDX files jpeg)",
    )
    parser.add_argument(
        "--any-hash",
        action="store_true",
        help="accept a published data set of which files have another hash, or Parquet files are missing",
    )
    parser.add_argument("--image-column", metavar="NAME", help="Parquet: the column of images, if several could be")
    parser.add_argument("--label-column", metavar="NAME", help="Parquet: the column of labels, if several could be")
    parser.add_argument("--val-labels", type=Path, metavar="FILE", help="ImageNet's validation labels")
    parser.add_argument("--synsets", type=Path, metavar="FILE", help="`number wnid` lines for the devkit's numbers")
    parser.add_argument("--names", type=Path, metavar="FILE", help="`wnid name` lines: readable names of the classes")


def check_source_options(options: argparse.Namespace) -> None:
    """Refuse a split that is not a plain name, a wrong share, and files that do not exist. Raises DataError."""
    if options.split is not None and not re.fullmatch(r"\w+", options.split):
        raise DataError(f"--split {options.split!r} is not a name; use letters, digits and _")
    if options.val_fraction is not None and not 0 < options.val_fraction < 1:
        raise DataError(f"--val-fraction {options.val_fraction} is not between 0 and 1")
    if options.split is not None and (options.val_fraction is not None or options.val_count is not None):
        raise DataError(
            "--val-fraction and --val-count make train and val of a source with one split; remove --split, or give "
            "that split's folder as --src"
        )
    for name in ("val_labels", "synsets", "names"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            raise DataError(f"--{name.replace('_', '-')} {path}: the file does not exist")


def settle_check(options: argparse.Namespace, images: int) -> None:
    """Choose `--check` by the number of images, where the command line does not."""
    options.check = options.check or ("decode" if images < DECODED_BELOW else "header")


def add_shard_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of scripts that read finished shards."""
    parser.add_argument("--src", type=dataset_directory, required=True, metavar="DIR", help="shards, also at a URL")
    parser.add_argument("--split", metavar="NAME", help="use only this split (default: all)")
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=count, default=usable_cores(), metavar="N", help="processes (default: cores)")
