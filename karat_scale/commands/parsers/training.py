"""The parsers of the commands that train, here or as jobs, look at runs, compare them, and use a trained model."""

import argparse
import glob
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from karat_scale.commands.analyze.analyses import ANALYSES, Options
from karat_scale.commands.launch import WRAPPER, default_ranks, launch
from karat_scale.foundation.arguments import (
    add_checkpoint,
    add_json,
    add_number,
    add_recipe,
    add_run,
    add_weights,
    call,
    command,
    count,
    new_directory,
    new_file,
    positive,
    run_directory,
    time_limit,
    tracker,
    virtual_environment,
    whole,
)
from karat_scale.foundation.errors import DataError, RecipeError, RunDirectoryError, UserError
from karat_scale.foundation.files import trained_model
from karat_scale.foundation.machine import known_gpu
from karat_scale.foundation.stores import check_url, check_writable, is_url
from karat_scale.foundation.tables import CORRUPTIONS, EXPORT_FORMATS, HUB, SCHEMAS, TRACKERS, importing, load

if TYPE_CHECKING:
    from karat_scale.commands.submit.sbatch import Job
    from karat_scale.recipe import Recipe, RunRecipe

SHIPPED = "cifar10_karat"  # in examples/weights
SCORES = ("top1", "top5", "loss", "box_ap", "mask_ap")
MATCHES = ("parameters", "step_seconds")
_SEE_ALSO = (
    "`karat recipes WORD` filters the recipes, `karat explain KEY` says what a key means, and `karat completion SHELL` "
    "completes both in bash, zsh and fish."
)
_SBATCH: dict[str, tuple[Callable[[str], Any], str]] = {
    "account": (str, "the account that pays for the job (default: yours on the cluster)"),
    "partition": (str, "the partition, a queue of the cluster (default: the cluster's)"),
    "qos": (str, "the quality of service, which sets priority and limits (default: the account's)"),
    "constraint": (str, "only nodes with this feature, such as a100 (default: any)"),
    "mem": (str, "memory of each node, such as 200G (default: the cluster's)"),
    "dependency": (str, "start after other jobs, such as afterok:JOB (default: none)"),
    "mail-type": (str, "events that send a mail, such as END,FAIL (default: none)"),
    "mail-user": (str, "who gets the mail (default: you)"),
    "time": (time_limit, "time limit, such as 12:00:00 or 1-12 (default: 24:00:00)"),
    "nodes": (whole(1), "number of nodes (default: 1)"),
    "gpus-per-node": (whole(0), "GPUs of each node, with a rank for each; 0: one rank without GPU (default: 4)"),
    "cpus-per-task": (whole(1), "CPU cores of each rank (default: 8)"),
}
"""The options of sbatch, with the types of their values and their meaning.

Their default numbers are those in the scripts of slurm/.
"""
_SETTINGS = {
    "venv": "a virtual environment for the nodes",
    "conda-env": "a conda environment for the nodes",
    "modules": "modules to load first, such as cuda/12.6",
    "container": 'a command before Python, such as "apptainer exec --nv karat.sif"',
    "stage": "a local disk of the nodes for a copy of the shards, such as /local/scratch",
}
"""The variables of the scripts in slurm/."""


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    train = commands.add_parser(
        "train",
        help="train a recipe, or resume its run",
        description="Train a recipe, or resume its run. The run goes to the directory run.dir, by default runs/NAME "
        "with the name of the recipe. The same command resumes a run that was stopped.",
        epilog=_SEE_ALSO,
    )
    what = "a shipped recipe's name, which `karat recipes` lists, or a YAML file"
    add_recipe(train, "optim.lr=1e-3; `karat explain` lists their sections", what)
    train.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    train.set_defaults(run=_train)

    convert = commands.add_parser(
        "convert", help="replace the attention of a trained model, then train it by a recipe", epilog=_SEE_ALSO
    )
    source = "a run, a folder or file of `karat export`, a file of weights, or timm:NAME"
    convert.add_argument("source", metavar="SOURCE", help=source)
    add_recipe(convert, "attention.kind=karat convert.images=5000", what)
    only = convert.add_mutually_exclusive_group()
    only.add_argument("--survey", action="store_true", help="only find out which blocks can be replaced; no training")
    only.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    convert.set_defaults(run=_convert)

    quick = commands.add_parser(
        "quickstart",
        help="train KArAt, softmax and a control on Fashion-MNIST, and compare them",
        description="Train KArAt, softmax and a control on Fashion-MNIST, and compare them. This downloads 31 MB, "
        "takes about five minutes on two cores, and writes to data/ and runs/ of this directory. If you stop it, run "
        "it again.",
    )
    quick.set_defaults(run=command("karat_scale.commands.quickstart:quickstart"))

    several = commands.add_parser(
        "launch",
        help="run a command on several ranks of this machine, such as its GPUs",
        usage="karat launch [-h] [--ranks N] COMMAND ...",
    )
    several.add_argument("--ranks", type=count, metavar="N", help="processes (default: one for each GPU)")
    such_as = "a command of karat with its arguments, such as train RECIPE"
    several.add_argument("arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...", help=such_as)
    several.set_defaults(run=_launch)

    evaluates = "evaluate a run's checkpoint, on its validation split or another test set"
    evaluate = commands.add_parser("eval", help=evaluates)
    add_run(evaluate)
    such_as = "such as data.path=DIR; keys of training alone, such as optim.lr, are refused"
    evaluate.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=such_as)
    add_checkpoint(evaluate)
    add_weights(evaluate)
    evaluate.add_argument(
        "--on", metavar="DIR", help="another test set: shards (also at a URL), betons, or a folder of classes"
    )
    split = "split of DIR (default: the first of val, test, validation, valid, train)"
    evaluate.add_argument("--split", default="", metavar="NAME", help=split)
    evaluate.add_argument("--labels", metavar="FILE", help="count other labels as right, such as ReaL's real.json")
    corrupt = "evaluate on images corrupted as in ImageNet-C; without a NAME, in all 15 ways"
    evaluate.add_argument("--corrupt", nargs="*", choices=(*CORRUPTIONS, "all"), metavar="NAME", help=corrupt)
    severity = "severities for --corrupt, 1 to 5 (default: all)"
    evaluate.add_argument("--severity", type=int, nargs="+", choices=range(1, 6), metavar="N", help=severity)
    evaluate.add_argument("--name", default="", help="keep the result under this name (default: the directory's)")
    add_json(evaluate, "write the result to this file")
    evaluate.set_defaults(run=_eval)

    replay = commands.add_parser("replay", help="repeat one step of a run, and find what in it is not finite")
    add_run(replay)
    replay.add_argument("step", metavar="STEP", type=count, help="the step as the run logs it, counted from 1")
    add_number(replay, "--images", 16, "number of images to draw, those with the largest losses")
    replay.add_argument("--out", type=new_file, metavar="FILE", help="the PNG (default: RUN-replay-STEP.png)")
    add_json(replay, "write what was found to this file")
    replay.set_defaults(run=command("karat_scale.commands.replay.command:replay", check_run))

    verify = commands.add_parser("verify", help="train between two checkpoints again, and compare with the run's")
    add_run(verify)
    first = "the step of a checkpoint, or 0 for the start of the run (default: the checkpoint before --to)"
    verify.add_argument("--from", dest="begin", type=whole(0), metavar="STEP", help=first)
    second = "the step of a later checkpoint (default: the newest)"
    verify.add_argument("--to", dest="end", type=count, metavar="STEP", help=second)
    add_json(verify, "write what was compared to this file")
    verify.set_defaults(run=command("karat_scale.commands.replay.command:verify", check_run))

    fetch = commands.add_parser("fetch", help="restore a run's directory from its copy at checkpoint.url")
    fetch.add_argument("url", metavar="URL", help="the run's checkpoint.url")
    fetch.add_argument("directory", metavar="DIR", help="a new directory, or one of this run")
    names = "checkpoints to fetch: best, latest, all, or names (default: best latest)"
    fetch.add_argument("--checkpoint", nargs="+", default=("best", "latest"), metavar="NAME", help=names)
    fetch.set_defaults(run=command("karat_scale.commands.elsewhere:fetch_run", _check_fetch))

    detect = commands.add_parser("detect", help="train or evaluate Mask R-CNN on a ViT, with data in COCO's format")
    add_recipe(detect, "data.path=DIR", "a detection recipe's name or a YAML file; with --eval, a run")
    only = detect.add_mutually_exclusive_group()
    only.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    only.add_argument("--eval", action="store_true", help="evaluate a checkpoint of a run by COCO's mAP")
    which = "checkpoint for --eval: best, latest, or such as step-00001200 (default: best)"
    detect.add_argument("--checkpoint", metavar="NAME", help=which)
    detect.add_argument("--weights", choices=("auto", "ema", "raw"), help="weights for --eval (default: auto)")
    add_json(detect, "write the result of --eval to this file")
    detect.set_defaults(run=_detect)

    submit = commands.add_parser("submit", help="write a recipe's sbatch script, show it, and submit it")
    add_recipe(submit, "data.path=DIR")
    _add_sbatch_options(submit)
    submit.add_argument("--gpu", metavar="NAME", help="plan ZeRO stage and micro batch for this GPU, such as h100-80")
    how = submit.add_mutually_exclusive_group()
    how.add_argument("--yes", action="store_true", help="submit without asking")
    how.add_argument("--print", action="store_true", help="show the script, and neither write nor submit it")
    submit.set_defaults(run=command("karat_scale.commands.submit.sbatch:submit", _check_submit))

    sweep = commands.add_parser("sweep", help="train a recipe for every combination of settings, and compare the runs")
    add_recipe(sweep, "optim.lr=1e-3,2e-3 run.seed=0..4")
    sweep.add_argument("--out", metavar="DIR", help="the directory for all runs (default: runs/sweep_RECIPE)")
    sweep.add_argument("--print", action="store_true", help="show the runs and their progress, and stop")
    sweep.add_argument("--ranks", type=count, help="ranks of each run on this machine (default: one for each GPU)")
    sweep.add_argument("--slurm", action="store_true", help="submit a job array, with the options below")
    sweep.add_argument("--at-once", type=count, metavar="N", help="at most N jobs of the array run at a time")
    sweep.add_argument("--yes", action="store_true", help="submit without asking")
    _add_sbatch_options(sweep)
    sweep.set_defaults(run=command("karat_scale.commands.sweep.command:sweep", _check_sweep))

    status = commands.add_parser("status", help="show a run's progress, from its files")
    add_run(status)
    status.add_argument("--once", action="store_true", help="show it once and stop, instead of following the run")
    status.set_defaults(run=command("karat_scale.commands.status.status:show_status"))
    _add_results(commands)


