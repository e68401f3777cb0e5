"""The commands that look at finished runs and compare them. Each imports what it needs when it runs."""

import argparse
from typing import Any

from karat_scale.foundation.arguments import add_trust, count, new_file, positive, run_directory, tracker, whole
from karat_scale.foundation.tables import TRACKERS

SCORES = ("top1", "top5", "loss", "box_ap", "mask_ap")
ANALYSES = (
    *("training", "accuracy", "calibration", "mistakes", "robustness", "spectrum", "content", "maps", "functions"),
    *("distributions", "landscape", "sharpness"),
)


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    analyze = commands.add_parser("analyze", help="analyse what attention learned: figures, numbers, a report")
    analyze.add_argument(
        "runs", metavar="RUN", type=run_directory, nargs="+", help="a run's directory; several are shown side by side"
    )
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
    add_trust(analyze)

    compare = commands.add_parser("compare", help="compare finished runs over their seeds: spread, differences, curves")
    compare.add_argument(
        "runs",
        metavar="RUN",
        type=run_directory,
        nargs="+",
        help="a run's directory; the first one's group is the base",
    )
    compare.add_argument(
        "--metric", choices=SCORES, help="what the groups are compared by (default: top1; box_ap of detectors)"
    )
    compare.add_argument("--out", metavar="DIR", help="write compare.md, compare.csv, compare.html and the curves here")
    compare.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")
    compare.set_defaults(run=_compare)

    track = commands.add_parser("track", help="send to trackers what they have not got of a run")
    track.add_argument("runs", metavar="RUN", type=run_directory, nargs="+", help="a run's directory")
    track.add_argument(
        "--to",
        action="append",
        type=tracker,
        metavar="TRACKER",
        help=f"{', '.join(TRACKERS)} or package.module:Class, in place of log.trackers; may be repeated",
    )
    track.set_defaults(run=_track)
    add_trust(track)


def _analyze(options: argparse.Namespace) -> int:
    from karat_scale.commands.analyze.command import analyze_paths

    return analyze_paths(options)


def _compare(options: argparse.Namespace) -> int:
    from karat_scale.commands.compare.command import compare_runs

    return compare_runs(options.runs, options.metric, options.out, options.json)


def _track(options: argparse.Namespace) -> int:
    from karat_scale.commands.track import track_runs

    return track_runs(options.runs, options.to)
