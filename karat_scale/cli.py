"""`karat`: the one entry point. Commands import what they need when they run, so `--help` is quick."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from karat_scale import __version__
from karat_scale.errors import UserError

EXIT_USAGE = 2
ANALYSES = ("spectrum", "maps", "functions", "distributions", "landscape")


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="karat", description="Train Kolmogorov-Arnold Attention ViTs.")
    parser.add_argument("--version", action="version", version=f"karat_scale {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a recipe, or go on where its run stopped")
    train.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=1e-3")
    train.add_argument("--print", action="store_true", help="show the resolved recipe and stop")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="evaluate a run's checkpoint on the validation split")
    evaluate.add_argument("run_dir", metavar="RUN", help="the run's directory")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=DIR")
    evaluate.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")
    evaluate.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto")
    evaluate.add_argument("--json", metavar="FILE", help="write the result there too")
    evaluate.set_defaults(run=_eval)

    export = commands.add_parser("export", help="a checkpoint's whole fp32 weights as one file")
    export.add_argument("run_dir", metavar="RUN", help="the run's directory")
    export.add_argument("--format", choices=("safetensors",), default="safetensors")
    export.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")
    export.add_argument("--weights", choices=("raw", "ema", "both"), default="both")
    export.add_argument("--out", metavar="PATH", help="a .safetensors file or a directory (default: the run's)")
    export.set_defaults(run=_export)

    submit = commands.add_parser("submit", help="write a recipe's sbatch script, show it, and submit it")
    submit.add_argument("recipe", metavar="RECIPE", help="a shipped recipe's name or a YAML file")
    submit.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.path=DIR")
    for option in ("account", "partition", "time"):
        submit.add_argument(f"--{option}", help="as sbatch has it")
    for option in ("nodes", "gpus-per-node", "cpus-per-task"):
        submit.add_argument(f"--{option}", type=int, help="as sbatch has it")
    for setting in ("venv", "conda-env", "modules", "container", "stage"):
        submit.add_argument(f"--{setting}", help="see the top of slurm/imagenet_fourier_karat.sh")
    submit.add_argument("--yes", action="store_true", help="submit without asking")
    submit.set_defaults(run=_submit)

    status = commands.add_parser("status", help="where a run stands, from its files")
    status.add_argument("run_dir", metavar="RUN", help="the run's directory")
    status.add_argument("--once", action="store_true", help="do not follow the run")
    status.set_defaults(run=_status)

    analyze = commands.add_parser("analyze", help="what the attention of runs learned: figures, numbers, a report")
    analyze.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory; two are set side by side")
    analyze.add_argument("--only", nargs="+", choices=ANALYSES, default=ANALYSES, help="these analyses alone")
    analyze.add_argument("--out", metavar="DIR", help="(default: `analysis` in the first run's directory)")
    analyze.add_argument("--data", metavar="DIR", help="in place of the runs' data.path")
    analyze.add_argument("--checkpoint", default="best", help="best, latest, or a name (default: %(default)s)")
    analyze.add_argument("--weights", choices=("auto", "raw", "ema"), default="auto")
    analyze.add_argument("--images", type=int, default=64, help="for spectrum and functions (default: %(default)s)")
    analyze.add_argument("--image", type=int, nargs="+", metavar="N", help="images of the maps (default: four)")
    analyze.add_argument("--block", type=int, default=-1, help="of the maps; -1 is the last (default: %(default)s)")
    analyze.add_argument("--grid", type=int, default=15, help="landscape points a side (default: %(default)s)")
    analyze.add_argument("--samples", type=int, default=256, help="images a landscape point (default: %(default)s)")
    analyze.add_argument("--batch", type=int, default=8, help="images at a time (default: %(default)s)")
    analyze.add_argument("--seed", type=int, default=0, help="of random directions and probes (default: %(default)s)")
    analyze.set_defaults(run=_analyze)

    doctor = commands.add_parser("doctor", help="what this machine has, and what bounds a recipe on it")
    doctor.add_argument("recipe", metavar="RECIPE", nargs="?", help="a shipped recipe's name or a YAML file")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.workers=4")
    doctor.add_argument("--seconds", type=float, default=20.0, help="of the timed run (default: %(default)s)")
    doctor.add_argument("--json", metavar="FILE", help="write all figures there too")
    doctor.set_defaults(run=_doctor)

    bench = commands.add_parser("bench", help="measure against what you would use instead")
    benches = bench.add_subparsers(dest="bench", required=True, metavar="BENCH")
    step = benches.add_parser("step", help="our loop against a bare PyTorch loop, KArAt against softmax")
    step.add_argument("--model", default="vit_tiny_patch16_224")
    step.add_argument("--batch", type=int, default=8)
    step.add_argument("--steps", type=int, default=5, help="steps a round (default: %(default)s)")
    step.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: %(default)s)")
    step.add_argument("--json", metavar="FILE")
    step.set_defaults(run=_bench_step)
    attention = benches.add_parser("attention", help="each implementation against SDPA, in time and memory")
    attention.add_argument("--model", choices=("tiny", "small", "base"), default="tiny")
    attention.add_argument("--batch", type=int, default=32)
    attention.add_argument("--grid", type=int, default=3)
    attention.add_argument("--rank", type=int, default=12)
    attention.add_argument("--tokens", type=int, default=197)
    attention.add_argument("--basis", default="fourier", help="a name, or package.module:Class (default: %(default)s)")
    forms = ("modular", "project_first", "two_operators", "full_rank")
    attention.add_argument("--form", choices=forms, default="modular")
    names = ("reference", "streaming", "cpu", "triton")
    attention.add_argument("--only", nargs="+", choices=names, default=names, help="these implementations alone")
    attention.add_argument("--curve", nargs="+", type=int, metavar="N", help="the growth of time and memory over N")
    attention.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    attention.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    attention.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    attention.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default: %(default)s)")
    attention.add_argument("--json", metavar="FILE")
    attention.set_defaults(run=_bench_attention)

    order = benches.add_parser("order", help="how well the order policies shuffle, and how they read a disk")
    order.add_argument("--samples", type=int, default=1_281_167, help="of an epoch (default: %(default)s)")
    order.add_argument("--batch", type=int, default=1024, help="global batch (default: %(default)s)")
    order.add_argument("--block", type=int, default=256, help="samples a block (default: %(default)s)")
    order.add_argument("--window", type=int, default=32, help="blocks a window (default: %(default)s)")
    order.add_argument("--path", metavar="DIR", help="shards to read with a cold cache")
    order.add_argument("--json", metavar="FILE")
    order.set_defaults(run=_bench_order)

    data = benches.add_parser("data", help="each backend and decoder against whole decodes and others' loaders")
    data.add_argument("--path", metavar="DIR", help="a directory of shards (default: photo-like images made here)")
    data.add_argument("--tar", metavar="FILE", help="a tar of JPEGs")
    data.add_argument("--ffcv", metavar="DIR", help="made by data_prep/make_ffcv.py, to measure that backend")
    data.add_argument("--backend", metavar="NAME", action="append", help="may be repeated (default: all)")
    data.add_argument("--augment", choices=("crop", "paper"), default="crop")
    data.add_argument("--workers", type=int, default=1, help="0 for none (default: %(default)s)")
    data.add_argument("--images", type=int, default=512, help="(default: %(default)s)")
    data.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: %(default)s)")
    data.add_argument("--json", metavar="FILE")
    data.set_defaults(run=_bench_data)

    prepare = benches.add_parser("prepare", help="data_prep/make_webdataset.py against decoding, encoding and copying")
    prepare.add_argument("--tar", metavar="FILE", help="a tar of JPEGs (default: photo-like images made here)")
    prepare.add_argument("--resize", type=int, default=256, help="short side in pixels (default: %(default)s)")
    prepare.add_argument("--quality", type=int, default=90, help="(default: %(default)s)")
    prepare.add_argument("--encoder", choices=("auto", "native", "pillow"), default="auto")
    prepare.add_argument("--images", type=int, default=1000, help="(default: %(default)s)")
    prepare.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: %(default)s)")
    prepare.add_argument("--json", metavar="FILE")
    prepare.set_defaults(run=_bench_prepare)

    gpu = benches.add_parser("gpu", help="check the kernels on this card and measure them; run it first on a new one")
    gpu.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    gpu.add_argument("--quick", action="store_true", help="small sizes, to try the command")
    gpu.add_argument("--json", metavar="FILE")
    gpu.set_defaults(run=_bench_gpu)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. A user's mistake is one line on standard error and code 2."""
    options = build_parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except UserError as error:
        rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
        where = f"[rank {rank}] " if rank != "0" else ""
        print(f"{where}error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USAGE


def entry_point() -> None:
    """The console script."""
    code = main()
    # A launcher may repeat its signal; it must not kill an interpreter that is on its way out with its own code.
    for repeated in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(repeated, signal.SIG_IGN)
    sys.exit(code)


def _train(options: argparse.Namespace) -> int:
    from karat_scale.recipe_io import dump_recipe, load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.print:
        print(dump_recipe(recipe), end="")
        return 0
    from karat_scale.train.run import train

    return train(recipe)


def _eval(options: argparse.Namespace) -> int:
    from karat_scale.train.eval_run import evaluate_run

    return evaluate_run(options.run_dir, options.overrides, options.checkpoint, options.weights, options.json)


def _export(options: argparse.Namespace) -> int:
    from karat_scale.train.export import export_run

    return export_run(options.run_dir, options.checkpoint, options.weights, options.out)


def _submit(options: argparse.Namespace) -> int:
    from karat_scale.cluster.submit import submit

    given = {name: value for name, value in vars(options).items() if value is not None}
    sbatch = ("account", "partition", "nodes", "gpus_per_node", "cpus_per_task", "time")
    chosen = {name.replace("_", "-"): str(given[name]) for name in sbatch if name in given}
    if "gpus_per_node" in given:  # one task for each; one on a node without GPUs
        chosen["ntasks-per-node"] = str(max(given["gpus_per_node"], 1))
    settings = ("venv", "conda_env", "modules", "container", "stage")
    variables = {name.upper(): given[name] for name in settings if name in given}
    return submit(options.recipe, options.overrides, chosen, variables, options.yes)


def _status(options: argparse.Namespace) -> int:
    from karat_scale.cluster.status import show_status

    return show_status(options.run_dir, options.once)


def _analyze(options: argparse.Namespace) -> int:
    from karat_scale.analysis.command import analyze_paths

    return analyze_paths(options)


def _doctor(options: argparse.Namespace) -> int:
    from karat_scale.doctor.run import doctor

    return doctor(options.recipe, options.overrides, options.seconds, options.json)


def _bench_step(options: argparse.Namespace) -> int:
    from karat_scale.bench.step import bench_step

    return bench_step(options.model, options.batch, options.steps, options.rounds, options.json)


def _bench_attention(options: argparse.Namespace) -> int:
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


def _bench_order(options: argparse.Namespace) -> int:
    from karat_scale.bench.order import OrderCase, bench_order

    case = OrderCase(options.samples, options.batch, options.block, options.window)
    return bench_order(case, options.path, options.json)


def _bench_data(options: argparse.Namespace) -> int:
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


def _bench_prepare(options: argparse.Namespace) -> int:
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


def _bench_gpu(options: argparse.Namespace) -> int:
    from karat_scale.bench.gpu import bench_gpu

    return bench_gpu(options.device, options.json, options.quick)
