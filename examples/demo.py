"""`make demo`: download Fashion-MNIST, train with KArAt and with softmax, and compare them, on any machine.

Each part is a command that a user could type. A finished part is skipped, and a run that was stopped resumes.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
# Relative to ROOT, where everything runs, so that printed commands can be typed.
DATA = Path("data")
RUNS = Path("runs")
RECIPE = "fashion_mnist_demo"
# (row title, run directory, overrides)
CONTENDERS = (
    ("KArAt G3B", RUNS / "demo_karat", ()),
    ("softmax", RUNS / "demo_softmax", ("attention.kind=softmax",)),
)


def main() -> int:
    """Run the demo; returns the first failing command's exit code, or 0."""
    os.chdir(ROOT)
    console = Console()
    raw, shards = DATA / "fashion_mnist_raw", DATA / "fashion_mnist"
    try:
        if not (shards / "dataset.json").is_file():
            _run("data_prep/fetch.py", "fashion_mnist", "--out", str(raw))
            _run("data_prep/make_webdataset.py", "--src", str(raw), "--out", str(shards))
        for title, run, overrides in CONTENDERS:
            if (_summary(run) or {}).get("exit") == 0:
                console.print(f"{title}: finished before, in {run}")
                continue
            console.rule(title)
            arguments = [f"run.dir={run}", f"run.name={run.name}", f"data.path={shards}", *overrides]
            _run("-m", "karat_scale", "train", RECIPE, *arguments)
            _print_result(console, title, run)
    except subprocess.CalledProcessError as error:
        if error.returncode == 75:
            console.print("stopped; run `make demo` again to resume")
        return error.returncode
    except KeyboardInterrupt:
        return 130
    _print_table(console)
    return 0


def _run(*arguments: str) -> None:
    with subprocess.Popen([sys.executable, *arguments]) as process:
        while process.poll() is None:
            with contextlib.suppress(KeyboardInterrupt):  # the terminal sends it to the process, too, which then saves
                process.wait()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)


def _summary(run: Path) -> dict[str, Any] | None:
    path = run / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _print_result(console: Console, title: str, run: Path) -> None:
    summary = _summary(run) or {}
    console.print(
        f"{title}: {summary['last_top1']:.2f} % top-1 at {summary['images_per_second']:.0f} images a second, in {run}"
    )


def _print_table(console: Console) -> None:
    # Narrow enough for a terminal of 80 columns.
    title = "Fashion-MNIST, 10,000 test images, one epoch"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("attention", "top-1 %", "top-5 %", "images/s", "peak MB", "params", "run"):
        table.add_column(column, justify="left" if column in ("attention", "run") else "right")
    for title, run, _ in CONTENDERS:
        summary = _summary(run) or {}
        table.add_row(
            title,
            f"{summary['last_top1']:.2f}",
            f"{summary['last_top5']:.2f}",
            f"{summary['images_per_second']:.0f}",
            f"{summary['peak_memory_mb']:.0f}",
            f"{summary['parameters'] / 1e6:.2f} M",
            str(run),
        )
    console.print(table)
    done = CONTENDERS[0][1]
    console.print("A learned constant matrix leads softmax this early too: docs/what-karat-learns.md", highlight=False)
    hints = {
        "evaluate again": f".venv/bin/karat eval {done}",
        "train longer": f".venv/bin/karat train {RECIPE} run.dir=runs/longer train.epochs=3",
        "figures by step": f"{done}/metrics.jsonl, or .venv/bin/tensorboard --logdir runs",
        "stopped half-way": "run `make demo` again; it resumes from the last checkpoint",
    }
    for what, how in hints.items():
        console.print(f"{what + ':':18}{how}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
