import signal
import subprocess
import sys

import pytest

from karat_scale.train.signals import STOP_SIGNALS

WAIT = """
import signal, sys, time
from karat_scale.train.signals import StopSignals
signals = StopSignals().install()
print("ready", flush=True)
while True:
    time.sleep(0.01)
    if signals.received:
        print(signals.received.name, flush=True)
        time.sleep(30)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda s: s.name)
def test_a_signal_is_remembered_and_a_second_ctrl_c_quits_at_once(number: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == f"{number.name}\n"
    if number == signal.SIGINT:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 1
    else:
        assert process.poll() is None
        process.kill()
        process.wait()