def _add_results(commands: Any) -> None:
    """Add the parsers of the commands that look at finished runs, compare them, and use a trained model."""
    analyze = commands.add_parser("analyze", help="analyse what attention learned: figures, numbers, a report")
    _add_runs(analyze, "a run's directory; several are shown side by side")
    names = tuple(ANALYSES)
    only = f"run only these analyses: {', '.join(names)}"
    analyze.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=only)
    out = "output (default: `analysis` in the first run's directory)"
    analyze.add_argument("--out", type=new_directory, metavar="DIR", help=out)
    analyze.add_argument("--data", metavar="DIR", help="the data, instead of the runs' data.path")
    add_checkpoint(analyze)
    add_weights(analyze)
    add_number(analyze, "--images", Options.images, "number of images for spectrum, content and functions")
    maps = "the numbers of the images for the maps (default: four images)"
    analyze.add_argument("--image", dest="image_ids", type=int, nargs="+", metavar="N", help=maps)
    add_number(analyze, "--block", Options.block, "block of the maps; -1 is the last", int)
    add_number(analyze, "--grid", Options.grid, "landscape points per side", whole(2))
    add_number(analyze, "--range", Options.range, "the landscape's extent, relative to the default", positive)
    add_number(analyze, "--samples", Options.samples, "images per point of the landscape")
    add_number(analyze, "--hessian-samples", Options.hessian_samples, "images for the sharpness", metavar="N")
    add_number(analyze, "--batch", Options.batch, "images per batch")
    seed = "seed of the landscape's directions and the sharpness's probes"
    add_number(analyze, "--seed", Options.seed, seed, whole(0))
    analyze.set_defaults(run=command("karat_scale.commands.analyze.command:analyze_paths", _check_analyzed))

    compare = commands.add_parser("compare", help="compare finished runs over their seeds: spread, differences, curves")
    _add_runs(compare, "a run's directory; the first one's group is the base")
    metric = "what the groups are compared by (default: top1; box_ap of detectors)"
    compare.add_argument("--metric", choices=SCORES, help=metric)
    match = "leave out groups more than 5 %% away from the first one in this measure"
    compare.add_argument("--match", choices=MATCHES, help=match)
    out = "write compare.md, compare.csv, compare.html and the curves here"
    compare.add_argument("--out", type=new_directory, metavar="DIR", help=out)
    add_json(compare)
    compare.set_defaults(run=command("karat_scale.commands.compare.command:compare_runs", _check_runs))

    track = commands.add_parser("track", help="send trackers what they still lack of a run")
    _add_runs(track, "a run's directory")
    instead = f"{', '.join(TRACKERS)} or package.module:Class, in place of log.trackers; may be repeated"
    track.add_argument("--to", action="append", type=tracker, metavar="TRACKER", help=instead)
    track.set_defaults(run=command("karat_scale.commands.elsewhere:track_runs", _check_tracked))

    export = commands.add_parser("export", help="write a run's model for timm, torch.export, ONNX or a model hub")
    add_run(export)
    formats = "a file of weights, a folder for timm or for a model hub, or a graph (default: safetensors)"
    export.add_argument("--format", choices=EXPORT_FORMATS, help=formats)
    add_checkpoint(export)
    kinds = "raw weights, their moving average (ema), or both, if the run has them (the default)"
    export.add_argument("--weights", choices=("raw", "ema", "both"), default="both", help=kinds)
    out = "a file with the format's suffix, or a directory (default: the run's)"
    export.add_argument("--out", metavar="PATH", help=out)
    export.add_argument("--push", metavar="USER/NAME", help="upload a hub-folder to the Hugging Face hub")
    export.add_argument("--private", action="store_true", help="with --push: a new repository is not public")
    export.set_defaults(run=command("karat_scale.commands.export.command:export_run", _check_export))

    predict = commands.add_parser("predict", help="classify images with a run or an exported folder")
    _add_model(predict)
    predict.add_argument("images", metavar="IMAGES", nargs="+", help="files, folders (with all below) and quoted globs")
    add_number(predict, "--top", 5, "classes to print for each image")
    add_number(predict, "--batch", 32, "images per batch")
    add_checkpoint(predict)
    add_weights(predict)
    add_json(predict, "write a line of JSON for each image")
    rows = "also write a row of CSV for each class"
    predict.add_argument("--csv", dest="csv_file", type=new_file, metavar="FILE", help=rows)
    drawn = "also draw where the model looks: a PNG for each image"
    predict.add_argument("--attention", type=new_directory, metavar="DIR", help=drawn)
    predict.set_defaults(run=command("karat_scale.commands.predict.command:predict", _check_images))

    demo = commands.add_parser("demo", help="serve a page on this machine that classifies pictures dropped into it")
    _add_model(demo, nargs="?", default=SHIPPED)
    add_number(demo, "--port", 7860, "port of the page; 0 takes any free one", whole(0))
    add_checkpoint(demo)
    add_weights(demo)
    demo.set_defaults(run=command("karat_scale.commands.predict.command:serve", _check_model))


