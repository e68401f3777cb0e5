"""The options of `karat bench`. Each command imports what it measures when it runs."""

import argparse
from typing import TYPE_CHECKING, Any

from karat_scale.commands.bench.gpu.report import add_options as add_gpu_options
from karat_scale.foundation.arguments import count, new_file, whole

if TYPE_CHECKING:
    from karat_scale.commands.bench.attention import Case
    from karat_scale.commands.bench.data import Plan


def add_benches(benches: Any) -> None:
    """Add each bench to the subparsers of `karat bench`."""
    parser = benches.add_parser("step", help="our loop against a bare PyTorch loop, KArAt against softmax")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=count, default=224)
    parser.add_argument("--batch", type=count, default=8)
    parser.add_argument("--steps", type=count, default=5, help="steps per round (default: %(default)s)")
    _add_rounds(parser, 7)
    parser.set_defaults(run=_step)

    parser = benches.add_parser("attention", help="each implementation against SDPA, in time and memory")
    add_attention_options(parser)
    parser.add_argument("--tokens", type=count, default=197)
    names = ("reference", "streaming", "cpu", "triton")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="only these implementations")
    parser.set_defaults(run=_attention)

    parser = benches.add_parser("resume", help="what an interruption costs: signal to saved, start to first step")
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", default="imagenet_vit_base_g1b")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as deepspeed.config=zero3")
    parser.add_argument("--ranks", type=count, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=2, help="images per rank (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=3, help="(default: %(default)s)")
    parser.set_defaults(run=_resume)

    parser = benches.add_parser("gpu", help="whether training is right on this card, and how fast it is")
    add_gpu_options(parser)
    parser.set_defaults(run=_gpu)

    for parser in benches.choices.values():
        _add_json(parser)
    parser = benches.add_parser("data", help="each backend and decoder against whole decodes")
    add_data_options(parser)
    parser.set_defaults(run=_data)


def add_attention_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of an operator and of its measurement."""
    parser.add_argument("--model", choices=("tiny", "small", "base"), default="tiny")
    parser.add_argument("--batch", type=count, default=32)
    parser.add_argument("--grid", type=count, default=3)
    parser.add_argument("--rank", type=count, default=12)
    parser.add_argument("--basis", default="fourier", help="a name, or package.module:Class (default: %(default)s)")
    forms = ("modular", "project_first", "two_operators", "full_rank", "content")
    parser.add_argument("--form", choices=forms, default="modular")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=count, default=1, help="CPU threads (default: %(default)s)")
    _add_rounds(parser, 9)


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of `karat bench data`."""
    parser.add_argument("--path", metavar="DIR", help="a directory of shards (default: photo-like images made here)")
    parser.add_argument("--tar", metavar="FILE", help="a tar of JPEGs")
    parser.add_argument("--ffcv", metavar="DIR", help="made by data_prep/make_ffcv.py, to measure that backend")
    parser.add_argument("--backend", metavar="NAME", action="append", help="may be repeated (default: all)")
    parser.add_argument("--augment", choices=("crop", "paper", "device"), default="crop")
    parser.add_argument("--workers", type=whole(0), default=1, help="0 for none (default: %(default)s)")
    parser.add_argument("--images", type=count, default=512, help="(default: %(default)s)")
    _add_rounds(parser, 7)
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write all figures to this file")


def _add_rounds(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--rounds", type=count, default=rounds, help="interleaved rounds (default: %(default)s)")


def _step(options: argparse.Namespace) -> int:
    from karat_scale.commands.bench.step import bench_step

    return bench_step(options.model, options.image_size, options.batch, options.steps, options.rounds, options.json)


def attention_case(options: argparse.Namespace, tokens: int) -> "Case":
    """Return the case of the options of `add_attention_options`."""
    from karat_scale.commands.bench.attention import Case

    names = ("model", "batch", "grid", "rank", "dtype", "device", "basis", "form")
    return Case(**{name: getattr(options, name) for name in names}, tokens=tokens)


def _attention(options: argparse.Namespace) -> int:
    from karat_scale.commands.bench.attention import bench_attention

    case = attention_case(options, options.tokens)
    return bench_attention(case, options.rounds, options.threads, options.json, options.only)


def data_plan(options: argparse.Namespace) -> "Plan":
    """Return the plan of the options of `add_data_options`."""
    from karat_scale.commands.bench.data import Plan

    names = ("tar", "ffcv", "augment", "workers", "images", "rounds")
    own = {name: getattr(options, name) for name in names}
    return Plan(shards=options.path, backends=options.backend, **own)


def _data(options: argparse.Namespace) -> int:
    from karat_scale.commands.bench.data import bench_data

    return bench_data(data_plan(options), options.json)


def _resume(options: argparse.Namespace) -> int:
    from karat_scale.commands.bench.resume import bench_resume

    return bench_resume(options.recipe, options.overrides, options.ranks, options.batch, options.rounds, options.json)


def _gpu(options: argparse.Namespace) -> int:
    from karat_scale.commands.bench.gpu.command import bench_gpu

    return bench_gpu(options.device, options.only, options.minutes, options.json)
