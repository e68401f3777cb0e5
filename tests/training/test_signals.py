import os
import signal
import subprocess
import sys

import pytest

from karat_scale.training.agreement import STOP_SIGNALS

WAIT = """
import signal, sys, time
from karat_scale.training.agreement import StopSignals
signals = StopSignals().install()
print("ready", flush=True)
while True:
    time.sleep(0.01)
    if signals.received:
        print(signals.received.name, flush=True)
        time.sleep(30)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda s: s.name)
def test_a_signal_is_remembered_and_a_second_ctrl_c_quits_at_once(number) -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", WAIT], stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    if number == signal.SIGINT:
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline() == "stopping: the state is saved first; Ctrl-C again quits at once\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 1
    else:
        assert process.poll() is None
        process.kill()
        process.wait()


COMPILE = """
import os, signal, subprocess, sys
from karat_scale.training.agreement import StopSignals
signals = StopSignals().install()
compiler = subprocess.Popen([sys.executable, "-c", "import sys; print('at work', flush=True); sys.stdin.read()"])
print("ready", flush=True)
code = compiler.wait()
print(code, signals.received.name, flush=True)
"""


def test_usr2_to_the_group_is_remembered_and_spares_a_compiler() -> None:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILE], stdin=pipe, stdout=pipe, text=True, start_new_session=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert {process.stdout.readline(), process.stdout.readline()} == {"ready\n", "at work\n"}
    os.killpg(process.pid, signal.SIGUSR2)
    process.stdin.close()  # the compiler has nothing more to do
    assert process.stdout.readline() == "0 SIGUSR2\n"
    assert process.wait(timeout=5) == 0
