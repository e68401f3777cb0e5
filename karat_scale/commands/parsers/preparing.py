"""The parsers of the commands before training: data, recipes, plans, a check of the machine, and benches."""

import argparse
import itertools
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from karat_scale.commands.bench.gpu.report import add_options as add_gpu_options
from karat_scale.data.prepare import DECODED_BELOW, SCRIPTS
from karat_scale.foundation.arguments import add_json, add_number, add_recipe, call, command, new_file, positive, whole
from karat_scale.foundation.errors import DataError, UserError
from karat_scale.foundation.machine import known_gpu
from karat_scale.foundation.stores import is_url
from karat_scale.foundation.tables import BACKENDS, SCHEMAS, load

SECONDS = 20.0  # of the timed run of karat doctor


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    prepare = commands.add_parser(
        "prepare",
        help="download, make, check and copy data sets",
        epilog="fetch downloads a data set, and webdataset makes shards of a folder, of ImageNet's tars or of Parquet; "
        "ffcv makes betons. verify checks shards, stage copies them to a local disk, join moves splits of another set, "
        "and dali-index writes what DALI reads them with.",
    )
    prepare.add_argument("script", choices=SCRIPTS, help="the script; `karat prepare SCRIPT --help` lists its options")
    prepare.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own options")
    prepare.set_defaults(run=_prepare)

    index = commands.add_parser("index", help="index tars that others wrote, to train from them without a copy")
    index.add_argument("source", metavar="SRC", help="a directory or a URL with .tar files, also below it")
    where = "directory for the indexes and dataset.json (default: SRC)"
    index.add_argument("--out", type=Path, metavar="DIR", help=where)
    rule = "where the class is: cls, json:FIELD, txt, path or auto (default: auto)"
    index.add_argument("--label", default="auto", metavar="RULE", help=rule)
    by_name = "tars of a split (default: by their names)"
    index.add_argument("--split", dest="splits", action="append", default=[], metavar="NAME=GLOB", help=by_name)
    index.add_argument("--classes", type=Path, metavar="FILE", help="a name on each line, in the order of the labels")
    hashed = "also read the tars, to notice any later change in them"
    index.add_argument("--hash", dest="with_hashes", action="store_true", help=hashed)
    add_json(index, "write the counts to this file")
    index.set_defaults(run=command("karat_scale.data.indexing:index_tars", _read_source))

    show = commands.add_parser("show", help="draw a batch as training sees it: augmented, mixed, with its targets")
    add_recipe(show, "data.path=DIR")
    add_number(show, "--step", 1, "the training step")
    add_number(show, "--images", 32, "at most this many")
    show.add_argument("--out", type=new_file, metavar="FILE", help="a PNG (default: RUN.DIR-step-N.png)")
    show.set_defaults(run=command("karat_scale.commands.look.command:show_batch", _check_data))

    data = commands.add_parser("data", help="look at a data set: counts, sizes, odd files, and a page of samples")
    data.add_argument("path", metavar="PATH", help="shards, FFCV's betons, or a folder with train/<class>/<image>")
    sampled = f"images of each split to measure and decode; below {DECODED_BELOW:,} images in all, all are decoded"
    add_number(data, "--images", 1000, sampled)
    add_number(data, "--classes", 50, "classes to show samples of")
    data.add_argument(
        "--out", type=new_file, metavar="FILE", default="data.html", help="an HTML file (default: %(default)s)"
    )
    add_json(data)
    data.set_defaults(run=command("karat_scale.commands.look.command:look_at_data", _check_path))

    recipes = commands.add_parser("recipes", help="list the shipped recipes, what they train, and their results")
    recipes.add_argument("words", nargs="*", metavar="WORD", help="a recipe's name, or words to search for")
    add_json(recipes, "write the list to this file")
    recipes.set_defaults(run=command("karat_scale.recipe.catalog:list_recipes"))

    explain = commands.add_parser("explain", help="say what a key of a recipe means, and what it may change")
    explain.add_argument("keys", nargs="*", metavar="KEY", help="a key, a section, or another tool's name for one")
    explain.add_argument("--detection", action="store_true", help="keys of karat detect's recipes")
    explain.set_defaults(run=command("karat_scale.recipe.keys:explain", _choose_schema))

    plan = commands.add_parser("plan", help="estimate memory, ZeRO stage, micro batch and time, and find mistakes")
    plan.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    overrides = "such as train.precision=bf16; another RECIPE is shown side by side, with the same keys"
    plan.add_argument("overrides", nargs="*", default=[], metavar="RECIPE or key=value", help=overrides)
    add_number(plan, "--gpus", 1, "total number of ranks")
    plan.add_argument("--gpu", metavar="NAME", help="the GPU, such as h100-80 (default: plan for this machine's RAM)")
    memory = "memory of the GPU, or RAM of each rank with run.device=cpu"
    plan.add_argument("--memory", type=positive, metavar="GB", help=memory)
    add_number(plan, "--gpus-per-node", 8, "GPUs of a node", metavar="N")
    add_number(plan, "--cores-per-gpu", 12, "CPU cores that decode for a GPU", metavar="N")
    plan.add_argument("--step-time", type=positive, metavar="S", help="measured seconds of one micro batch on one GPU")
    curve = "show the predicted throughput from 1 to 1,024 GPUs"
    plan.add_argument("--curve", dest="with_curve", action="store_true", help=curve)
    dry_run = "only build and check model, data and batches"
    plan.add_argument("--dry-run", dest="only_dry_run", action="store_true", help=dry_run)
    add_json(plan)
    plan.set_defaults(run=_plan)

    doctor = commands.add_parser("doctor", help="check this machine, and find what limits a recipe's speed on it")
    add_recipe(doctor, "data.workers=4", nargs="?")
    doctor.add_argument("--seconds", type=positive, help=f"length of the timed run (default: {SECONDS:g})")
    add_json(doctor)
    doctor.set_defaults(run=command("karat_scale.commands.doctor.checkup:doctor", _check_seconds))

    bench = commands.add_parser("bench", help="measure attention, data, steps or a resume, or check a GPU")
    _add_benches(bench.add_subparsers(dest="bench", required=True, metavar="BENCH"))

    completes = "print a script with which a shell completes karat's commands, recipes and keys"
    completion = commands.add_parser("completion", help=completes)
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help='in bash: eval "$(karat completion bash)"')
    completion.set_defaults(run=command("karat_scale.commands.completion:print_shell_code"))


