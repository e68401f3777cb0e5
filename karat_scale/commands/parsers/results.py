"""The parsers of the commands that look at finished runs, compare them, and use a trained model."""

import argparse
from typing import Any

from karat_scale.commands.analyze.analyses import ANALYSES, Options
from karat_scale.commands.parsers.training import check_run
from karat_scale.foundation.arguments import (
    add_checkpoint,
    add_json,
    add_run,
    add_trust,
    add_weights,
    command,
    count,
    new_file,
    positive,
    run_directory,
    tracker,
    whole,
)
from karat_scale.foundation.errors import RunDirectoryError, UserError
from karat_scale.foundation.files import trained_model
from karat_scale.foundation.tables import EXPORT_FORMATS, TRACKERS

SHIPPED = "cifar10_karat"  # in examples/weights
SCORES = ("top1", "top5", "loss", "box_ap", "mask_ap")
MATCHES = ("parameters", "step_seconds")


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    analyze = commands.add_parser("analyze", help="analyse what attention learned: figures, numbers, a report")
    _add_runs(analyze, "a run's directory; several are shown side by side")
    names = tuple(ANALYSES)
    only = f"run only these analyses: {', '.join(names)}"
    analyze.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=only)
    analyze.add_argument("--out", metavar="DIR", help="output (default: `analysis` in the first run's directory)")
    analyze.add_argument("--data", metavar="DIR", help="the data, instead of the runs' data.path")
    add_checkpoint(analyze)
    add_weights(analyze)
    images = "number of images for spectrum, content and functions (default: %(default)s)"
    analyze.add_argument("--images", type=count, default=Options.images, help=images)
    maps = "the numbers of the images for the maps (default: four images)"
    analyze.add_argument("--image", dest="image_ids", type=int, nargs="+", metavar="N", help=maps)
    block = "block of the maps; -1 is the last (default: %(default)s)"
    analyze.add_argument("--block", type=int, default=Options.block, help=block)
    grid = "landscape points per side (default: %(default)s)"
    analyze.add_argument("--grid", type=whole(2), default=Options.grid, help=grid)
    reach = "factor on the landscape's extent (default: %(default)g)"
    analyze.add_argument("--range", type=positive, default=Options.range, help=reach)
    samples = "images per point of the landscape (default: %(default)s)"
    analyze.add_argument("--samples", type=count, default=Options.samples, help=samples)
    hessian = "images for the sharpness (default: %(default)s)"
    analyze.add_argument("--hessian-samples", type=count, default=Options.hessian_samples, metavar="N", help=hessian)
    batch = "images per batch (default: %(default)s)"
    analyze.add_argument("--batch", type=count, default=Options.batch, help=batch)
    seed = "seed of the landscape's directions and the sharpness's probes (default: %(default)s)"
    analyze.add_argument("--seed", type=whole(0), default=Options.seed, help=seed)
    analyze.set_defaults(run=command("karat_scale.commands.analyze.command:analyze_paths"))
    add_trust(analyze)

    compare = commands.add_parser("compare", help="compare finished runs over their seeds: spread, differences, curves")
    _add_runs(compare, "a run's directory; the first one's group is the base")
    metric = "what the groups are compared by (default: top1; box_ap of detectors)"
    compare.add_argument("--metric", choices=SCORES, help=metric)
    match = "leave out groups that differ by more than 5 %% from the first one in this"
    compare.add_argument("--match", choices=MATCHES, help=match)
    compare.add_argument("--out", metavar="DIR", help="write compare.md, compare.csv, compare.html and the curves here")
    add_json(compare)
    compare.set_defaults(run=command("karat_scale.commands.compare.command:compare_runs"))

    track = commands.add_parser("track", help="send trackers what they still lack of a run")
    _add_runs(track, "a run's directory")
    instead = f"{', '.join(TRACKERS)} or package.module:Class, in place of log.trackers; may be repeated"
    track.add_argument("--to", action="append", type=tracker, metavar="TRACKER", help=instead)
    track.set_defaults(run=command("karat_scale.commands.elsewhere:track_runs"))
    add_trust(track)

    export = commands.add_parser("export", help="write a run's model for timm, torch.export, ONNX or a model hub")
    add_run(export)
    export.add_argument("--format", choices=EXPORT_FORMATS, help="(default: safetensors)")
    add_checkpoint(export)
    kinds = "raw, their moving average (ema), or both (the default)"
    export.add_argument("--weights", choices=("raw", "ema", "both"), default="both", help=kinds)
    export.add_argument(
        "--out", metavar="PATH", help="a file with the format's suffix, or a directory (default: the run's)"
    )
    export.add_argument("--push", metavar="USER/NAME", help="upload a hub-folder to the Hugging Face hub")
    export.add_argument("--private", action="store_true", help="with --push: a new repository is not public")
    export.set_defaults(run=command("karat_scale.commands.export.command:export_run", _check_export))
    add_trust(export)

    predict = commands.add_parser("predict", help="classify images with a run or an exported folder")
    _add_model(predict)
    predict.add_argument("images", metavar="IMAGES", nargs="+", help="files, folders (with all below) and quoted globs")
    predict.add_argument("--top", type=count, default=5, help="classes to print for each image (default: %(default)s)")
    predict.add_argument("--batch", type=count, default=32, help="images per batch (default: %(default)s)")
    add_checkpoint(predict)
    add_weights(predict)
    add_json(predict, "write a line of JSON for each image")
    predict.add_argument(
        "--csv", dest="csv_file", type=new_file, metavar="FILE", help="also write a row of CSV for each class"
    )
    predict.add_argument("--attention", metavar="DIR", help="also draw where the model looks: a PNG for each image")
    predict.set_defaults(run=command("karat_scale.commands.predict.command:predict", _check_model))
    add_trust(predict)

    demo = commands.add_parser("demo", help="serve a page on this machine that classifies pictures dropped into it")
    _add_model(demo, nargs="?", default=SHIPPED)
    demo.add_argument(
        "--port", type=whole(0), default=7860, help="port of the page; 0 takes any free one (default: %(default)s)"
    )
    add_checkpoint(demo)
    add_weights(demo)
    demo.set_defaults(run=command("karat_scale.commands.predict.command:serve", _check_model))
    add_trust(demo)


def _add_runs(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("runs", metavar="RUN", type=run_directory, nargs="+", help=what)


def _add_model(parser: argparse.ArgumentParser, **optional: Any) -> None:
    what = f"a run's directory, what `karat export` wrote, or {SHIPPED}, a small model that comes with the package"
    what += " (default: %(default)s)" if optional else ""
    parser.add_argument("model", metavar="RUN|FOLDER", type=run_directory, help=what, **optional)


def _check_export(options: argparse.Namespace) -> None:
    if options.private and not options.push:
        raise UserError("--private is of --push; add it, or leave out --private")
    check_run(options)


def _check_model(options: argparse.Namespace) -> None:
    path = trained_model(options.model)
    if not path.exists() and path.parent.name != "checkpoints":
        what = f"{options.model}: neither a run's directory nor a folder of karat export; name one"
        raise RunDirectoryError(f"{what}, or {SHIPPED}, which comes with the package")
