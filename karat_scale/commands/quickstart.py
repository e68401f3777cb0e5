"""`karat quickstart`: train KArAt, softmax and a control on a part of Fashion-MNIST, and show what they learned.

Each part is a command that a user could type. A finished part is skipped, and a run that was stopped resumes.
"""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from karat_scale.foundation.console import print_table
from karat_scale.foundation.errors import EXIT_INTERRUPTED, EXIT_STOPPED
from karat_scale.foundation.files import read_object
from karat_scale.foundation.tables import EXTRAS, is_installed

# Relative to the current directory, so that printed commands can be typed.
RAW, SHARDS = Path("data/fashion_mnist_raw"), Path("data/fashion_mnist_quick")
RECIPE = "fashion_mnist_demo"
REPORT = Path("runs/quickstart_report")
IMAGES_OF_A_CLASS = 1500
# With a quarter of the images, only smaller batches give enough steps to learn something.
FEWER_IMAGES = (f"data.path={SHARDS}", "train.global_batch=64")
# (row title, run directory, overrides)
CONTENDERS = (
    ("KArAt G3B", Path("runs/quickstart_karat"), ()),
    ("softmax", Path("runs/quickstart_softmax"), ("attention.kind=softmax",)),
    ("control: a learned constant matrix", Path("runs/quickstart_control"), ("attention.kind=static",)),
)


def quickstart() -> int:
    """Run all parts; returns the first failing command's exit code, or 0."""
    console = Console()
    runs = [str(run) for _, run, _ in CONTENDERS]
    console.print("three runs and a report: about five minutes on two cores")
    try:
        if not _is_prepared():
            _run("prepare", "fetch", "fashion_mnist", "--out", str(RAW))
            subset = ("--subset", str(IMAGES_OF_A_CLASS))
            _run("prepare", "webdataset", "--src", str(RAW), "--out", str(SHARDS), *subset)
        for number, (title, run, overrides) in enumerate(CONTENDERS, 1):
            if read_object(run / "summary.json").get("exit") == 0:
                console.print(f"{title}: finished before, in {run}")
                continue
            console.rule(f"run {number} of {len(CONTENDERS)}: {title}")
            _run("train", RECIPE, f"run.dir={run}", f"run.name={run.name}", *FEWER_IMAGES, *overrides)
        report = REPORT / "report.html"
        ended = max((run / "summary.json").stat().st_mtime for _, run, _ in CONTENDERS)
        if not report.is_file() or report.stat().st_mtime < ended:
            console.rule("what they learned")
            _run("analyze", *runs, "--only", "training", "content", "maps", "functions", "--out", str(REPORT))
    except subprocess.CalledProcessError as error:
        code = error.returncode if error.returncode >= 0 else 128 - error.returncode  # as a shell gives a signal's
        if code in (EXIT_STOPPED, EXIT_INTERRUPTED, 128 + signal.SIGTERM):
            console.print("stopped; run `karat quickstart` again to go on")
        elif error.returncode < 0:
            console.print(f"ended by {signal.Signals(-error.returncode).name}; run `karat quickstart` again to go on")
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    _print_results(console)
    return 0


def _is_prepared() -> bool:
    """Return whether both splits are there: an earlier command may have been stopped between them."""
    from karat_scale.data.shards.shard_format import DATASET_FILE, read_dataset_record

    return (SHARDS / DATASET_FILE).is_file() and {"train", "val"} <= read_dataset_record(SHARDS).splits.keys()


def _run(*arguments: str) -> None:
    print(f"$ karat {shlex.join(arguments)}", flush=True)
    process: subprocess.Popen[bytes] | None = None
    is_told = False

    def end(*_: object) -> None:
        nonlocal is_told
        is_told = True
        if process is not None:
            process.terminate()

    # Without this, the process would go on training. A terminal also sends Ctrl-C to it, and it then saves.
    handlers = {signal.SIGTERM: end, signal.SIGINT: lambda *_: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    process = subprocess.Popen([sys.executable, "-m", "karat_scale", *arguments])
    if is_told:
        process.terminate()
    process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)


def _print_results(console: Console) -> None:
    rows = []
    for attention, run, _ in CONTENDERS:
        summary = read_object(run / "summary.json")
        scores = [f"{summary[score]:.2f}" for score in ("last_top1", "last_top5")]
        size = [f"{summary['peak_memory_mb']:.0f}", f"{summary['parameters'] / 1e6:.2f} M"]
        rows.append([attention, *scores, *size])
    title = "Fashion-MNIST: 15,000 training images once, 10,000 test images"
    # Narrow enough for a terminal of 80 columns.
    print_table(title, ("attention", "top-1 %", "top-5 %", "peak MB", "params"), rows)
    run = CONTENDERS[0][1]
    page = f", or karat demo {run} for a page" if is_installed(EXTRAS["demo"].module) else ""
    hints = {
        "see what they learned": f"open {REPORT}/report.html in a browser",
        "classify a picture": f"karat predict {run} PICTURE{page}",
        "train longer": f"karat train {RECIPE} data.path={SHARDS} train.epochs=5 run.dir=runs/longer",
        "evaluate again": f"karat eval {run}",
        "other models": "karat recipes",
    }
    for what, how in hints.items():
        console.print(f"{what + ':':24}{how}", highlight=False, soft_wrap=True)
