"""`python -m karat_scale.bench.gpu`: the command where only torch and triton are installed."""

import argparse
import sys

from karat_scale.arguments import new_file
from karat_scale.bench.gpu.command import bench_gpu
from karat_scale.bench.gpu.options import add_options
from karat_scale.errors import UserError


def main() -> int:
    """The command's exit code; a user's mistake is one line on standard error and code 2."""
    parser = argparse.ArgumentParser(prog="python -m karat_scale.bench.gpu", description="Check and measure a card.")
    add_options(parser)
    parser.add_argument("--json", type=new_file, metavar="FILE")
    options = parser.parse_args()
    try:
        return bench_gpu(options.device, options.only, options.minutes, options.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
