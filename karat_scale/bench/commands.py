"""The options of `karat bench`. Each command imports what it measures when it runs."""

import argparse
from typing import Any

from karat_scale.arguments import count, new_file, whole
from karat_scale.bench.gpu.options import add_options as add_gpu_options


def add_benches(benches: Any) -> None:
    """Add each bench to the subparsers of `karat bench`."""
    of_training = (_add_step, _add_stages, _add_attention, _add_recompute, _add_resume, _add_save, _add_gpu)
    of_data = (_add_order, _add_data, _add_prepare)
    for add in (*of_training, *of_data, _add_plan):
        add(benches)
    for parser in benches.choices.values():
        parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures there too")


def _add_step(benches: Any) -> None:
    parser = benches.add_parser("step", help="our loop against a bare PyTorch loop, KArAt against softmax")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=count, default=8)
    parser.add_argument("--steps", type=count, default=5, help="steps a round (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=7, help="interleaved rounds (default: %(default)s)")
    parser.set_defaults(run=_step)


def _step(options: argparse.Namespace) -> int:
    from karat_scale.bench.step import bench_step

    return bench_step(options.model, options.batch, options.steps, options.rounds, options.json)


def _add_stages(benches: Any) -> None:
    parser = benches.add_parser("stages", help="a step at each ZeRO stage against DistributedDataParallel")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=count, default=64)
    parser.add_argument("--batch", type=count, default=16, help="of a rank (default: %(default)s)")
    parser.add_argument("--attention", choices=("softmax", "karat"), default="softmax")
    parser.add_argument("--ranks", type=count, default=2, help="processes on this machine (default: %(default)s)")
    parser.add_argument("--steps", type=count, default=3, help="steps a round (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=9, help="interleaved rounds (default: %(default)s)")
    parser.set_defaults(run=_stages)


def _stages(options: argparse.Namespace) -> int:
    from karat_scale.bench.stages import StagesCase, bench_stages

    case = StagesCase(
        model=options.model,
        image_size=options.image_size,
        batch=options.batch,
        attention=options.attention,
        ranks=options.ranks,
        steps=options.steps,
        rounds=options.rounds,
    )
    return bench_stages(case, options.json)


def _add_attention(benches: Any) -> None:
    parser = benches.add_parser("attention", help="each implementation against SDPA, in time and memory")
    parser.add_argument("--model", choices=("tiny", "small", "base"), default="tiny")
    parser.add_argument("--batch", type=count, default=32)
    parser.add_argument("--grid", type=count, default=3)
    parser.add_argument("--rank", type=count, default=12)
    parser.add_argument("--tokens", type=count, default=197)
    parser.add_argument("--basis", default="fourier", help="a name, or package.module:Class (default: %(default)s)")
    forms = ("modular", "project_first", "two_operators", "full_rank")
    parser.add_argument("--form", choices=forms, default="modular")
    names = ("reference", "streaming", "cpu", "triton")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these implementations alone")
    parser.add_argument("--curve", nargs="+", type=count, metavar="N", help="the growth of time and memory over N")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=count, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=9, help="interleaved rounds (default: %(default)s)")
    parser.set_defaults(run=_attention)


def _attention(options: argparse.Namespace) -> int:
    from karat_scale.bench.attention import Case, bench_attention
    from karat_scale.bench.curve import bench_curve

    case = Case(
        model=options.model,
        batch=options.batch,
        grid=options.grid,
        rank=options.rank,
        dtype=options.dtype,
        device=options.device,
        tokens=options.tokens,
        basis=options.basis,
        form=options.form,
    )
    if options.curve:
        return bench_curve(case, options.curve, options.rounds, options.threads, options.json)
    return bench_attention(case, options.rounds, options.threads, options.json, options.only)


