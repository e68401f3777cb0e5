"""`python -m karat_scale.commands.bench.gpu`: the command where only torch and triton are installed."""

from karat_scale.commands.bench.gpu.command import bench_gpu
from karat_scale.commands.bench.gpu.report import add_options
from karat_scale.foundation.arguments import OneLineParser, new_file
from karat_scale.foundation.errors import run_script


def main() -> int:
    """Return the command's exit code."""
    parser = OneLineParser(prog="python -m karat_scale.commands.bench.gpu", description="Check and measure a card.")
    add_options(parser)
    parser.add_argument("--json", type=new_file, metavar="FILE")
    options = parser.parse_args()
    return bench_gpu(options.device, options.only, options.minutes, options.json)


if __name__ == "__main__":
    run_script(main)
