"""`make demo` answers Ctrl-C as training does: it waits for the checkpoint."""

import os
import signal
import subprocess
import sys

from tests.conftest import ROOT

SAVES = """
import signal, sys, time
def save(*_):
    time.sleep(1)  # longer than Python's own subprocess.run would wait
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGINT, save)
print("trains", flush=True)
time.sleep(60)
"""
DEMO = """
import subprocess, sys
from examples import demo
try:
    demo._run("-c", sys.argv[1])
except subprocess.CalledProcessError as error:
    print(error.returncode)
"""


def test_ctrl_c_waits_until_the_run_has_saved() -> None:
    command = [sys.executable, "-c", DEMO, SAVES]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "trains\n"
        os.killpg(shell.pid, signal.SIGINT)  # as a terminal does
        assert shell.stdout.read() == "saved\n75\n"
