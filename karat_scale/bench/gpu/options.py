"""The options of `karat bench gpu`, which `python -m karat_scale.bench.gpu` shares. Imports no torch."""

import argparse

from karat_scale.arguments import positive
from karat_scale.bench.gpu.sections import SECTIONS

DEFAULT_FILE = "karat_bench_gpu.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """All but `--json`, which every bench has."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: toy sizes, to try the command")
    parser.add_argument(
        "--only", type=_sections, metavar="SECTION[,SECTION]", help=f"of {', '.join(SECTIONS)} (default: all)"
    )
    parser.add_argument("--minutes", type=positive, default=10.0, help="for all sections (default: 10)")


def _sections(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(f"there is no section {name!r}; choose from {', '.join(SECTIONS)}")
    return [name for name in SECTIONS if name in names]
