"""The parsers of the commands before training: data, recipes, plans, and a check of the machine."""

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

from karat_scale.data.prepare import DECODED_BELOW, SCRIPTS
from karat_scale.foundation.arguments import (
    add_json,
    add_recipe,
    add_trust,
    call,
    command,
    count,
    positive,
)
from karat_scale.foundation.errors import DataError, UserError
from karat_scale.foundation.machine import known_gpu
from karat_scale.foundation.stores import is_url
from karat_scale.foundation.tables import SCHEMAS, load

SECONDS = 20.0  # of the timed run of karat doctor


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    prepare = commands.add_parser(
        "prepare",
        help="make, check and copy data sets with the scripts of data_prep",
        epilog="fetch downloads a data set, and webdataset makes shards of a folder, of ImageNet's tars or of Parquet; "
        "ffcv makes betons. verify checks shards, stage copies them to a local disk, join adds splits of another set, "
        "and dali-index writes what DALI reads them with.",
    )
    prepare.add_argument("script", choices=SCRIPTS, help="the script; `karat prepare SCRIPT --help` lists its options")
    prepare.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own options")
    prepare.set_defaults(run=_prepare)

    index = commands.add_parser("index", help="make tars that others wrote readable like our shards, without a copy")
    index.add_argument("source", metavar="SRC", help="a directory or a URL with .tar files, also below it")
    index.add_argument(
        "--out", type=Path, metavar="DIR", help="directory for the indexes and dataset.json (default: SRC)"
    )
    index.add_argument(
        "--label", default="auto", metavar="RULE", help="where the class is: cls, json:FIELD, txt, path or auto"
    )
    by_name = "tars of a split (default: by their names)"
    index.add_argument("--split", dest="splits", action="append", default=[], metavar="NAME=GLOB", help=by_name)
    index.add_argument("--classes", type=Path, metavar="FILE", help="a name on each line, in the order of the labels")
    index.add_argument(
        "--hash", dest="with_hashes", action="store_true", help="also read the tars, to notice any later change in them"
    )
    add_json(index, "write the counts to this file")
    index.set_defaults(run=_index)

    show = commands.add_parser("show", help="draw a batch as training sees it: augmented, mixed, with its targets")
    add_recipe(show, "data.path=DIR")
    show.add_argument("--step", type=count, default=1, help="the training step (default: %(default)s)")
    show.add_argument("--images", type=count, default=32, help="at most this many (default: %(default)s)")
    show.add_argument("--out", metavar="FILE", help="a PNG (default: RUN.DIR-step-N.png)")
    show.set_defaults(run=command("karat_scale.commands.look.command:show_batch", _check_data))

    data = commands.add_parser("data", help="look at a data set: counts, sizes, odd files, and a page of samples")
    data.add_argument("path", metavar="PATH", help="shards, FFCV's betons, or a folder with train/<class>/<image>")
    sampled = f"images to measure and decode; a split below {DECODED_BELOW:,} is decoded whole (default: %(default)s)"
    data.add_argument("--images", type=count, default=1000, help=sampled)
    data.add_argument("--classes", type=count, default=50, help="classes to show samples of (default: %(default)s)")
    data.add_argument("--out", metavar="FILE", default="data.html", help="an HTML file (default: %(default)s)")
    add_json(data)
    data.set_defaults(run=command("karat_scale.commands.look.command:look_at_data"))

    recipes = commands.add_parser("recipes", help="list the shipped recipes, what they train, and their results")
    recipes.add_argument("words", nargs="*", metavar="WORD", help="a recipe's name, or words to search for")
    add_json(recipes, "write the list to this file")
    recipes.set_defaults(run=command("karat_scale.recipe.catalog:list_recipes"))

    explain = commands.add_parser("explain", help="say what a key of a recipe means, and what it may change")
    explain.add_argument("keys", nargs="*", metavar="KEY", help="a key, a section, or another tool's name for one")
    explain.add_argument("--detection", action="store_true", help="keys of karat detect's recipes")
    explain.set_defaults(run=_explain)

    plan = commands.add_parser("plan", help="estimate memory, ZeRO stage, micro batch and time, and find mistakes")
    plan.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    overrides = "such as train.precision=bf16; another RECIPE is shown side by side, with the same keys"
    plan.add_argument("overrides", nargs="*", default=[], metavar="RECIPE or key=value", help=overrides)
    plan.add_argument("--gpus", type=count, default=1, help="total number of ranks (default: %(default)s)")
    plan.add_argument("--gpu", metavar="NAME", help="the GPU, such as h100-80 (default: this machine's RAM)")
    plan.add_argument(
        "--memory", type=positive, metavar="GB", help="memory of a GPU that --gpu does not know, or RAM of each rank"
    )
    plan.add_argument(
        "--gpus-per-node", type=count, default=8, metavar="N", help="GPUs of a node (default: %(default)s)"
    )
    plan.add_argument(
        "--cores-per-gpu",
        type=count,
        default=12,
        metavar="N",
        help="CPU cores that decode for a GPU (default: %(default)s)",
    )
    plan.add_argument("--step-time", type=positive, metavar="S", help="measured seconds of one micro batch on one GPU")
    curve = "show the predicted throughput from 1 to 1,024 GPUs"
    plan.add_argument("--curve", dest="with_curve", action="store_true", help=curve)
    dry_run = "only build and check model, data and batches"
    plan.add_argument("--dry-run", dest="only_dry_run", action="store_true", help=dry_run)
    add_json(plan)
    plan.set_defaults(run=_plan)
    add_trust(plan)

    doctor = commands.add_parser("doctor", help="check this machine, and find what limits a recipe's speed on it")
    add_recipe(doctor, "data.workers=4", nargs="?")
    doctor.add_argument("--seconds", type=positive, help=f"length of the timed run (default: {SECONDS:g})")
    add_json(doctor)
    doctor.set_defaults(run=_doctor)
    add_trust(doctor)

    completion = commands.add_parser(
        "completion", help="print a script with which a shell completes karat's commands, recipes and keys"
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help='in bash: eval "$(karat completion bash)"')
    completion.set_defaults(run=command("karat_scale.commands.completion:print_shell_code"))


