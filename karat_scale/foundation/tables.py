"""The parts that a recipe or a command chooses by name: one table for each kind, one row for each part.

The choices in the recipe's schema and on the command line are the names of these tables. A row names the code by its
place, `module:attribute`, which is imported only when the part is used, and states the facts that others need earlier.
So this module imports nothing heavy, and reading a recipe stays fast. To add a part, write one module and add one row.

Code that a recipe names as `module:Class`, and commands in it, run only if the user asked for it. The recipe on the
command line is the user's. A run's directory, a file of weights or a hub's folder may come from somebody else, and a
module of that name may lie beside it.
"""

import atexit
import gc
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from karat_scale.foundation.errors import UserError


@contextmanager
def importing(for_good: bool = False) -> Iterator[None]:
    """Turn garbage collection off while modules are imported.

    torch and DeepSpeed make hundreds of thousands of objects, and nearly all stay: the collections take a seventh of
    the startup time.

    for_good: whether to exclude all objects that exist at the end from later collections, too; for commands that import
    much and train long.
    """
    known, was_enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good and len(sys.modules) > known:
            gc.freeze()
            atexit.register(gc.unfreeze)  # or Triton's C++ complains of objects that are left at the end
        if was_enabled:
            gc.enable()


def load(place: str) -> Any:
    """Return the object at a place, `module:attribute`."""
    module, _, name = place.partition(":")
    with importing():
        return getattr(importlib.import_module(module), name)


SCHEMAS = {
    "train": "karat_scale.recipe:Recipe",
    "detect": "karat_scale.training.tasks.detection.recipe:DetectionRecipe",
}
"""The schema of the recipes that a command trains."""


def load_class(key: str, place: str, *parents: type) -> type:
    """Return the user's class at `package.module:Class`, the value of a key. Its module may be anybody's.

    Raises:
        ValueError: it cannot be imported, or it is not a class that can be built and descends from one of `parents`.
    """
    module, _, name = place.partition(":")
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a module of others may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"{key} = {place!r}: {error}; put its directory on PYTHONPATH") from error
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{key} = {place!r}: {module} cannot be imported: {reason}") from error
    if not hasattr(imported, name):
        raise ValueError(f"{key} = {place!r}: module {module} has no {name}")
    found = getattr(imported, name)
    if not (inspect.isclass(found) and issubclass(found, parents)):
        raise ValueError(f"{key} = {place!r}: expected a subclass of {' or '.join(own.__name__ for own in parents)}")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise ValueError(f"{key} = {place!r}: the class lacks {missing}")
    return found


@dataclass(frozen=True)
class Extra:
    """A group of optional dependencies in pyproject.toml.

    module: a module that can be imported if the extra is installed. distributions: the possible names of its main
    distribution, the default first. needed_for: what needs it, as a user writes it. debian: the Debian packages that
    its installation needs.
    """

    module: str
    distributions: tuple[str, ...]
    needed_for: str
    debian: str = ""


EXTRAS = {
    "ffcv": Extra("ffcv", ("ffcv",), "data.backend=ffcv", "libopencv-dev libturbojpeg0-dev pkg-config g++"),
    "dali": Extra(
        "nvidia.dali", tuple(f"nvidia-dali-cuda{version}" for version in (130, 120, 110)), "data.backend=dali"
    ),
    "export": Extra("onnxruntime", ("onnxruntime",), "karat export --format onnx"),
    "parquet": Extra("pyarrow", ("pyarrow",), "Parquet files in karat prepare webdataset"),
    "remote": Extra("s3fs", ("s3fs",), "data at s3://, gs:// or https://, and checkpoint.url"),
    "corruptions": Extra("imagecorruptions", ("imagecorruptions-imaug",), "karat eval --corrupt"),
    "detection": Extra("pycocotools", ("pycocotools",), "karat detect"),
    "demo": Extra("gradio", ("gradio",), "karat demo"),
    "wandb": Extra("wandb", ("wandb",), "log.trackers=wandb"),
    "mlflow": Extra("mlflow", ("mlflow", "mlflow-skinny"), "log.trackers=mlflow"),
    "trackio": Extra("trackio", ("trackio",), "log.trackers=trackio"),
}


