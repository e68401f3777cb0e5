"""The commands that train, evaluate and replay. Each imports what it needs when it runs."""

import argparse
from pathlib import Path
from typing import Any

from karat_scale.commands.launch import default_ranks, launch
from karat_scale.foundation.arguments import add_trust, count, new_file, run_directory
from karat_scale.foundation.errors import DataError, UserError
from karat_scale.foundation.stores.connection import is_url
from karat_scale.foundation.tables import CORRUPTIONS

_SEE_ALSO = (
    "`karat recipes WORD` filters the recipes, `karat explain KEY` says what a key means, and `karat completion SHELL` "
    "completes both in bash, zsh and fish."
)


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    train = commands.add_parser("train", help="train a recipe, or resume its run", epilog=_SEE_ALSO)
    train.add_argument(
        "recipe", metavar="RECIPE", help="a shipped recipe's name, which `karat recipes` lists, or a YAML file"
    )
    train.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as optim.lr=1e-3; `karat explain` lists all"
    )
    train.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    train.set_defaults(run=_train)
    add_trust(train)

    several = commands.add_parser("launch", help="run a command on several ranks of this machine, such as its GPUs")
    several.add_argument("--ranks", type=count, help="(default: one for each GPU)")
    several.add_argument("arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...", help="of karat")
    several.set_defaults(run=lambda options: launch(options.arguments, options.ranks or default_ranks()))

    evaluate = commands.add_parser(
        "eval", help="evaluate a run's checkpoint, on its validation split or another test set"
    )
    evaluate.add_argument("run_dir", metavar="RUN", type=run_directory, help="the run's directory")
    evaluate.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as data.path=DIR")
    evaluate.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")
    evaluate.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto")
    evaluate.add_argument("--on", metavar="DIR", help="another test set: shards, or a folder of classes")
    evaluate.add_argument(
        "--split",
        default="",
        metavar="NAME",
        help="split of DIR (default: the first of val, test, validation, valid, train)",
    )
    evaluate.add_argument("--labels", metavar="FILE", help="count other labels as right, such as ReaL's real.json")
    evaluate.add_argument(
        "--corrupt", nargs="*", choices=(*CORRUPTIONS, "all"), metavar="NAME", help="images corrupted as in ImageNet-C"
    )
    evaluate.add_argument(
        "--severity", type=int, nargs="+", choices=range(1, 6), metavar="N", help="of --corrupt, 1 to 5 (default: all)"
    )
    evaluate.add_argument("--name", default="", help="keep the result under this name (default: the directory's)")
    evaluate.add_argument("--json", type=new_file, metavar="FILE", help="also write the result to this file")
    evaluate.set_defaults(run=_eval)
    add_trust(evaluate)

    replay = commands.add_parser("replay", help="take one step of a run again, and find what in it is not finite")
    replay.add_argument("run_dir", metavar="RUN", type=run_directory, help="the run's directory")
    replay.add_argument("step", metavar="STEP", type=count, help="as the run logs it, counted from 1")
    replay.add_argument("--images", type=count, default=16, help="with the largest losses (default: %(default)s)")
    replay.add_argument("--out", metavar="FILE", help="a PNG (default: RUN-replay-STEP.png)")
    replay.add_argument("--json", type=new_file, metavar="FILE", help="also write what was found to this file")
    replay.set_defaults(run=_replay)
    add_trust(replay)

    fetch = commands.add_parser("fetch", help="make the directory of a run from its copy at checkpoint.url")
    fetch.add_argument("url", metavar="URL", help="the run's checkpoint.url")
    fetch.add_argument("directory", metavar="DIR", help="a new directory, or one of this run")
    fetch.add_argument(
        "--checkpoint",
        nargs="+",
        default=("best", "latest"),
        metavar="NAME",
        help="best, latest, all, or names (default: best latest)",
    )
    fetch.set_defaults(run=_fetch)

    detect = commands.add_parser("detect", help="train or evaluate Mask R-CNN on a ViT, with data in COCO's format")
    detect.add_argument("recipe", metavar="RECIPE", help="a detection recipe's name or a YAML file; with --eval, a run")
    detect.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as data.path=DIR")
    detect.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    detect.add_argument("--eval", action="store_true", help="evaluate a checkpoint of a run by COCO's mAP")
    detect.add_argument(
        "--checkpoint", metavar="NAME", help="that --eval uses: best, latest, or a name (default: best)"
    )
    detect.add_argument("--weights", choices=("auto", "ema", "raw"), help="weights that --eval uses (default: auto)")
    detect.add_argument("--json", type=new_file, metavar="FILE", help="also write the result of --eval to this file")
    detect.set_defaults(run=_detect)
    add_trust(detect)