def _add_sbatch_options(parser: argparse.ArgumentParser) -> None:
    of_sbatch = parser.add_argument_group("options of sbatch")
    for name, (kind, meant) in _SBATCH.items():
        of_sbatch.add_argument(f"--{name}", type=kind, help=meant)
    for name, meant in _SETTINGS.items():
        typed: dict[str, Any] = {"type": virtual_environment, "metavar": "DIR"} if name == "venv" else {}
        parser.add_argument(f"--{name}", help=meant, **typed)


def check_run(options: argparse.Namespace) -> None:
    """Refuse a path that is not a run, and a checkpoint that it lacks. Raises RunDirectoryError or RecipeError."""
    from karat_scale.checkpoint.store import POINTERS, CheckpointStore
    from karat_scale.recipe.files import recipe_of_run

    run, wanted = Path(options.run_dir).expanduser(), getattr(options, "checkpoint", None)
    if wanted and run.parent.name == "checkpoints" and run.exists() and (run.parents[1] / "recipe.yaml").exists():
        fix = f"write {run.parents[1]} --checkpoint {run.name}"
        raise RunDirectoryError(f"{run}: a checkpoint, not a run's directory; {fix}")
    recipe_of_run(run)
    if wanted and wanted not in POINTERS:
        CheckpointStore(run / "checkpoints").find(wanted)


