"""The command line `karat`. Commands import what they need when they run, so `--help` is quick."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import karat_scale.launcher  # noqa: F401  # it looks for its parent now, before torch is imported
from karat_scale import __version__
from karat_scale.arguments import OneLineParser, count, new_file, positive, time_limit, virtual_environment, whole
from karat_scale.bench.commands import add_benches
from karat_scale.compiler_caches import use_local_caches
from karat_scale.errors import PeerError, UserError, of_the_machine, on_one_line
from karat_scale.shipped import SCRIPTS, run_prepare
from karat_scale.tables import CORRUPTIONS, EXPORT_FORMATS
from karat_scale.trust import VARIABLE

EXIT_USAGE = 2
SCORES = ("top1", "top5", "loss", "box_ap", "mask_ap")
ANALYSES = (
    *("training", "accuracy", "calibration", "mistakes", "robustness", "spectrum", "content", "maps", "functions"),
    *("distributions", "landscape", "sharpness"),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands and their options."""
    parser = OneLineParser(prog="karat", description="Train Kolmogorov-Arnold Attention ViTs.")
    parser.add_argument("--version", action="version", version=f"karat_scale {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="make, check and copy data sets with the scripts of data_prep")
    prepare.add_argument("script", choices=SCRIPTS, help="the script; `karat prepare SCRIPT --help` lists its options")
    prepare.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own options")
    prepare.set_defaults(run=lambda options: run_prepare(options.script, options.arguments))

    index = commands.add_parser("index", help="make tars that others wrote readable like our shards, without a copy")
    index.add_argument("source", metavar="SRC", type=Path, help="a directory with .tar files, also below it")
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
    show.add_argument("--out", metavar="FILE", help="a PNG (default: NAME-step-N.png)")
    show.set_defaults(run=_show)

    data = commands.add_parser("data", help="look at a data set: counts, sizes, odd files, and a page of samples")
    data.add_argument("path", metavar="PATH", help="shards, betons, or a folder with train/<class>/<image>")
    data.add_argument("--images", type=count, default=1000, help="sampled for their size (default: %(default)s)")
    data.add_argument("--classes", type=count, default=50, help="shown with samples (default: %(default)s)")
    data.add_argument("--out", metavar="FILE", help="an HTML file (default: PATH/data.html)")
    data.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    data.set_defaults(run=_data)

    train = commands.add_parser("train", help="train a recipe, or resume its run")
    train.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    train.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as optim.lr=1e-3")
    train.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval", help="evaluate a run's checkpoint, on its validation split or another test set"
    )
    evaluate.add_argument("run_dir", metavar="RUN", help="the run's directory")
    evaluate.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as data.path=DIR")
    evaluate.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")
    evaluate.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto")
    evaluate.add_argument("--on", metavar="DIR", help="another test set: shards, or a folder of classes")
    evaluate.add_argument("--split", default="", metavar="NAME", help="the split in that directory (default: val)")
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

    detect = commands.add_parser("detect", help="train or evaluate Mask R-CNN on a ViT, with data in COCO's format")
    detect.add_argument("recipe", metavar="RECIPE", help="a detection recipe's name or a YAML file; with --eval, a run")
    detect.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as data.path=DIR")
    detect.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    detect.add_argument("--eval", action="store_true", help="evaluate a checkpoint of a run by COCO's mAP")
    detect.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")
    detect.add_argument("--weights", choices=("auto", "ema", "raw"), default="auto", help="weights that --eval uses")
    detect.add_argument("--json", type=new_file, metavar="FILE", help="also write the result of --eval to this file")
    detect.set_defaults(run=_detect)

    export = commands.add_parser("export", help="write a run's model for timm, ONNX, TorchScript or a model hub")
    export.add_argument("run_dir", metavar="RUN", help="the run's directory")
    export.add_argument("--format", choices=EXPORT_FORMATS, default="safetensors")
    export.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")
    export.add_argument("--weights", choices=("raw", "ema", "both"), default="both")
    export.add_argument(
        "--out", metavar="PATH", help="a file with the format's suffix, or a directory (default: the run's)"
    )
    export.set_defaults(run=_export)

    predict = commands.add_parser("predict", help="classify images with a run or an exported folder")
    predict.add_argument("model", metavar="RUN|FOLDER", help="a run's directory, or what `karat export` wrote")
    predict.add_argument("images", metavar="IMAGES", nargs="+", help="files, folders (with all below) and quoted globs")
    predict.add_argument("--top", type=count, default=5, help="classes of each image (default: %(default)s)")
    predict.add_argument("--batch", type=count, default=32, help="images per batch (default: %(default)s)")
    predict.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")
    predict.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto")
    predict.add_argument("--json", type=new_file, metavar="FILE", help="also write a line of JSON for each image")
    predict.add_argument("--csv", type=new_file, metavar="FILE", help="also write a row of CSV for each class")
    predict.add_argument("--attention", metavar="DIR", help="also draw where the model looks: a PNG for each image")
    predict.set_defaults(run=_predict)

    ledger = commands.add_parser("ledger", help="add finished runs to docs/ledger and docs/reproduction.md")
    ledger.add_argument("runs", metavar="RUN", nargs="*", help="a run's directory (default: only rewrite the page)")
    ledger.add_argument("--docs", metavar="DIR", default="docs", help="a clone's docs folder (default: %(default)s)")
    ledger.set_defaults(run=_ledger)

    compare = commands.add_parser("compare", help="compare finished runs over their seeds: spread, differences, curves")
    compare.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory; the first one's group is the base")
    compare.add_argument(
        "--metric", choices=SCORES, help="what the groups are compared by (default: top1; box_ap of detectors)"
    )
    compare.add_argument("--out", metavar="DIR", help="write compare.md, compare.csv, compare.html and the curves here")
    compare.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    compare.set_defaults(run=_compare)

    plan = commands.add_parser("plan", help="estimate memory, ZeRO stage, micro batch and time, and find mistakes")
    plan.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    plan.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as train.precision=bf16")
    plan.add_argument("--gpus", type=count, default=1, help="total number of ranks (default: %(default)s)")
    plan.add_argument("--gpu", metavar="NAME", help="the GPU, such as h100-80 (default: this machine's RAM)")
    plan.add_argument("--memory", type=positive, metavar="GB", help="memory of an unknown GPU, or of a rank's RAM")
    plan.add_argument("--gpus-per-node", type=count, default=8, help="(default: %(default)s)")
    plan.add_argument("--step-time", type=positive, metavar="S", help="measured seconds of one micro batch on one GPU")
    plan.add_argument("--curve", action="store_true", help="show the predicted throughput from 1 to 1,024 GPUs")
    plan.add_argument("--dry-run", action="store_true", help="only build and check model, data and batches")
    plan.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    plan.set_defaults(run=_plan)

    recipes = commands.add_parser("recipes", help="list the shipped recipes: what each trains, needs and gave")
    recipes.add_argument("words", nargs="*", metavar="WORD", help="a recipe's name, or words that its text has")
    recipes.add_argument("--json", type=new_file, metavar="FILE", help="also write the list to this file")
    recipes.set_defaults(run=_recipes)

    explain = commands.add_parser("explain", help="say what a key of a recipe means, and what it may change")
    explain.add_argument("keys", nargs="*", metavar="KEY", help="a key, a section, or another tool's name for one")
    explain.add_argument("--detection", action="store_true", help="of the recipes of karat detect")
    explain.set_defaults(run=_explain)

    completion = commands.add_parser("completion", help="print the lines that make a shell complete karat")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help='in bash: eval "$(karat completion bash)"')
    completion.set_defaults(run=_completion)

    submit = commands.add_parser("submit", help="write a recipe's sbatch script, show it, and submit it")
    submit.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    submit.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as data.path=DIR")
    for option in ("account", "partition", "qos", "constraint", "mem", "dependency", "mail-type", "mail-user"):
        submit.add_argument(f"--{option}", help=f"the option --{option} of sbatch")
    submit.add_argument("--time", type=time_limit, help="the option --time of sbatch, such as 12:00:00 or 1-12")
    for option, least in (("nodes", 1), ("gpus-per-node", 0), ("cpus-per-task", 1)):
        submit.add_argument(f"--{option}", type=whole(least), help=f"the option --{option} of sbatch")
    submit.add_argument("--venv", type=virtual_environment, metavar="DIR", help="a virtual environment for the nodes")
    for setting in ("conda-env", "modules", "container", "stage"):
        variable = setting.upper().replace("-", "_")
        submit.add_argument(f"--{setting}", help=f"{variable} of slurm/imagenet_fourier_karat.sh")
    submit.add_argument("--gpu", metavar="NAME", help="plan ZeRO stage and micro batch for this GPU, such as h100-80")
    how = submit.add_mutually_exclusive_group()
    how.add_argument("--yes", dest="decision", action="store_const", const="yes", help="submit without asking")
    only = "show the script, and neither write nor submit it"
    how.add_argument("--print", dest="decision", action="store_const", const="print", default="ask", help=only)
    submit.set_defaults(run=_submit)

    status = commands.add_parser("status", help="show a run's progress, from its files")
    status.add_argument("run_dir", metavar="RUN", help="the run's directory")
    status.add_argument("--once", action="store_true", help="do not follow the run")
    status.set_defaults(run=_status)

    analyze = commands.add_parser("analyze", help="analyse what attention learned: figures, numbers, a report")
    analyze.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory; several are shown side by side")
    analyze.add_argument("--only", nargs="+", choices=ANALYSES, default=ANALYSES, help="run only these analyses")
    analyze.add_argument("--out", metavar="DIR", help="output (default: `analysis` in the first run's directory)")
    analyze.add_argument("--data", metavar="DIR", help="the data, instead of the runs' data.path")
    analyze.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")
    analyze.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto")
    analyze.add_argument(
        "--images", type=count, default=64, help="for spectrum, content, functions (default: %(default)s)"
    )
    analyze.add_argument("--image", type=int, nargs="+", metavar="N", help="images for the maps (default: four)")
    analyze.add_argument(
        "--block", type=int, default=-1, help="block of the maps; -1 is the last (default: %(default)s)"
    )
    analyze.add_argument("--grid", type=whole(2), default=15, help="landscape points per side (default: %(default)s)")
    analyze.add_argument("--range", type=positive, default=1.0, help="factor on the landscape's extent (default: 1)")
    analyze.add_argument("--samples", type=count, default=128, help="images per point (default: %(default)s)")
    analyze.add_argument(
        "--hessian-samples", type=count, default=32, metavar="N", help="images of the sharpness (default: %(default)s)"
    )
    analyze.add_argument("--batch", type=count, default=8, help="images per batch (default: %(default)s)")
    analyze.add_argument(
        "--seed", type=whole(0), default=0, help="seed of directions and probes (default: %(default)s)"
    )
    analyze.set_defaults(run=_analyze)

    doctor = commands.add_parser("doctor", help="check this machine, and find what limits a recipe's speed on it")
    doctor.add_argument("recipe", metavar="RECIPE", nargs="?", help="a shipped recipe's name or a YAML file")
    doctor.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as data.workers=4")
    doctor.add_argument("--seconds", type=positive, default=20.0, help="length of the timed run (default: %(default)s)")
    doctor.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    doctor.set_defaults(run=_doctor)

    for command in (train, evaluate, detect, export, predict, analyze):
        command.add_argument(
            "--trust",
            action="store_true",
            help="run classes that a run or a file of weights names; or set KARAT_TRUST=1",
        )

    bench = commands.add_parser("bench", help="measure against the usual alternatives")
    add_benches(bench.add_subparsers(dest="bench", required=True, metavar="BENCH"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. A user's mistake is one line on standard error, and exit code 2."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the lines of `karat completion`
        from karat_scale.completion import complete

        complete(parser)
    options = parser.parse_args(arguments)
    # torch's C++ warns with a stack of its own where a rank is lost, which we tell in a line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if getattr(options, "trust", False):
        os.environ[VARIABLE] = "1"
    try:
        use_local_caches()
        code: int = options.run(options)
        return code
    except UserError as error:
        return _end(str(error), EXIT_USAGE)
    except PeerError as error:
        return _end(str(error), 1)
    except Exception as error:
        known = of_the_machine(error)
        if known is None:
            raise
        return _end(*known)


def _end(text: str, code: int) -> int:
    """Say why this rank ends, in one line; returns the exit code."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    where = f"[rank {rank}] " if rank != "0" else ""
    print(f"{where}error: {on_one_line(text)}", file=sys.stderr)
    return code


def entry_point() -> None:
    """Run the console script."""
    code = main()
    # A launcher may repeat its signal. It must not kill an interpreter that is exiting with its own code.
    for repeated in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(repeated, signal.SIG_IGN)
    sys.exit(code)


def _index(options: argparse.Namespace) -> int:
    from karat_scale.data.indexing.command import IndexRequest, index_tars

    splits = tuple(options.split)
    request = IndexRequest(
        options.source, options.out, options.label, splits, options.classes, options.hash, options.json
    )
    return index_tars(request)


def _show(options: argparse.Namespace) -> int:
    from karat_scale.look.batch import show_batch

    return show_batch(options.recipe, options.overrides, options.step, options.images, options.out)


def _data(options: argparse.Namespace) -> int:
    from karat_scale.look.data_set import look_at_data

    return look_at_data(options.path, options.images, options.classes, options.out, options.json)


def _train(options: argparse.Namespace) -> int:
    from karat_scale.recipe.loading import dump_recipe, load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.print:
        from karat_scale.engine.deepspeed_config import check_ds_config
        from karat_scale.models.factory import layer_sizes

        check_ds_config(recipe)
        layer_sizes(recipe.model)
        print(dump_recipe(recipe), end="")
        return 0
    from karat_scale.run.run import train
    from karat_scale.tasks.classification.task import ClassificationTask

    return train(ClassificationTask, recipe)


def _eval(options: argparse.Namespace) -> int:
    what = (options.run_dir, options.overrides, options.checkpoint, options.weights)
    if options.severity and options.corrupt is None:
        return _end("--severity is of --corrupt; add it, or leave out --severity", EXIT_USAGE)
    if options.on is not None or options.labels or options.corrupt is not None or options.split or options.name:
        from karat_scale.evaluation.command import Request, evaluate_on
        from karat_scale.evaluation.kept import SEVERITIES

        request = Request(
            on=options.on,
            split=options.split,
            labels=options.labels,
            corrupt=options.corrupt,
            severities=sorted(set(options.severity or SEVERITIES)),
            name=options.name,
        )
        return evaluate_on(*what, request, options.json)
    from karat_scale.run.evaluate import evaluate_run
    from karat_scale.tasks.classification.task import ClassificationTask

    return evaluate_run(ClassificationTask, *what, options.json)


def _detect(options: argparse.Namespace) -> int:
    from karat_scale.recipe.loading import dump_recipe, load_recipe
    from karat_scale.tasks.detection.coco import require_pycocotools
    from karat_scale.tasks.detection.recipe import DetectionRecipe

    if options.eval:
        require_pycocotools()
        from karat_scale.run.evaluate import evaluate_run
        from karat_scale.tasks.detection.task import DetectionTask

        what = (options.recipe, options.overrides, options.checkpoint, options.weights, options.json)
        return evaluate_run(DetectionTask, *what)
    recipe = load_recipe(options.recipe, options.overrides, DetectionRecipe)
    if options.print:
        print(dump_recipe(recipe), end="")
        return 0
    require_pycocotools()
    from karat_scale.run.run import train
    from karat_scale.tasks.detection.task import DetectionTask

    return train(DetectionTask, recipe)


def _export(options: argparse.Namespace) -> int:
    from karat_scale.export.command import export_run

    return export_run(options.run_dir, options.format, options.checkpoint, options.weights, options.out)


def _predict(options: argparse.Namespace) -> int:
    from karat_scale.predict.command import Request, predict

    request = Request(
        checkpoint=options.checkpoint,
        weights=options.weights,
        top=options.top,
        batch=options.batch,
        json_file=options.json,
        csv_file=options.csv,
        attention=options.attention,
    )
    return predict(options.model, options.images, request)


def _ledger(options: argparse.Namespace) -> int:
    from karat_scale.ledger.command import keep_ledger

    return keep_ledger(options.runs, options.docs)


def _compare(options: argparse.Namespace) -> int:
    from karat_scale.compare.command import compare_runs

    return compare_runs(options.runs, options.metric, options.out, options.json)


def _plan(options: argparse.Namespace) -> int:
    from karat_scale.estimate.command import Request, plan_recipe

    request = Request(
        gpus=options.gpus,
        gpus_per_node=options.gpus_per_node,
        gpu=options.gpu,
        memory=options.memory,
        step_time=options.step_time,
        with_curve=options.curve,
        only_dry_run=options.dry_run,
        json_file=options.json,
    )
    return plan_recipe(options.recipe, options.overrides, request)


def _recipes(options: argparse.Namespace) -> int:
    from karat_scale.recipe.catalog import list_recipes

    return list_recipes(options.words, options.json)


def _explain(options: argparse.Namespace) -> int:
    from karat_scale.recipe import Recipe
    from karat_scale.recipe.explain import explain

    if options.detection:
        from karat_scale.tasks.detection.recipe import DetectionRecipe

        return explain(options.keys, DetectionRecipe)
    return explain(options.keys, Recipe)


def _completion(options: argparse.Namespace) -> int:
    from karat_scale.completion import shell_code

    print(shell_code(options.shell))
    return 0


def _submit(options: argparse.Namespace) -> int:
    from karat_scale.submit.sbatch import submit

    given = {name: value for name, value in vars(options).items() if value is not None}
    named = ("account", "partition", "qos", "constraint", "mem", "dependency", "mail_type", "mail_user")
    counted = ("nodes", "gpus_per_node", "cpus_per_task", "time")
    chosen = {name.replace("_", "-"): str(given[name]) for name in (*named, *counted) if name in given}
    if "gpus_per_node" in given:  # one task for each GPU; one on a node without GPUs
        chosen["ntasks-per-node"] = str(max(given["gpus_per_node"], 1))
    settings = ("venv", "conda_env", "modules", "container", "stage")
    variables = {name.upper(): given[name] for name in settings if name in given}
    return submit(options.recipe, options.overrides, chosen, variables, options.decision, options.gpu)


def _status(options: argparse.Namespace) -> int:
    from karat_scale.cluster.status import show_status

    return show_status(options.run_dir, options.once)


def _analyze(options: argparse.Namespace) -> int:
    from karat_scale.analysis.command import analyze_paths

    return analyze_paths(options)


def _doctor(options: argparse.Namespace) -> int:
    from karat_scale.doctor.run import doctor

    return doctor(options.recipe, options.overrides, options.seconds, options.json)