def _train(options: argparse.Namespace) -> int:
    from karat_scale.data.shards.shard_format import check_data_path
    from karat_scale.recipe.loading import dump_recipe, load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.print:
        from karat_scale.data.shards.streamed import StreamShards
        from karat_scale.engine.deepspeed_config import check_ds_config
        from karat_scale.models.factory import outline

        check_ds_config(recipe)
        outline(recipe)
        if recipe.data.is_stream:
            StreamShards(recipe.data, recipe.run.seed)
        print(dump_recipe(recipe), end="")
        return 0
    check_data_path(recipe.data)
    from karat_scale.training.run import train
    from karat_scale.training.tasks.classification.task import ClassificationTask

    return train(ClassificationTask, recipe)


def _eval(options: argparse.Namespace) -> int:
    from karat_scale.recipe.files import recipe_of_run

    recipe_of_run(Path(options.run_dir))
    if options.on is not None and not is_url(options.on) and not Path(options.on).expanduser().exists():
        raise DataError(f"{options.on} is no test set: there is no such directory")
    what = (options.run_dir, options.overrides, options.checkpoint, options.weights)
    if options.severity and options.corrupt is None:
        raise UserError("--severity is of --corrupt; add it, or leave out --severity")
    if options.on is not None or options.labels or options.corrupt is not None or options.split or options.name:
        from karat_scale.commands.evaluate.command import Request, evaluate_on
        from karat_scale.commands.evaluate.predictions import SEVERITIES

        request = Request(
            on=options.on,
            split=options.split,
            labels=options.labels,
            corrupt=options.corrupt,
            severities=sorted(set(options.severity or SEVERITIES)),
            name=options.name,
        )
        return evaluate_on(*what, request, options.json)
    from karat_scale.commands.evaluate.command import evaluate_run
    from karat_scale.training.tasks.classification.task import ClassificationTask

    return evaluate_run(ClassificationTask, *what, options.json)


def _replay(options: argparse.Namespace) -> int:
    from karat_scale.recipe.files import recipe_of_run

    recipe_of_run(Path(options.run_dir))
    from karat_scale.commands.replay.command import replay

    return replay(options.run_dir, options.step, options.images, options.out, options.json)


def _fetch(options: argparse.Namespace) -> int:
    from karat_scale.commands.fetch import fetch_run

    return fetch_run(options.url, options.directory, options.checkpoint)


def _detect(options: argparse.Namespace) -> int:
    from karat_scale.recipe.loading import dump_recipe, load_recipe
    from karat_scale.training.tasks.detection.coco import require_pycocotools
    from karat_scale.training.tasks.detection.recipe import DetectionRecipe

    if options.eval:
        require_pycocotools()
        from karat_scale.commands.evaluate.command import evaluate_run
        from karat_scale.training.tasks.detection.task import DetectionTask

        what = (
            options.recipe,
            options.overrides,
            options.checkpoint or "best",
            options.weights or "auto",
            options.json,
        )
        return evaluate_run(DetectionTask, *what)
    for name in ("checkpoint", "weights", "json"):
        if getattr(options, name):
            raise UserError(f"--{name} is of --eval; add it, or leave out --{name}")
    recipe = load_recipe(options.recipe, options.overrides, DetectionRecipe)
    if options.print:
        print(dump_recipe(recipe), end="")
        return 0
    require_pycocotools()
    from karat_scale.training.run import train
    from karat_scale.training.tasks.detection.task import DetectionTask

    return train(DetectionTask, recipe)