def _launch(options: argparse.Namespace) -> int:
    # Within a wrapper, such as a container, a recipe may lie where this process does not see it.
    trained = None if os.environ.get(WRAPPER) else trained_directory(options.parsed)
    return launch(options.arguments, options.ranks or default_ranks(), _trains(options.parsed), trained)


def _trains(parsed: argparse.Namespace) -> bool:
    only = any(getattr(parsed, option, False) for option in ("print", "eval", "survey"))
    return not only and parsed.command in (*SCHEMAS, "convert")


def trained_directory(parsed: argparse.Namespace) -> Path | None:
    """Return the directory of the run that a command line trains; None if it does not train. Raises UserError."""
    if not _trains(parsed):
        return None
    from karat_scale.recipe.loading import load_recipe

    if parsed.command == "convert":
        return Path(_converted(parsed).run.dir).expanduser()
    return Path(load_recipe(parsed.recipe, parsed.overrides, load(SCHEMAS[parsed.command])).run.dir).expanduser()


def _train(options: argparse.Namespace) -> int:
    from karat_scale.recipe.loading import load_recipe

    return _train_or_print(load_recipe(options.recipe, options.overrides), options.print)


IMAGES = 1000
"""The images of `karat convert` if the recipe names none."""


def _converted(options: argparse.Namespace) -> "Recipe":
    from karat_scale.recipe.files import TIMM, locate, read_recipe, read_run_recipe
    from karat_scale.recipe.loading import load_recipe

    if "convert.images=0" in options.overrides:
        raise UserError("convert.images = 0 matches nothing; use 1 or more, or karat train RECIPE init_from=SOURCE")
    # A text in YAML, whatever it has in it; shells complete directories with a slash.
    source = json.dumps(options.source.rstrip("/") or "/", ensure_ascii=False)
    if any(text.partition("=")[0].strip() == "init_from" for text in options.overrides):
        raise UserError("init_from: SOURCE sets it; remove the override")
    section = read_recipe(options.recipe)[1].get("convert")
    has_images = isinstance(section, dict) and section.get("images")
    images = [] if has_images else [f"convert.images={IMAGES}"]
    own = [f"init_from={source}", f"distill.from={source}", *images, *options.overrides]
    recipe = load_recipe(options.recipe, own)
    here = Path(recipe.run.dir).expanduser()
    if not (options.source.startswith(TIMM) or recipe.checkpoint.url or (here / "recipe.yaml").is_file()):
        try:
            locate(options.source)
        except RecipeError as error:
            raise UserError(f"SOURCE {options.source}: {error}") from None
    if (here / "checkpoints" / "latest").is_file() and read_run_recipe(here / "recipe.yaml").get("init_from") == "":
        raise RunDirectoryError(f"run.dir = {here} holds a run that began without SOURCE; add run.dir=DIR, a new one")
    return recipe


