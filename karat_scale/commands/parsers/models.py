"""The commands that use a trained model. Each imports what it needs when it runs."""

import argparse
from pathlib import Path
from typing import Any

from karat_scale.foundation.arguments import add_trust, count, new_file, run_directory, whole
from karat_scale.foundation.errors import RunDirectoryError, UserError
from karat_scale.foundation.tables import EXPORT_FORMATS


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    export = commands.add_parser("export", help="write a run's model for timm, torch.export, ONNX or a model hub")
    export.add_argument("run_dir", metavar="RUN", type=run_directory, help="the run's directory")
    export.add_argument("--format", choices=EXPORT_FORMATS, help="(default: safetensors)")
    export.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")
    export.add_argument("--weights", choices=("raw", "ema", "both"), default="both")
    export.add_argument(
        "--out", metavar="PATH", help="a file with the format's suffix, or a directory (default: the run's)"
    )
    export.add_argument("--push", metavar="USER/NAME", help="upload a hub-folder to the Hugging Face hub")
    export.add_argument("--private", action="store_true", help="with --push: a new repository is not public")
    export.set_defaults(run=_export)
    add_trust(export)

    predict = commands.add_parser("predict", help="classify images with a run or an exported folder")
    predict.add_argument(
        "model", metavar="RUN|FOLDER", type=run_directory, help="a run's directory, or what `karat export` wrote"
    )
    predict.add_argument("images", metavar="IMAGES", nargs="+", help="files, folders (with all below) and quoted globs")
    predict.add_argument("--top", type=count, default=5, help="classes of each image (default: %(default)s)")
    predict.add_argument("--batch", type=count, default=32, help="images per batch (default: %(default)s)")
    predict.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")
    predict.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto")
    predict.add_argument("--json", type=new_file, metavar="FILE", help="also write a line of JSON for each image")
    predict.add_argument("--csv", type=new_file, metavar="FILE", help="also write a row of CSV for each class")
    predict.add_argument("--attention", metavar="DIR", help="also draw where the model looks: a PNG for each image")
    predict.set_defaults(run=_predict)
    add_trust(predict)

    demo = commands.add_parser("demo", help="serve a page on this machine that classifies pictures dropped into it")
    demo.add_argument(
        "model", metavar="RUN|FOLDER", type=run_directory, help="a run's directory, or what `karat export` wrote"
    )
    demo.add_argument("--port", type=whole(0), default=7860, help="0 takes any that is free (default: %(default)s)")
    demo.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")
    demo.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto")
    demo.set_defaults(run=_demo)
    add_trust(demo)


def _export(options: argparse.Namespace) -> int:
    from karat_scale.recipe.files import recipe_of_run

    if options.private and not options.push:
        raise UserError("--private is of --push; add it, or leave out --private")
    recipe_of_run(Path(options.run_dir))
    from karat_scale.commands.export.command import HUB, export_run

    if options.push and options.format not in (None, HUB):
        raise UserError(f"--format {options.format}: --push uploads a {HUB}; remove --format")
    what = (options.run_dir, options.format or "safetensors", options.checkpoint, options.weights, options.out)
    return export_run(*what, options.push, options.private)


def _predict(options: argparse.Namespace) -> int:
    _check_model(options.model)
    from karat_scale.commands.predict.command import Request, predict

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


def _demo(options: argparse.Namespace) -> int:
    _check_model(options.model)
    from karat_scale.commands.predict.command import serve

    return serve(options.model, options.checkpoint, options.weights, options.port)


def _check_model(model: str) -> None:
    """Raise RunDirectoryError, before torch is imported, if there is nothing at a path."""
    path = Path(model).expanduser()
    if not path.exists() and path.parent.name != "checkpoints":
        raise RunDirectoryError(f"{model}: neither a run's directory nor a folder of karat export; name one")
