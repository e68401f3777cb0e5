"""The doctor's report: findings, the stage that limits training, and the first thing to change.

It is tables on a terminal, plain lines elsewhere, and JSON. This module needs no library.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from karat_scale import __version__
from karat_scale.foundation.console import make_table, plural, print_titled, printable, terminal, write_json
from karat_scale.foundation.errors import DataError, UserError
from karat_scale.foundation.native_build import PACKAGES

if TYPE_CHECKING:
    from karat_scale.recipe import Recipe

Level = Literal["ok", "note", "problem"]
COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    level: "ok", "note" (works, but worth knowing) or "problem" (training fails or goes wrong). fix: how to fix
    it. figures: the same as numbers, for the JSON file.
    """

    name: str
    level: Level
    value: str
    fix: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"name": self.name, "level": self.level, "value": self.value, "fix": self.fix, **self.figures}


def found(name: str, value: str, fix: str = "", *, wrong: bool = False, **figures: Any) -> Finding:
    """Return a finding with its level: a problem if `wrong`, else a note if there is something to fix."""
    return Finding(name, "problem" if wrong else "note" if fix else "ok", value, fix, figures)


def examine(name: str, examination: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Return the findings, or a problem if the check fails: a broken library must not stop the doctor.

    A wrong recipe is the caller's mistake, so its error is raised.
    """
    try:
        return list(examination())
    except DataError as error:
        return [Finding(name, "problem", str(error))]
    except UserError:
        raise
    except Exception as error:  # any error of a broken library or driver
        reason = " ".join(str(error).split()) or "no reason given"
        return [Finding(name, "problem", f"cannot be examined: {type(error).__name__}: {reason}")]


class Report:
    """Collects the findings, prints each at once on rank 0, and knows the exit code."""

    def __init__(self, is_main: bool) -> None:
        self.is_main, self._console = is_main, terminal() if is_main else None
        self.figures: dict[str, Any] = {}
        self._sections: dict[str, list[Finding]] = {}

    def add(self, key: str, title: str, findings: list[Finding]) -> None:
        """Add and print the findings of one part: a table on a terminal, else a line per finding."""
        self._sections.setdefault(key, []).extend(findings)
        if self._console is None:
            self.line(f"\n{title}")
            for finding in findings:
                fix = f" -> {finding.fix}" if finding.fix else ""
                self.line(f"  {finding.level:<8} {finding.name}: {finding.value}{fix}")
            return
        from rich.text import Text

        table = make_table(("", "", ""), texts=(0, 1, 2))
        table.show_header = False
        for finding in findings:
            said = Text(printable(finding.value))
            if finding.fix:
                said.append(f"\n{printable(finding.fix)}", style="dim")
            table.add_row(Text(finding.level, style=COLOURS[finding.level]), Text(finding.name), said)
        print_titled(self._console, title, table)

    def line(self, text: str) -> None:
        """Print a line."""
        if self.is_main:
            print(text, flush=True)

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """Show the current work until it is done: a spinner on a terminal, else a line."""
        if self._console is not None:
            return self._console.status(text)
        self.line(f"  {text} ...")
        return nullcontext()

    def conclude(self, json_file: str | None) -> int:
        """Print the last line, and write everything as JSON; returns the exit code: 1 with a problem, else 0."""
        levels = [(finding.level, finding.name) for section in self._sections.values() for finding in section]
        problems = [name for level, name in levels if level == "problem"]
        names = f" ({', '.join(problems)})" if problems else ""
        notes = sum(level == "note" for level, _ in levels)
        self.line(f"\n{plural(len(problems), 'problem')}{names}, {plural(notes, 'note')}")
        code = int(bool(problems))
        if self.is_main:
            sections = {key: [finding.to_json() for finding in section] for key, section in self._sections.items()}
            about = {"version": __version__, "exit": code, "problems": problems}
            write_json(json_file, {**about, **sections, **self.figures})
        return code


Stage = Literal["storage", "decode", "augmentation", "transfer", "model", "optimizer", "communication"]
DATA_STAGES: tuple[Stage, ...] = ("storage", "decode", "augmentation")
DEVICE_STAGES: tuple[Stage, ...] = ("transfer", "model", "optimizer", "communication")
# A data path that is faster than the device by this factor feeds it in spite of uneven batches.
HEADROOM = 1.1
# Without workers: if data takes this share of the time, add a worker.
WORTH_A_WORKER = 0.15


@dataclass(frozen=True)
class Setting:
    """The settings on which the advice depends.

    workers: the number of workers that make the images, 0 for generated images. worker_rate: images a second of one
    worker process on a core of its own. cores: the number of cores that one rank may use. has_bf16: whether the device
    computes in bf16. stays_cached: whether all data stays in the page cache after the first epoch.
    """

    recipe: "Recipe"
    workers: int
    worker_rate: float
    cores: int
    world_size: int
    decoder: str
    device: str
    has_bf16: bool
    accumulation: int
    stays_cached: bool

    @property
    def is_generated(self) -> bool:
        """True if there are no files of images."""
        return self.recipe.data.row.files is None


@dataclass(frozen=True)
class Verdict:
    """The stage `bound` that training waits for, and the images per second of its two sides, data and device."""

    bound: Stage
    data_rate: float
    device_rate: float
    reason: str
    advice: str


def judge(rates: Mapping[Stage, float], setting: Setting) -> Verdict:
    """Find the stage that limits training, from the images per second of each stage by itself, over all ranks.

    Reading runs at the same time as decoding and, if there are workers, as the device. A worker decodes and augments in
    turn, and the device's stages run in turn. Without workers, all of them run in turn.
    """
    cost = {stage: 1 / rate for stage, rate in rates.items() if rate > 0}
    # Data that stays in the page cache is read from the disk only in the first epoch.
    storage = 0.0 if setting.stays_cached else cost.get("storage", 0.0)
    workers = cost.get("decode", 0.0) + cost.get("augmentation", 0.0)
    device = sum(cost.get(stage, 0.0) for stage in DEVICE_STAGES)
    data = max(storage, workers) if setting.workers else storage + workers
    data_rate, device_rate = (1 / seconds if seconds else math.inf for seconds in (data, device))
    if setting.workers == 0:
        candidates: tuple[Stage, ...] = (*DATA_STAGES, *DEVICE_STAGES)
    elif data <= device:
        candidates = DEVICE_STAGES
    else:
        candidates = ("storage",) if storage >= workers else ("decode", "augmentation")
    bound = max(candidates, key=lambda stage: {**cost, "storage": storage}.get(stage, 0.0))
    reason = _reason(bound, data_rate, device_rate, setting)
    advice = _advice(bound, device_rate, setting)
    turns = setting.workers == 0 and not setting.is_generated
    if turns and bound in DEVICE_STAGES and data > WORTH_A_WORKER * (data + device):
        advice = f"{_more_workers(device_rate, setting)}, so that they no longer take turns; then {advice}"
    return Verdict(bound, data_rate, device_rate, reason, advice)


def _reason(bound: Stage, data_rate: float, device_rate: float, setting: Setting) -> str:
    trainer = f"the trainer takes {device_rate:,.0f} img/s"
    if setting.is_generated:
        return f"{trainer}, images are made at {data_rate:,.0f} img/s in the same process"
    if setting.workers == 0:
        return f"data.workers = 0, so {data_rate:,.0f} img/s of data and {device_rate:,.0f} of the trainer take turns"
    if bound == "storage":
        return f"the disk gives {data_rate:,.0f} img/s, {trainer}"
    if bound in DATA_STAGES:
        each = " on each rank" if setting.world_size > 1 else ""
        verb = "sustains" if setting.workers == 1 else "sustain"
        return f"{plural(setting.workers, 'worker')}{each} {verb} {data_rate:,.0f} img/s, {trainer}"
    return f"{trainer}, the data path gives {data_rate:,.0f}"


def _advice(bound: Stage, device_rate: float, setting: Setting) -> str:
    if bound == "storage":
        block = "" if setting.recipe.data.order == "block" else "set data.order=block to read in sequence, or "
        return f"copy the data to a local disk, or {block}make smaller files (karat prepare webdataset --resize 256)"
    if setting.is_generated and bound in DATA_STAGES:
        return "synthetic images are only for measuring the other stages"
    if bound in DATA_STAGES:
        pieces = [_more_workers(device_rate, setting)]
        if bound == "decode" and setting.decoder not in ("native", ""):
            pieces.append(f"use data.decoder=native (apt-get install {PACKAGES})")
        if bound == "decode":
            pieces.append("re-encode the images smaller (karat prepare webdataset --resize 256)")
        else:
            pieces.append("use a weaker augment.randaugment or augment.color_jitter")
        return ", or ".join(filter(None, pieces))
    if bound == "model":
        return _advise_model(setting)
    if bound == "transfer" and setting.device == "cpu":
        return "on a CPU this is normalising and mixing: use a smaller model.image_size, or augment.mix_prob=0"
    if bound == "transfer":
        return "check whether another process uses the bus (nvidia-smi dmon -s t)"
    if bound == "optimizer":
        return (
            f"a step runs once per global batch of {setting.recipe.train.global_batch}: raise train.global_batch, "
            "or share the step between ranks with deepspeed.config=zero1"
        )
    return (
        "gradients are exchanged once per global batch: raise train.global_batch, and check by NCCL_DEBUG=INFO that "
        "NCCL uses the fast network"
    )


def _more_workers(device_rate: float, setting: Setting) -> str:
    """Advise as many workers as feed the device, up to the cores; empty if there are as many already."""
    wanted = math.ceil(HEADROOM * device_rate / setting.world_size / setting.worker_rate)
    spare = setting.cores - 1 if setting.device == "cuda" else setting.cores
    reachable = min(wanted, max(1, spare))
    if reachable <= setting.workers:
        return ""
    enough = "" if reachable == wanted else f" (all cores; {wanted} would be needed)"
    return f"raise data.workers to {reachable}{enough}"


def _advise_model(setting: Setting) -> str:
    pieces = []
    if setting.recipe.attention.implementation != "auto":
        pieces.append(f"set attention.implementation=auto instead of {setting.recipe.attention.implementation}")
    if setting.device == "cpu" and setting.recipe.train.precision.startswith("bf16") and not setting.has_bf16:
        return (
            "set train.precision=fp32: bf16 is several times slower on this processor, which has no bf16 instructions"
        )
    if setting.device == "cpu":
        pieces.append("train on a GPU; on a CPU, only a smaller model or image helps")
    else:
        if setting.recipe.train.precision == "fp32" and setting.has_bf16:
            pieces.append("set train.precision=bf16")
        if setting.accumulation > 1:
            pieces.append("raise train.micro_batch as far as memory allows")
        pieces.append(f"add GPUs, over which the global batch of {setting.recipe.train.global_batch} is divided")
    return ", or ".join(pieces)