def _convert(options: argparse.Namespace) -> int:
    from karat_scale.data.shards.shard_format import check_data_path

    recipe = _converted(options)
    if not options.survey:
        return _train_or_print(recipe, options.print)
    check_data_path(recipe.data)
    from karat_scale.training.tasks.classification.conversion import survey
    from karat_scale.training.tasks.classification.task import ClassificationTask

    return survey(ClassificationTask, recipe)


def _train_or_print(recipe: "Recipe", only_print: bool) -> int:
    from karat_scale.data.shards.shard_format import check_data_path
    from karat_scale.data.shards.shards import check_splits
    from karat_scale.recipe.loading import dump_recipe

    if only_print:
        _check_recipe(recipe)
        print(dump_recipe(recipe), end="")
        return 0
    check_data_path(recipe.data)
    check_splits(recipe.data, recipe.model.num_classes)
    _check_sources(recipe)
    with importing(for_good=True):
        from karat_scale.training.run import train
        from karat_scale.training.tasks.classification.task import ClassificationTask

    try:
        return train(ClassificationTask, recipe)
    except RunDirectoryError:  # a mistake in the recipe itself is reported first
        _check_recipe(recipe)
        raise


def _check_sources(recipe: "RunRecipe") -> None:
    """Raise UserError if what a recipe begins with is not there. A run that has begun needs only the DeepSpeed file."""
    from karat_scale.checkpoint.store import branch_point
    from karat_scale.engine.deepspeed_config import find_ds_config
    from karat_scale.recipe.files import TIMM, locate, recipe_of_run
    from karat_scale.recipe.loading import flatten

    find_ds_config(recipe.deepspeed)
    # What is at the URL may have begun elsewhere.
    if recipe.checkpoint.url or (Path(recipe.run.dir).expanduser() / "recipe.yaml").is_file():
        return
    if recipe.resume.from_:
        branch_point(recipe.resume.from_)
    values = flatten(recipe)
    try:
        for key in ("init_from", "distill.from"):
            if (source := values.get(key)) and not source.startswith(TIMM):
                locate(source)
        if source := values.get(key := "attention.transfer_from"):
            recipe_of_run(Path(source))
    except UserError as error:
        raise RecipeError(f"{key} = {source}: {error}") from None