def _add_benches(benches: Any) -> None:
    """Add each bench to the subparsers of `karat bench`."""

    def add(name: str, what: str, module: str = "") -> argparse.ArgumentParser:
        place = f"karat_scale.commands.bench.{module or name}:bench_{name}"
        description = f"Measure {what}."
        parser: argparse.ArgumentParser = benches.add_parser(name, help=what, description=description)

        def run(options: argparse.Namespace) -> int:
            recipe = getattr(options, "recipe", "")
            if "=" in recipe and not Path(recipe).exists():  # an override, without a recipe before it
                options.overrides = [options.recipe, *options.overrides]
                options.recipe = parser.get_default("recipe")
            return int(load(place)(options))

        parser.set_defaults(run=run)
        return parser

    parser = add("step", "our loop against a bare PyTorch loop, KArAt against softmax", "training")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a model of timm (default: %(default)s)")
    add_number(parser, "--image-size", 224, "height and width of the images in pixels")
    add_number(parser, "--batch", 8, "images per step")
    add_number(parser, "--steps", 5, "steps per round")
    _add_output(parser, 7)

    parser = add("attention", "each implementation against SDPA, in time and memory", "training")
    add_attention_options(parser)
    add_number(parser, "--tokens", 197, "the number of tokens, N")
    names = ("reference", "streaming", "cpu", "triton", "flex")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="only these implementations")

    parser = add("resume", "what an interruption costs: signal to saved, start to first step", "training")
    of = "a shipped recipe's name or a YAML file (default: %(default)s)"
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", default="imagenet_vit_base_g1b", help=of)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as deepspeed.config=zero3")
    add_number(parser, "--ranks", 1, "processes")
    add_number(parser, "--batch", 2, "images per rank")
    add_number(parser, "--rounds", 3, "how often to start, interrupt and resume")
    _add_output(parser)

    add_gpu_options(add("gpu", "whether training is right on this card, and how fast it is", "gpu.command"))
    _add_data_options(add("data", "each backend and decoder against whole decodes"))