def _prepare(options: argparse.Namespace) -> int:
    """Become the script: its output, signals and exit code are those of this process."""
    for option, value in itertools.pairwise([word for text in options.arguments for word in text.split("=", 1)]):
        # The script would say so, too, after seconds of imports.
        if option == "--src" and not is_url(value) and not Path(value).expanduser().exists():
            raise DataError(f"--src {value}: there is no such file or directory")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "karat_scale.data.prepare", options.script, *options.arguments])


def _index(options: argparse.Namespace) -> int:
    from karat_scale.data.indexing.command import index_tars
    from karat_scale.data.shards.shard_format import dataset_directory

    options.source, options.splits = dataset_directory(options.source), tuple(options.splits)
    return call(index_tars, options)


def _check_data(options: argparse.Namespace) -> None:
    from karat_scale.data.shards.shard_format import check_data_path
    from karat_scale.recipe.loading import load_recipe

    check_data_path(load_recipe(options.recipe, options.overrides).data)


def _explain(options: argparse.Namespace) -> int:
    from karat_scale.recipe.keys import explain

    return explain(options.keys, load(SCHEMAS["detect" if options.detection else "train"]))


def _plan(options: argparse.Namespace) -> int:
    if options.gpu:
        known_gpu(options.gpu)  # before torch is imported
    from karat_scale.commands.plan.command import plan_recipe

    if options.only_dry_run:
        if options.json_file:
            raise UserError("--dry-run makes no plan, so --json has nothing to write; leave one of them out")
        makes_a_plan = {"--curve": options.with_curve, "--gpu": options.gpu}
        makes_a_plan |= {"--memory": options.memory, "--step-time": options.step_time}
        if idle := [name for name, value in makes_a_plan.items() if value]:
            print(f"note: --dry-run makes no plan, so {', '.join(idle)} has no effect", file=sys.stderr)
    options.source = options.recipe
    return call(plan_recipe, options)


def _doctor(options: argparse.Namespace) -> int:
    from karat_scale.commands.doctor.checkup import doctor

    if options.seconds and options.recipe is None:
        raise UserError("--seconds is the length of a recipe's timed run; name a RECIPE, or remove it")
    options.seconds = options.seconds or SECONDS
    return call(doctor, options)