def _check_recipe(recipe: "Recipe") -> None:
    """Raise UserError if a recipe cannot be trained in any directory."""
    from karat_scale.data.streams import StreamShards
    from karat_scale.engine.deepspeed_config import check_ds_config
    from karat_scale.models.factory import outline

    check_ds_config(recipe)
    outline(recipe)
    if recipe.data.is_stream:
        StreamShards(recipe.data, recipe.run.seed)


# The sections of a recipe that only training reads, and the key outside them.
_OF_TRAINING = ("init_from", "resume", "optim", "schedule", "deepspeed", "checkpoint", "log", "distill", "convert")
# The keys of the section `train` that an evaluation reads. fp16 is refused beside train.on_nonfinite = stop.
_OF_EVALUATION = {"precision", "tf32", "eval_batch", "eval_weights", "on_nonfinite"}


def _check_overrides_of_eval(overrides: Sequence[str]) -> None:
    """Raise UserError for an override that changes nothing in an evaluation."""
    from karat_scale.recipe.train import TrainConfig

    trains = {("train", name) for name in TrainConfig.model_fields.keys() - _OF_EVALUATION}
    for text in overrides:
        key = text.partition("=")[0]
        section, *names = key.split(".")
        # Another model.image_size must be the last of the schedule, too.
        if (section in _OF_TRAINING and key != "schedule.image_sizes") or (section, *names[:1]) in trains:
            raise UserError(f"{text}: only training reads {key}; remove it from the evaluation")


def _eval(options: argparse.Namespace) -> int:
    check_run(options)
    _check_directory("--on", options.on)
    if strange := [text for text in options.overrides if "=" not in text]:
        raise UserError(f"unexpected argument {strange[0]!r}; karat eval takes one RUN, and overrides are key=value")
    _check_overrides_of_eval(options.overrides)
    if options.severity and options.corrupt is None:
        raise UserError("--severity has no effect without --corrupt; add that, or remove --severity")
    from karat_scale.commands.evaluate.command import evaluate_on, evaluate_run

    if options.on is not None or options.labels or options.corrupt is not None or options.split or options.name:
        return call(evaluate_on, options)
    from karat_scale.training.tasks.classification.task import ClassificationTask

    options.task_type = ClassificationTask
    return call(evaluate_run, options)


def _detect(options: argparse.Namespace) -> int:
    from karat_scale.recipe.files import recipe_of_run
    from karat_scale.recipe.loading import dump_recipe, load_recipe
    from karat_scale.training.tasks.detection.recipe import DetectionRecipe, require_pycocotools

    if options.eval:
        recipe_of_run(Path(options.recipe))
        _check_overrides_of_eval(options.overrides)
        require_pycocotools()
        from karat_scale.commands.evaluate.command import evaluate_run
        from karat_scale.training.tasks.detection.task import DetectionTask

        checkpoint, weights = options.checkpoint or "best", options.weights or "auto"
        return evaluate_run(DetectionTask, options.recipe, options.overrides, checkpoint, weights, options.json_file)
    of_eval = {"checkpoint": options.checkpoint, "weights": options.weights, "json": options.json_file}
    for name, value in of_eval.items():
        if value:
            raise UserError(f"--{name} has no effect without --eval; add that, or remove --{name}")
    recipe = load_recipe(options.recipe, options.overrides, DetectionRecipe)
    if options.print:
        print(dump_recipe(recipe), end="")
        return 0
    require_pycocotools()
    _check_sources(recipe)
    with importing(for_good=True):
        from karat_scale.training.run import train
        from karat_scale.training.tasks.detection.task import DetectionTask

    return train(DetectionTask, recipe)


def _check_submit(options: argparse.Namespace) -> None:
    if options.gpu:
        known_gpu(options.gpu)
    options.job = _job(options)


