"""The options of `karat bench`. Each command imports what it measures when it runs."""

import argparse
from functools import partial
from typing import Any

from karat_scale.commands.bench.gpu.report import add_options as add_gpu_options
from karat_scale.foundation.arguments import count, new_file, whole
from karat_scale.foundation.tables import load


def add_benches(benches: Any) -> None:
    """Add each bench to the subparsers of `karat bench`."""

    def add(name: str, what: str, module: str = "") -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = benches.add_parser(name, help=what)
        parser.set_defaults(run=partial(_run, f"karat_scale.commands.bench.{module or name}:bench_{name}"))
        return parser

    parser = add("step", "our loop against a bare PyTorch loop, KArAt against softmax", "model")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a model of timm (default: %(default)s)")
    parser.add_argument("--image-size", type=count, default=224, help="(default: %(default)s)")
    parser.add_argument("--batch", type=count, default=8, help="images per step (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=5, help="steps per round (default: %(default)s)")
    _add_output(parser, 7)

    parser = add("attention", "each implementation against SDPA, in time and memory", "model")
    add_attention_options(parser)
    parser.add_argument("--tokens", type=count, default=197, help="the number of tokens, N (default: %(default)s)")
    names = ("reference", "streaming", "cpu", "triton", "flex")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="only these implementations")

    parser = add("resume", "what an interruption costs: signal to saved, start to first step")
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", default="imagenet_vit_base_g1b")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as deepspeed.config=zero3")
    parser.add_argument("--ranks", type=count, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=2, help="images per rank (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=3, help="(default: %(default)s)")
    _add_output(parser)

    add_gpu_options(add("gpu", "whether training is right on this card, and how fast it is", "gpu.command"))
    add_data_options(add("data", "each backend and decoder against whole decodes"))


def add_attention_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of an operator and of its measurement."""
    parser.add_argument("--model", choices=("tiny", "small", "base"), default="tiny", help="(default: %(default)s)")
    parser.add_argument("--batch", type=count, default=32, help="images (default: %(default)s)")
    parser.add_argument("--grid", type=count, default=3, help="the grid, G (default: %(default)s)")
    parser.add_argument("--rank", type=count, default=12, help="the rank, r (default: %(default)s)")
    parser.add_argument("--basis", default="fourier", help="a name, or package.module:Class (default: %(default)s)")
    forms = ("modular", "project_first", "two_operators", "full_rank", "content")
    parser.add_argument("--form", choices=forms, default="modular", help="(default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=count, default=1, help="CPU threads (default: %(default)s)")
    _add_output(parser, 9)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of `karat bench data`."""
    parser.add_argument("--path", metavar="DIR", help="a directory of shards (default: photo-like images made here)")
    parser.add_argument("--tar", metavar="FILE", help="a tar of JPEGs")
    parser.add_argument("--ffcv", metavar="DIR", help="made by data_prep/make_ffcv.py, to measure that backend")
    parser.add_argument("--backend", metavar="NAME", action="append", help="may be repeated (default: all)")
    parser.add_argument("--augment", choices=("crop", "paper", "device"), default="crop")
    parser.add_argument("--workers", type=whole(0), default=1, help="0 for none (default: %(default)s)")
    parser.add_argument("--images", type=count, default=512, help="(default: %(default)s)")
    _add_output(parser, 7)


def _add_output(parser: argparse.ArgumentParser, rounds: int | None = None) -> None:
    if rounds:
        parser.add_argument("--rounds", type=count, default=rounds, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")


def _run(place: str, options: argparse.Namespace) -> int:
    code: int = load(place)(options)
    return code
