"""The commands that make and look at data. Each imports what it needs when it runs."""

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from karat_scale.foundation.arguments import count, new_file
from karat_scale.foundation.errors import DataError
from karat_scale.foundation.stores.connection import is_url

SCRIPTS = {
    "webdataset": "make_webdataset",
    "ffcv": "make_ffcv",
    "verify": "verify",
    "stage": "stage",
    "dali-index": "make_dali_index",
    "join": "join_splits",
    "fetch": "fetch",
}
"""The modules of `data/prepare` by the names that `karat prepare` has for them."""


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    prepare = commands.add_parser("prepare", help="make, check and copy data sets with the scripts of data_prep")
    prepare.add_argument("script", choices=SCRIPTS, help="the script; `karat prepare SCRIPT --help` lists its options")
    prepare.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own options")
    prepare.set_defaults(run=_prepare)

    index = commands.add_parser("index", help="make tars that others wrote readable like our shards, without a copy")
    index.add_argument("source", metavar="SRC", help="a directory or a URL with .tar files, also below it")
    index.add_argument("--out", type=Path, metavar="DIR", help="for indexes and dataset.json (default: SRC)")
    index.add_argument(
        "--label",
        default="auto",
        metavar="RULE",
        help="where the class is: cls, json:FIELD, txt, path or auto",
    )
    index.add_argument(
        "--split", action="append", default=[], metavar="NAME=GLOB", help="tars of a split (default: by their names)"
    )
    index.add_argument("--classes", type=Path, metavar="FILE", help="a name on each line, in the order of the labels")
    index.add_argument("--hash", action="store_true", help="also read the tars, to notice any later change in them")
    index.add_argument("--json", type=new_file, metavar="FILE", help="also write the counts to this file")
    index.set_defaults(run=_index)

    show = commands.add_parser("show", help="draw a batch as training sees it: augmented, mixed, with its targets")
    show.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    show.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as data.path=DIR")
    show.add_argument("--step", type=count, default=1, help="the training step (default: %(default)s)")
    show.add_argument("--images", type=count, default=32, help="at most this many (default: %(default)s)")
    show.add_argument("--out", metavar="FILE", help="a PNG (default: RUN.DIR-step-N.png)")
    show.set_defaults(run=_show)

    data = commands.add_parser("data", help="look at a data set: counts, sizes, odd files, and a page of samples")
    data.add_argument("path", metavar="PATH", help="shards, betons, or a folder with train/<class>/<image>")
    data.add_argument("--images", type=count, default=1000, help="sampled for their size (default: %(default)s)")
    data.add_argument("--classes", type=count, default=50, help="shown with samples (default: %(default)s)")
    data.add_argument("--out", metavar="FILE", help="an HTML file (default: PATH/data.html)")
    data.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    data.set_defaults(run=_data)


def _prepare(options: argparse.Namespace) -> int:
    """Become the script: its output, signals and exit code are those of this process."""
    for option, value in itertools.pairwise([word for text in options.arguments for word in text.split("=", 1)]):
        # The script would say so, too, after seconds of imports.
        if option == "--src" and not is_url(value) and not Path(value).expanduser().exists():
            raise DataError(f"--src {value}: there is no such file or directory")
    module = f"karat_scale.data.prepare.{SCRIPTS[options.script]}"
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *options.arguments])


def _index(options: argparse.Namespace) -> int:
    from karat_scale.data.indexing.command import IndexRequest, index_tars
    from karat_scale.data.shards.shard_format import dataset_directory

    splits = tuple(options.split)
    request = IndexRequest(
        dataset_directory(options.source),
        options.out,
        options.label,
        splits,
        options.classes,
        options.hash,
        options.json,
    )
    return index_tars(request)


def _show(options: argparse.Namespace) -> int:
    from karat_scale.data.shards.shard_format import check_data_path
    from karat_scale.recipe.loading import load_recipe

    check_data_path(load_recipe(options.recipe, options.overrides).data)
    from karat_scale.commands.look.batch import show_batch

    return show_batch(options.recipe, options.overrides, options.step, options.images, options.out)


def _data(options: argparse.Namespace) -> int:
    from karat_scale.commands.look.data_set import look_at_data

    return look_at_data(options.path, options.images, options.classes, options.out, options.json)
