"""Run a script, and kill its process group when it prints the line of a step: killed.py STEP SCRIPT ARGUMENT..."""

import builtins
import os
import runpy
import signal
import sys
from typing import Any


def main() -> None:
    """Run the script in this process."""
    last, sys.argv = f"step {sys.argv[1]} ", sys.argv[2:]
    say = print

    def watched(*words: Any, **options: Any) -> None:
        say(*words, **options)
        if str(words[0]).startswith(last):
            os.killpg(0, signal.SIGKILL)

    builtins.print = watched
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