def add_attention_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of an operator and of its measurement."""
    parser.add_argument("--model", choices=("tiny", "small", "base"), default="tiny", help="ViT (default: %(default)s)")
    add_number(parser, "--batch", 32, "images")
    add_number(parser, "--grid", 3, "the grid, G")
    add_number(parser, "--rank", 12, "the rank, r")
    parser.add_argument("--basis", default="fourier", help="a name, or package.module:Class (default: %(default)s)")
    forms = ("modular", "project_first", "two_operators", "full_rank", "content")
    parser.add_argument("--form", choices=forms, default="modular", help="as attention.form (default: %(default)s)")
    dtypes = ("fp32", "bf16", "fp16")
    parser.add_argument("--dtype", choices=dtypes, default="fp32", help="of the inputs (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add_number(parser, "--threads", 1, "CPU threads")
    _add_output(parser, 9)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of `karat bench data`."""
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--path", metavar="DIR", help="a directory of shards (default: photo-like images made here)")
    images.add_argument("--tar", metavar="FILE", help="a tar of JPEGs")
    parser.add_argument("--ffcv", metavar="DIR", help="made by karat prepare ffcv, to measure that backend")
    repeated = "a backend to measure; may be repeated (default: all)"
    parser.add_argument("--backend", metavar="NAME", choices=BACKENDS, action="append", help=repeated)
    as_in = "crop: crop and flip; paper: the paper's, on the CPU; device: that on the device (default: %(default)s)"
    parser.add_argument("--augment", choices=("crop", "paper", "device"), default="crop", help=as_in)
    add_number(parser, "--workers", 1, "data workers; 0 for none", whole(0))
    add_number(parser, "--images", 512, "images to measure on")
    _add_output(parser, 7)


def _add_output(parser: argparse.ArgumentParser, rounds: int | None = None) -> None:
    if rounds:
        add_number(parser, "--rounds", rounds, "interleaved rounds")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")


def _prepare(options: argparse.Namespace) -> int:
    """Become the script: its output, signals and exit code are those of this process."""
    paths = [*itertools.takewhile(lambda text: not text.startswith("-"), options.arguments)]
    if paths and options.script != "fetch":  # the data set that it fetches has no option
        given = zip(("--src", "--out"), map(shlex.quote, paths), strict=False)
        named = " ".join(itertools.chain.from_iterable(given))
        raise UserError(f"{' '.join(paths)}: name paths by options: karat prepare {options.script} {named}")
    for option, value in itertools.pairwise([word for text in options.arguments for word in text.split("=", 1)]):
        # The script would say so, too, after seconds of imports.
        if option == "--src" and not is_url(value) and not Path(value).expanduser().exists():
            raise DataError(f"--src {value}: there is no such file or directory; correct the path")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "karat_scale.data.prepare", options.script, *options.arguments])


def _read_source(options: argparse.Namespace) -> None:
    from karat_scale.data.shards.shard_format import dataset_directory

    options.source, options.splits = dataset_directory(options.source), tuple(options.splits)


def _check_data(options: argparse.Namespace) -> None:
    from karat_scale.data.shards.shard_format import check_data_path
    from karat_scale.data.shards.shards import check_splits
    from karat_scale.recipe.loading import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    check_data_path(recipe.data)
    check_splits(recipe.data, recipe.model.num_classes)


def _check_path(options: argparse.Namespace) -> None:
    from karat_scale.data.shards.shard_format import dataset_directory, not_a_directory

    directory = dataset_directory(options.path)
    if isinstance(directory, Path) and not directory.is_dir():
        raise DataError(f"{not_a_directory(directory)}; name shards, betons or a folder of train/<class>/<image>")


def _choose_schema(options: argparse.Namespace) -> None:
    detects = options.detection or {key.partition(".")[0] for key in options.keys} == {"detector"}
    options.names, options.schema = options.keys, load(SCHEMAS["detect" if detects else "train"])


def _plan(options: argparse.Namespace) -> int:
    if options.gpu:
        known_gpu(options.gpu)  # before torch is imported, as with the recipes
    from karat_scale.recipe.loading import load_recipe

    keys = [text for text in options.overrides if "=" in text]
    more = [text for text in options.overrides if "=" not in text]  # the plans of several are shown side by side
    options.recipes = [load_recipe(name, keys) for name in (options.recipe, *more)]
    if options.only_dry_run:
        if options.json_file:
            raise UserError("--dry-run makes no plan, so --json has nothing to write; leave one of them out")
        plans = {"curve": options.with_curve, "gpu": options.gpu, "memory": options.memory}
        if idle := [f"--{name}" for name, value in {**plans, "step-time": options.step_time}.items() if value]:
            print(f"note: --dry-run makes no plan, so {', '.join(idle)} has no effect", file=sys.stderr)
    from karat_scale.commands.plan.command import plan_recipes

    return call(plan_recipes, options)


def _check_seconds(options: argparse.Namespace) -> None:
    if options.seconds and options.recipe is None:
        raise UserError("--seconds is the length of a recipe's timed run; name a RECIPE, or remove it")
    options.seconds = options.seconds or SECONDS
