"""The sections of `karat bench gpu`: their order, share of the time, needs and tables; and the command's options.

Imports no torch.
"""

import argparse
from dataclasses import dataclass, replace
from importlib.util import find_spec

from karat_scale.foundation.arguments import positive


@dataclass(frozen=True)
class Section:
    """One part of the report; its figures come from `measure` of `module`.

    Args:
        title: of its table.
        share: of the time that is left, beside those of the later sections that can run.
        columns: key of a row and heading of its column.
        packages: what has to be installed beside torch.
        ranks: whether a process runs on each card.
        of: the module, where it has not the section's name.
        decides: whether it answers if training is right.
    """

    name: str
    title: str
    share: float
    columns: tuple[tuple[str, str], ...]
    packages: tuple[str, ...] = ()
    ranks: bool = False
    of: str = ""
    decides: bool = False

    @property
    def module(self) -> str:
        """The module of this package."""
        return self.of or self.name

    def lacks(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]


_TRAINER = ("timm", "deepspeed", "pydantic", "torchvision", "rich", "psutil", "yaml")

LOSSES = Section(
    "losses",
    "Losses of 20 steps against fp32 on the CPU",
    share=6.0,
    columns=(
        ("mode", "mode"),
        ("difference", "largest difference"),
        ("allowed", "allowed"),
        ("losses", "same losses"),
        ("skips", "skips a NaN"),
        ("twice", "same bits twice"),
        ("resumes", "and resumed"),
        ("linear_dtype", "linear layers in"),
        ("operator_dtype", "operator in"),
        ("right", "right"),
    ),
    packages=_TRAINER,
    decides=True,
)
RANK_LOSSES = replace(
    LOSSES, name="rank_losses", title=f"{LOSSES.title}, a rank a card", share=4.0, ranks=True, of="losses"
)
KERNELS = Section(
    "kernels",
    "Kernels against the float64 reference and a plain formula",
    share=1.5,
    columns=(
        ("call", "call"),
        ("error", "relative error"),
        ("worst", "of"),
        ("formula_error", "against the formula"),
        ("tolerance", "allowed"),
        ("right", "right"),
    ),
    decides=True,
)
ATTENTION = Section(
    "attention",
    "Attention against every backend of SDPA",
    share=2.0,
    columns=(
        ("case", "case"),
        ("attention", "attention"),
        ("forward_ms", "forward, ms"),
        ("both_ms", "and backward, ms"),
        ("ratio_forward", "forward to SDPA"),
        ("ratio_both", "and backward to SDPA"),
        ("ratio_best", "to the fastest SDPA"),
        ("forward_wall_ms", "forward by the clock, ms"),
        ("both_wall_ms", "and backward by the clock, ms"),
        ("peak_mb", "peak, MB"),
    ),
)
TRAINING = Section(
    "training",
    "Training steps through our loop and DeepSpeed",
    share=4.0,
    columns=(
        ("model", "model"),
        ("mode", "mode"),
        ("attention", "attention"),
        ("batch", "batch"),
        ("images_per_second", "images/s"),
        ("ratio_to_softmax", "to softmax"),
        ("mfu", "MFU"),
        ("peak_mb", "peak, MB"),
        ("launches", "launches a step"),
        ("kernels", "kernels a step"),
        ("waits", "waits for the device"),
    ),
    packages=_TRAINER,
)
LOADER = Section(
    "loader",
    "Loading JPEGs",
    share=1.0,
    columns=(
        ("loader", "loader"),
        ("images_per_second", "images/s"),
        ("ratio", "to the first"),
    ),
    packages=_TRAINER,
)
RANKS = Section(
    "ranks",
    "ZeRO stages against DistributedDataParallel",
    share=1.5,
    columns=(
        ("case", "case"),
        ("contender", "contender"),
        ("milliseconds_a_step", "ms a step"),
        ("images_per_second", "images/s"),
        ("ratio_to_ddp", "to DDP"),
        ("difference", "losses differ from DDP's by"),
        ("allowed", "allowed"),
        ("right", "right"),
    ),
    packages=_TRAINER,
    ranks=True,
)
# What decides whether to trust the card comes first, then what decides how fast it is.
_ORDER = (LOSSES, RANK_LOSSES, KERNELS, ATTENTION, TRAINING, LOADER, RANKS)
SECTIONS = {section.name: section for section in _ORDER}


DEFAULT_FILE = "karat_bench_gpu.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """All but `--json`, which every bench has."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: toy sizes, to try the command")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="run only these sections")
    parser.add_argument("--minutes", type=positive, default=10.0, help="for all sections (default: 10)")