def _add_order(benches: Any) -> None:
    parser = benches.add_parser("order", help="how well the order policies shuffle, and how they read a disk")
    parser.add_argument("--samples", type=count, default=1_281_167, help="of an epoch (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=1024, help="global batch (default: %(default)s)")
    parser.add_argument("--block", type=count, default=256, help="samples a block (default: %(default)s)")
    parser.add_argument("--window", type=count, default=32, help="blocks a window (default: %(default)s)")
    parser.add_argument("--path", metavar="DIR", help="shards to read with a cold cache")
    parser.set_defaults(run=_order)


def _order(options: argparse.Namespace) -> int:
    from karat_scale.bench.order import OrderCase, bench_order

    case = OrderCase(options.samples, options.batch, options.block, options.window)
    return bench_order(case, options.path, options.json)


def _add_data(benches: Any) -> None:
    parser = benches.add_parser("data", help="each backend and decoder against whole decodes and others' loaders")
    parser.add_argument("--path", metavar="DIR", help="a directory of shards (default: photo-like images made here)")
    parser.add_argument("--tar", metavar="FILE", help="a tar of JPEGs")
    parser.add_argument("--ffcv", metavar="DIR", help="made by data_prep/make_ffcv.py, to measure that backend")
    parser.add_argument("--backend", metavar="NAME", action="append", help="may be repeated (default: all)")
    parser.add_argument("--augment", choices=("crop", "paper"), default="crop")
    parser.add_argument("--workers", type=whole(0), default=1, help="0 for none (default: %(default)s)")
    parser.add_argument("--images", type=count, default=512, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=7, help="interleaved rounds (default: %(default)s)")
    parser.set_defaults(run=_data)


def _data(options: argparse.Namespace) -> int:
    from karat_scale.bench.data import Plan, bench_data

    plan = Plan(
        shards=options.path,
        tar=options.tar,
        ffcv=options.ffcv,
        backends=options.backend,
        augment=options.augment,
        workers=options.workers,
        images=options.images,
        rounds=options.rounds,
    )
    return bench_data(plan, options.json)


def _add_prepare(benches: Any) -> None:
    parser = benches.add_parser("prepare", help="data_prep/make_webdataset.py against decoding, encoding and copying")
    parser.add_argument("--tar", metavar="FILE", help="a tar of JPEGs (default: photo-like images made here)")
    parser.add_argument("--resize", type=count, default=256, help="short side in pixels (default: %(default)s)")
    parser.add_argument("--quality", type=count, default=90, help="(default: %(default)s)")
    parser.add_argument("--encoder", choices=("auto", "native", "pillow"), default="auto")
    parser.add_argument("--images", type=count, default=1000, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=5, help="interleaved rounds (default: %(default)s)")
    parser.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> int:
    from karat_scale.bench.prepare import PreparePlan, bench_prepare

    plan = PreparePlan(
        tar=options.tar,
        resize=options.resize,
        quality=options.quality,
        encoder=options.encoder,
        images=options.images,
        rounds=options.rounds,
    )
    return bench_prepare(plan, options.json)


def _add_resume(benches: Any) -> None:
    parser = benches.add_parser("resume", help="what an interruption costs: signal to saved, start to first step")
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", default="imagenet_vit_base_g1b")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="such as deepspeed.config=zero3")
    parser.add_argument("--ranks", type=count, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=2, help="images a rank (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=3, help="(default: %(default)s)")
    parser.set_defaults(run=_resume)


def _resume(options: argparse.Namespace) -> int:
    from karat_scale.bench.resume import bench_resume

    return bench_resume(options.recipe, options.overrides, options.ranks, options.batch, options.rounds, options.json)


def _add_recompute(benches: Any) -> None:
    parser = benches.add_parser("recompute", help="memory saved and time paid by each policy of train.recompute")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--image-size", type=count, default=224)
    parser.add_argument("--batch", type=count, default=4)
    parser.add_argument("--grid", type=count, default=3)
    names = ("softmax", "reference", "streaming", "cpu", "triton")
    parser.add_argument("--only", nargs="+", choices=names, default=names[:4], help="these attentions alone")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=count, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=5, help="interleaved rounds (default: %(default)s)")
    parser.set_defaults(run=_recompute)


def _recompute(options: argparse.Namespace) -> int:
    from karat_scale.bench.recompute import Case, bench_recompute

    case = Case(options.model, options.batch, options.grid, options.dtype, options.device, options.image_size)
    return bench_recompute(case, options.rounds, options.threads, options.json, options.only)


def _add_save(benches: Any) -> None:
    parser = benches.add_parser("save", help="how long training stands still for a checkpoint, and a resume takes")
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--image-size", type=count, default=224)
    parser.add_argument("--batch", type=count, default=2)
    parser.add_argument("--config", default="zero0", help="deepspeed.config (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=5, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--path", metavar="DIR", help="where to save (default: the temporary directory)")
    parser.set_defaults(run=_save)


def _save(options: argparse.Namespace) -> int:
    from karat_scale.bench.save import SavePlan, bench_save

    where = (options.config, options.rounds, options.path)
    plan = SavePlan(options.model, options.image_size, options.batch, *where)
    return bench_save(plan, options.json)


def _add_gpu(benches: Any) -> None:
    parser = benches.add_parser(
        "gpu", help="check the kernels on this card and measure them; run it first on a new one"
    )
    add_gpu_options(parser)
    parser.set_defaults(run=_gpu)


def _gpu(options: argparse.Namespace) -> int:
    from karat_scale.bench.gpu.command import bench_gpu

    return bench_gpu(options.device, options.only, options.minutes, options.json)


def _add_plan(benches: Any) -> None:
    parser = benches.add_parser("plan", help="the memory that `karat plan` counts against that of real steps")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from karat_scale.bench.plan import bench_plan

    return bench_plan(options.json)
