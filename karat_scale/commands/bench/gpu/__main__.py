"""`python -m karat_scale.commands.bench.gpu`: the command where only torch and triton are installed."""

from karat_scale.commands.bench.gpu.command import bench_gpu
from karat_scale.commands.bench.gpu.report import add_options
from karat_scale.foundation.arguments import OneLineParser
from karat_scale.foundation.errors import run_script


def main() -> int:
    """Return the command's exit code."""
    parser = OneLineParser(prog="python -m karat_scale.commands.bench.gpu", description="Check and measure a card.")
    add_options(parser)
    return bench_gpu(parser.parse_args())


if __name__ == "__main__":
    run_script(main)
