"""The command line `karat`. Commands import what they need when they run, so `--help` is quick."""

import argparse
import atexit
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import karat_scale.foundation.machine  # noqa: F401  # it looks for its parent now, before torch is imported
from karat_scale import __version__
from karat_scale.commands.launch import code_for_launcher, say_to_launcher
from karat_scale.commands.parsers import preparing, training
from karat_scale.foundation import errors
from karat_scale.foundation.arguments import OneLineParser, add_trust
from karat_scale.foundation.machine import may_have_gpu, use_local_caches
from karat_scale.foundation.tables import VARIABLE, trackers_hidden

EXIT_USAGE = 2
# The exit code by which a shell reports SIGPIPE: in `karat recipes | head`, `head` has read enough.
_STDOUT, _EXIT_UNREAD = 1, 128 + signal.SIGPIPE
# The commands by what a user wants, in the order in which a user needs them.
GROUPS = {
    "start here": ("quickstart", "doctor", "recipes", "explain", "completion"),
    "data sets": ("prepare", "index", "data", "show"),
    "train a model": ("plan", "train", "launch", "convert", "detect", "sweep"),
    "look at runs": ("status", "eval", "analyze", "compare"),
    "use a trained model": ("predict", "demo", "export"),
    "on a cluster": ("submit", "fetch", "track"),
    "check training": ("replay", "verify", "bench"),
}
# The commands whose work the ranks of `karat launch` share. Of another, each rank would do all.
SHARED = ("train", "convert", "detect", "eval", "analyze", "doctor", "replay", "verify")
# The commands that may read files that others wrote.
TRUSTING = {
    *("plan", "doctor", "train", "convert", "eval", "replay", "verify", "detect", "submit", "sweep"),
    *("analyze", "track", "export", "predict", "demo"),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands and their options."""
    parser = OneLineParser(
        prog="karat",
        description="Train vision transformers with Kolmogorov-Arnold Attention (KArAt), and analyse and use them.",
        epilog="Begin with `karat quickstart`. `karat doctor` says what this machine lacks.",
    )
    parser.add_argument("--version", action="version", version=f"karat_scale {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    preparing.add_commands(commands)
    training.add_commands(commands)
    # argparse lists all commands in one group. Here each group is a section of the help.
    lines = {line.dest: line for line in commands._choices_actions}
    for title, names in GROUPS.items():
        parser.add_argument_group(title)._group_actions += [lines[name] for name in names]
    for name, line in lines.items():  # a command's own help shows its line, too
        own, said = commands.choices[name], str(line.help)
        own.description = own.description or f"{said[0].upper()}{said[1:]}."
        if name in TRUSTING:
            add_trust(own)
    parser._positionals._group_actions.clear()
    parser._action_groups.sort(key=lambda group: group is parser._optionals)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. A user's mistake is one line on standard error, and exit code 2."""
    for closed in [name for name in ("stdout", "stderr") if getattr(sys, name) is None]:  # as by `karat ... >&-`
        setattr(sys, closed, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # set by the lines of `karat completion`
        from karat_scale.commands.completion import complete

        complete(parser)
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    if not words:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    if words[0] == "help":  # `karat help train`, as with git
        words = [*words[1:], "--help"]
    options = parser.parse_args(words)
    if options.command == "launch":  # a mistake is reported once, not by each rank
        if "--ranks" in options.arguments and options.arguments[0] not in ("sweep", "bench"):
            parser.error("--ranks comes before the command: karat launch --ranks N COMMAND ...")
        options.parsed = parser.parse_args(options.arguments)
        if (name := options.parsed.command) not in SHARED:
            fix = "sweep --ranks N" if name == "sweep" else f"{name} without launch"
            parser.error(f"launch {name}: ranks share the work of {', '.join(SHARED)} only; use karat {fix}")
    # When a rank is lost, torch's C++ prints a stack trace. We report the loss in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not may_have_gpu():  # without this, DeepSpeed warns that it guessed the CPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if getattr(options, "trust", False):
        os.environ[VARIABLE] = "1"
    try:
        use_local_caches()
        with trackers_hidden():
            code: int = options.run(options)
        sys.stdout.flush()
        return code
    except errors.UserError as error:
        return _end(EXIT_USAGE, *(error.mistakes if isinstance(error, errors.RecipeError) else [str(error)]))
    except errors.PeerError as error:
        return _end(errors.EXIT_LOST_PEER, str(error))
    except KeyboardInterrupt:  # before training has begun, or in a command that does not wait for it
        return _end(errors.EXIT_INTERRUPTED, errors.INTERRUPTED)
    except BrokenPipeError:
        poll = select.poll()
        poll.register(_STDOUT, 0)
        if not any(event & select.POLLERR for _, event in poll.poll(0)):  # the pipe still has a reader
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # for what is still in Python's buffer
        return _EXIT_UNREAD
    except Exception as error:
        known = errors.of_the_machine(error)
        if known is None:
            say_to_launcher(errors.on_one_line(f"{type(error).__name__}: {errors.one_line(error)}"))
            raise
        line, code = known
        return _end(code, line)


def _end(code: int, *reasons: str) -> int:
    """Report why this rank ends, one line for each reason; returns the exit code."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    where = f"[rank {rank}] " if rank != "0" else ""
    text = f"\n{where}error: ".join(map(errors.on_one_line, reasons))
    if not say_to_launcher(text):
        errors.say_in_one_write(f"{where}error: {text}")
    return code


def entry_point() -> None:
    """Run the console script."""
    try:
        code = code_for_launcher(main())
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    # A launcher may repeat its signal, which must not kill an interpreter that is exiting with its own code.
    for repeated in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(repeated, signal.SIG_IGN)
    # Exit as Python does, but without its last garbage collection of torch's and DeepSpeed's objects. It takes two
    # seconds, for which the other ranks and the next start would wait.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