def _job(options: argparse.Namespace) -> "Job":
    """Return the job that the options of a command line describe."""
    from karat_scale.commands.submit.sbatch import Job

    values = {name: getattr(options, name.replace("-", "_")) for name in (*_SBATCH, *_SETTINGS)}
    given = {name: str(value) for name, value in values.items() if value is not None}
    chosen = {name: value for name, value in given.items() if name in _SBATCH}
    if "gpus-per-node" in chosen:  # one task for each GPU; one on a node without GPUs
        chosen["ntasks-per-node"] = str(max(options.gpus_per_node, 1))
    settings = {name.upper().replace("-", "_"): value for name, value in given.items() if name in _SETTINGS}
    decision: Literal["ask", "yes", "print"] = "print" if options.print else "yes" if options.yes else "ask"
    return Job(chosen, settings, decision, getattr(options, "at_once", None))


def _check_sweep(options: argparse.Namespace) -> None:
    job = _job(options)
    if not options.slurm and (job.options or job.settings or options.at_once or options.yes):
        given = [*job.options, *(name.lower().replace("_", "-") for name in job.settings)]
        given += [name for name, value in {"at-once": job.at_once, "yes": options.yes}.items() if value]
        raise UserError(f"--{given[0]} has no effect without --slurm; add that, or remove --{given[0]}")
    if options.slurm and options.ranks:
        raise UserError(f"--ranks {options.ranks} is for this machine; with --slurm use --nodes and --gpus-per-node")
    options.only_print, options.job = options.print, job if options.slurm else None
    options.ranks = options.ranks or default_ranks()


def _add_runs(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("runs", metavar="RUN", type=run_directory, nargs="+", help=what)


def _check_runs(options: argparse.Namespace) -> None:
    from karat_scale.recipe.files import recipe_of_run

    for run in options.runs:
        if not Path(run).expanduser().exists():
            recipe_of_run(Path(run))  # a path that is not a run is left out of a comparison


def _check_analyzed(options: argparse.Namespace) -> None:
    _check_runs(options)
    _check_directory("--data", options.data)


def _check_directory(option: str, data: str | None) -> None:
    """Raise DataError if an option names images that are not there."""
    from karat_scale.data.shards.shard_format import not_a_directory

    if data is not None and not is_url(data) and not (directory := Path(data).expanduser()).is_dir():
        raise DataError(f"{option} {not_a_directory(directory)}; name shards, betons or a folder of images")


def _check_tracked(options: argparse.Namespace) -> None:
    from karat_scale.recipe.files import recipe_of_run

    for run in options.runs:
        recipe_of_run(Path(run))


def _add_model(parser: argparse.ArgumentParser, **optional: Any) -> None:
    what = f"a run's directory, what `karat export` wrote, or {SHIPPED}, a small model that comes with the package"
    what += " (default: %(default)s)" if optional else ""
    parser.add_argument("model", metavar="RUN|FOLDER", type=run_directory, help=what, **optional)


def _check_images(options: argparse.Namespace) -> None:
    _check_model(options)
    for name in options.images:
        path = os.path.expanduser(name)  # noqa: PTH111  # as in find_images
        if os.path.lexists(path) or glob.has_magic(path):
            return
    raise UserError(f"{options.images[0]}: no such file; name images, folders or quoted globs")


def _check_fetch(options: argparse.Namespace) -> None:
    try:
        check_writable(options.url)
        check_url(options.url)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_export(options: argparse.Namespace) -> None:
    if options.private and not options.push:
        raise UserError("--private has no effect without --push; add that, or remove --private")
    if options.push is not None:
        from huggingface_hub import get_token

        if options.format not in (None, HUB):
            raise UserError(f"--format {options.format}: --push uploads a {HUB}; remove --format")
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", options.push):
            raise UserError(f"--push {options.push}: should be USER/NAME, such as jane/owls")
        if get_token() is None:
            raise UserError(f"--push {options.push}: not logged in to the hub; run `hf auth login`, or set HF_TOKEN")
    check_run(options)


def _is_missing(model: str) -> bool:
    path = trained_model(model)
    return not path.exists() and path.parent.name != "checkpoints"  # a later error lists the checkpoints that there are


def _check_model(options: argparse.Namespace) -> None:
    if _is_missing(options.model):
        what = f"{options.model}: neither a run's directory nor a folder of karat export; name one"
        raise RunDirectoryError(f"{what}, or {SHIPPED}, which comes with the package")