@contextmanager
def trackers_hidden() -> Iterator[None]:
    """Keep these trackers from being imported in the block; separate processes write to them.

    timm tries W&B and DeepSpeed tries MLflow, and neither uses it here. Both together take a third of the startup time.
    """
    hidden = [module for module in ("mlflow", "wandb") if module not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for module in hidden:
            sys.modules.pop(module, None)


def is_installed(module: str) -> bool:
    """True if a module can be found. It is not imported, but its parent packages are."""
    is_hidden = sys.modules.get(module, sys) is None
    try:
        found = PathFinder.find_spec(module) if is_hidden else importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its parent package is missing
        return False
    return found is not None and found.origin is not None  # W&B's folder `wandb` is no package


def how_to_install(*extras: str) -> str:
    """Return the commands that install extras: in a clone, or of an installed wheel."""
    debian, extra = " ".join(EXTRAS[name].debian for name in extras).strip(), ",".join(extras)
    first = f"apt-get install {debian}, then " if debian else ""
    if (Path(__file__).resolve().parents[2] / "pyproject.toml").is_file():
        return f"{first}in the clone: pip install -e '.[{extra}]'"
    return f"{first}pip install 'WHEEL[{extra}]', where WHEEL is the file that karat_scale was installed from"


class Files(Enum):
    """The kind of files at `data.path`. The value says what the path is."""

    IMAGES = "a directory of train/<class>/<image> and val/<class>/<image>"
    SHARDS = "a directory made by karat prepare webdataset"
    BETONS = "a directory made by karat prepare ffcv"


@dataclass(frozen=True)
class BackendRow:
    """A source of batches.

    place: the place of a function that takes an `ImageSpec` and returns a `Backend`. files: the kind of its files; None
    if it generates its images. extra: the key of EXTRAS that it needs. own_decoder: whether `data.decoder = auto` means
    the backend's decoder. own_threads: whether it works on threads of its own, and so needs at least one worker.
    streams: the place of such a function for `data.order = stream`. without_gpu: if it needs a GPU, the backend that
    reads its files for commands without one.
    """

    place: str
    files: Files | None
    extra: str = ""
    own_decoder: bool = False
    own_threads: bool = False
    streams: str = ""
    without_gpu: str = ""


BACKENDS = {
    "folder": BackendRow("karat_scale.data.backends.images:open_folder", Files.IMAGES),
    "webdataset": BackendRow(
        "karat_scale.data.backends.images:open_webdataset",
        Files.SHARDS,
        streams="karat_scale.data.streams:StreamBackend",
    ),
    "ffcv": BackendRow("karat_scale.data.backends.images:open_ffcv", Files.BETONS, "ffcv", own_decoder=True),
    "dali": BackendRow(
        "karat_scale.data.backends.gpu_decoders:open_dali", Files.SHARDS, "dali", own_decoder=True, own_threads=True
    ),
    "nvjpeg": BackendRow(
        "karat_scale.data.backends.gpu_decoders:open_nvjpeg",
        Files.SHARDS,
        own_decoder=True,
        own_threads=True,
        without_gpu="webdataset",
    ),
    "synthetic": BackendRow("karat_scale.data.backends.images:SyntheticBackend", None),
}

# Classes that take (interpolation, max_pixels). `data.decoder = auto` tries them in this order; the last always runs.
DECODERS = {
    "native": "karat_scale.data.decoders.native:NativeDecoder",
    "torchvision": "karat_scale.data.decoders.libraries:TorchvisionDecoder",
    "pillow": "karat_scale.data.decoders.libraries:PillowDecoder",
}


@dataclass(frozen=True)
class BasisRow:
    """A basis of the functions phi.

    keys: the keys of the recipe's section that its constructor takes. is_series: whether it is the Fourier series,
    which has kernels and can be initialised as softmax.
    """

    place: str
    keys: tuple[str, ...] = ()
    is_series: bool = False


BASES = {
    "fourier": BasisRow("karat_scale.attention.bases.fourier:Fourier", ("grid",), is_series=True),
    "bspline": BasisRow("karat_scale.attention.bases.polynomials:BSpline", ("grid", "degree", "range")),
    "chebyshev": BasisRow("karat_scale.attention.bases.polynomials:Chebyshev", ("grid",)),
    "rational": BasisRow("karat_scale.attention.bases.polynomials:Rational", ("orders",)),
    "mexican_hat": BasisRow("karat_scale.attention.bases.wavelets:MexicanHat"),
    "morlet": BasisRow("karat_scale.attention.bases.wavelets:Morlet"),
    "dog": BasisRow("karat_scale.attention.bases.wavelets:DerivativeOfGaussian"),
    "meyer": BasisRow("karat_scale.attention.bases.wavelets:Meyer"),
    "shannon": BasisRow("karat_scale.attention.bases.wavelets:Shannon"),
}


@dataclass(frozen=True)
class AttentionRow:
    """A kind of attention.

    words: its name in words. place: the place of its class, as CONTRIBUTING.md describes one; "" for timm's softmax and
    for KArAt, whose class depends on its form. keys: the keys of the recipe's section that have an effect, besides
    `mode`. gate: each head's initial factor of the term that is added to softmax; None if nothing is added to it.
    by_rows: whether it forms S one tile of query rows at a time, in PyTorch, unless `flex` computes it.
    """

    words: str
    place: str = ""
    keys: tuple[str, ...] = ("softmax_heads",)
    gate: float | None = None
    by_rows: bool = False


_OF_KARAT = (
    *("bound", "form", "basis", "simplex", "gains", "base", "init"),
    *("grid", "degree", "range", "orders", "rank", "modes"),
)
ATTENTIONS = {
    # A recipe of KArAt with attention.kind=softmax is a baseline, so keys that name another model are refused only
    # where softmax alone would be another model too.
    "softmax": AttentionRow("softmax attention", keys=(*_OF_KARAT, "implementation")),
    "karat": AttentionRow(
        "Kolmogorov-Arnold attention",
        keys=(*_OF_KARAT, "implementation", "softmax_heads", "scores", "residual"),
    ),
    "static": AttentionRow("a learned constant matrix as attention", "karat_scale.attention.variants:StaticHeads"),
    "static_softmax": AttentionRow(
        "softmax attention plus a learned constant matrix", "karat_scale.attention.variants:StaticHeads", gate=1.0
    ),
    "scaled_softmax": AttentionRow(
        "softmax attention times a learned gain", "karat_scale.attention.variants:ScaledSoftmax"
    ),
    "softmax_bias": AttentionRow(
        "softmax attention with a learned position bias", "karat_scale.attention.variants:BiasedSoftmax"
    ),
    "sigmoid": AttentionRow("sigmoid attention", "karat_scale.attention.rivals:SigmoidHeads", by_rows=True),
    "polynomial": AttentionRow("polynomial attention", "karat_scale.attention.rivals:PolynomialHeads", by_rows=True),
    "gated": AttentionRow("softmax attention with a gate of each head", "karat_scale.attention.rivals:GatedHeads"),
    "differential": AttentionRow("differential attention", "karat_scale.attention.rivals:DifferentialHeads"),
    "query_only": AttentionRow(
        "learned functions of the query alone as attention",
        "karat_scale.attention.rivals:QueryOnly",
        keys=("softmax_heads", "rank", "grid"),
    ),
    "centred": AttentionRow(
        "Kolmogorov-Arnold attention without the row that all queries share, plus a learned constant matrix",
        "karat_scale.attention.rivals:Centred",
        keys=("softmax_heads", "bound", "rank", "grid", "base", "init", "implementation"),
    ),
}


@dataclass(frozen=True)
class OptimizerRow:
    """An optimizer.

    place: the place of a function (model, optim, device, groups of parameters or None) that returns a torch optimizer.
    states: the names of the fp32 tensors that it keeps for a parameter, each of the parameter's size.
    matrix_states: the same for the matrices of linear layers inside blocks, if it updates them in another way.
    whole_matrices: whether these matrices must be whole, so that only ZeRO stage 0 works.
    on_cpu: the place of DeepSpeed's version for an offloaded step, if there is one; it takes (groups, lr, betas, eps).
    temporaries: the number of tensors of a parameter's size that a step on a CPU holds besides the states.
    matrix_temporaries: the temporary bytes of a step for each element of such a matrix.
    """

    place: str
    states: tuple[str, ...]
    matrix_states: tuple[str, ...] | None = None
    whole_matrices: bool = False
    on_cpu: str = ""
    temporaries: int = 2
    matrix_temporaries: int = 0


OPTIMIZERS = {
    "adamw": OptimizerRow(
        "karat_scale.engine.optimizers:build_adamw",
        states=("exp_avg", "exp_avg_sq"),
        on_cpu="deepspeed.ops.adam:DeepSpeedCPUAdam",
    ),
    # torch's Muon takes one matrix after the other: an update in fp32, and three in bf16 while it is orthogonalised.
    "muon": OptimizerRow(
        "karat_scale.engine.optimizers:build_muon",
        states=("exp_avg", "exp_avg_sq"),
        matrix_states=("momentum_buffer",),
        whole_matrices=True,
        matrix_temporaries=10,
    ),
}


@dataclass(frozen=True)
class FormatRow:
    """A format of `karat export`. place: the place of a function that takes (source, path) and returns a note.

    suffix: the suffix of its file; a folder has none.
    """

    place: str
    suffix: str = ""


HUB = "hub-folder"
EXPORT_FORMATS = {
    "safetensors": FormatRow("karat_scale.commands.export.command:write_safetensors", ".safetensors"),
    "timm": FormatRow("karat_scale.commands.export.command:write_timm_folder"),
    "onnx": FormatRow("karat_scale.commands.export.command:write_onnx", ".onnx"),
    "torch-export": FormatRow("karat_scale.commands.export.command:write_torch_export", ".pt2"),
    HUB: FormatRow("karat_scale.commands.export.command:write_hub_folder"),
}


@dataclass(frozen=True)
class TrackerRow:
    """A tracker, which shows a run elsewhere.

    place: the place of a class that takes a `TrackedRun`; see `karat_scale.engine.tracking.trackers`.
    extra: the key of EXTRAS that it needs.
    """

    place: str
    extra: str = ""


TRACKERS = {
    "tensorboard": TrackerRow("karat_scale.engine.tracking.trackers:TensorBoard"),
    "wandb": TrackerRow("karat_scale.engine.tracking.trackers:WandB", "wandb"),
    "mlflow": TrackerRow("karat_scale.engine.tracking.trackers:MLflow", "mlflow"),
    "trackio": TrackerRow("karat_scale.engine.tracking.trackers:Trackio", "trackio"),
}

# The corruptions of ImageNet-C, by the names that the library imagecorruptions gives them.
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)


VARIABLE = "KARAT_TRUST"


class UntrustedError(UserError):
    """A recipe that may be somebody else's names a class."""


def require_trust(values: Mapping[str, str], source: object) -> None:
    """Refuse the place of a class, unless the environment has KARAT_TRUST=1, which `--trust` sets.

    Args:
        values: the values of keys that may name a class, in a recipe that was not on the command line.
        source: where they were found.

    Raises:
        UntrustedError: a class is named; the message says which, and where.
    """
    for key, value in values.items():
        module = value.partition(":")[0]
        if module != value:
            refuse_untrusted(f"{source}: {key} = {value} runs the code of the module {module}")


def refuse_untrusted(what: str) -> None:
    """Raise UntrustedError with what runs and where it is named, unless the user trusts it."""
    if os.environ.get(VARIABLE) != "1":
        raise UntrustedError(f"{what}; if you trust it, add --trust or set {VARIABLE}=1")
