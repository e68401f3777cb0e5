import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

from karat_scale.foundation.console import (
    ProgressBars,
    duration,
    gigabytes,
    plural,
    print_table,
    printable,
    progress,
    terminal,
    work_display,
    write_json,
)
from tests.conftest import forked

DURATIONS = {
    **{0: "0 s", 0.0123: "12.3 ms", 0.9996: "1 s", 4.5: "4.5 s", 59.4: "59.4 s", 59.9: "1 min", 125: "2 min 5 s"},
    **{3600: "1 h", 90_000: "1 d 1 h", 93_661: "1 d 2 h"},
}


def test_units() -> None:
    assert {seconds: duration(seconds) for seconds in DURATIONS} == DURATIONS
    assert (gigabytes(1.5e9), gigabytes(1.234e7), gigabytes(9e6)) == ("1.50 GB", "0.01 GB", "9.00 MB")
    assert (plural(1, "core"), plural(0, "core"), plural(2, "core")) == ("1 core", "0 cores", "2 cores")
    assert (plural(1, "class"), plural(1000, "class")) == ("1 class", "1,000 classes")


def test_a_table_in_a_file_is_aligned_lines_and_progress_a_last_line(capsys):
    print_table(
        "speed", ("stage", "img/s", "what"), [("decode", "12", "[on] one core"), ("model", "1,234", "")], (0, 2)
    )
    assert capsys.readouterr().out == (
        "\nspeed\n  stage   img/s  what\n  decode     12  [on] one core\n  model   1,234\n"
    )
    with progress("copying", 3, "files") as advance:
        advance(1)
        advance(2)
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.startswith("copying: 3 of 3 files, ")
    assert shown.out.endswith(" a second, 0 s left\n")
    assert shown.out.count("\n") == 1


def test_slow_progress_has_a_rate_above_0_and_no_line_twice(capsys, monkeypatch) -> None:
    seconds = itertools.count(0, 20)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    with progress("training again", 2, "steps") as advance:
        advance(1)
        advance(1)
    first, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"training again: 1 of 2 steps, 0\.0\d+ a second, \d+ s left", first)
    assert re.fullmatch(r"training again: 2 of 2 steps, 0\.0\d+ a second, 0 s left", last)


def test_progress_counts_what_several_threads_do_at_a_time(capsys, monkeypatch) -> None:
    clock = time.monotonic
    with progress("copying", 2, "files") as advance:
        other = threading.Thread(target=advance, args=(1,))

        def interrupted() -> float:
            if other.ident is None:  # the other thread has its turn while this one asks for the time
                other.start()
                other.join()
            return clock()

        monkeypatch.setattr(time, "monotonic", interrupted)
        advance(1)
    assert capsys.readouterr().out.startswith("copying: 2 of 2 files, ")


def test_a_terminal_gets_tables_and_bars(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    print_table("speed", ("stage", "img/s"), [("[decode]", "12")])
    assert "[decode]" in capsys.readouterr().out
    with progress("copying", 3, "files") as advance:
        advance(3)
    with work_display() as show:
        show("maps", 1, 2)
        show("spectrum", 0, 5)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert all(part in shown.err for part in ("copying", "3/3", "files/s", "spectrum", "0/5"))


CLOSED = """
import os, pty
screen, terminal = pty.openpty()
for number in (0, 1, 2):
    os.dup2(terminal, number)
os.close(terminal)
from karat_scale.foundation import console
bars = console.ProgressBars(console.terminal())
bars.move("run", 1, 2)
os.close(screen)
for step in range(3):
    bars.line("saved")
    bars.move("run", step, 4)
    print("said")
bars.stop()
print("said")
os.write(int(os.environ["SEEN"]), b"went on")
"""


def test_work_goes_on_where_its_terminal_was_closed() -> None:
    reader, writer = os.pipe()
    environment = {**os.environ, "SEEN": str(writer), "TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", CLOSED], env=environment, pass_fds=[writer], check=False)
    os.close(writer)
    assert (done.returncode, os.read(reader, 100)) == (0, b"went on")
    os.close(reader)


def test_a_process_that_is_forked_while_the_bars_are_drawn_can_warn(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    bars = ProgressBars(terminal(stderr=True))
    held, done = threading.Event(), threading.Event()

    def draw() -> None:
        with bars._progress.live._lock:
            held.set()
            done.wait()

    drawing = threading.Thread(target=draw)
    drawing.start()
    held.wait()
    # The alarm only ends what would hang.
    child = forked(lambda: (signal.alarm(60), print("corrupt EXIF data", file=sys.stderr)))
    done.set()
    assert os.waitpid(child, 0)[1] == 0
    drawing.join()
    bars.stop()


def test_text_of_others_is_neither_markup_nor_a_command_to_the_terminal(capsys, monkeypatch) -> None:
    assert printable("a\x1b[2J\x07b\u2028\tc\nd") == "a\\x1b[2J\\x07b\\u2028\tc\nd"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    hostile = "[link=file:///etc/passwd]x[/nothing]\x1b]0;title\x07"
    print_table(hostile, (hostile,), [(hostile,)])
    with work_display() as show:
        show(hostile, 1, 2)
    shown = "".join(capsys.readouterr())
    assert shown.count("[link=file:///etc/passwd]x[/nothing]") >= 3
    assert "\x1b]" not in shown
    assert "\x07" not in shown


def test_each_piece_of_work_is_one_line_in_a_file_and_long_work_says_what_is_left(capsys, monkeypatch) -> None:
    with work_display() as show:
        for what, done in (("maps", 0), ("maps", 1), ("spectrum", 0), ("maps", 0)):
            show(what, done, 2)
    assert capsys.readouterr().err == "maps ...\nspectrum ...\n"
    monkeypatch.setattr("karat_scale.foundation.console.PLAIN_LINE_SECONDS", 0.0)
    with work_display() as show:
        for done in range(5):
            show("count", done, 8)
    *first, last = capsys.readouterr().err.splitlines()
    assert first[:4] == ["count ...", "count: 0 of 8", "count: 1 of 8", "count: 2 of 8"]  # too early to say
    assert re.fullmatch(r"count: 4 of 8, [\d.,e+]+ a second, about .+ left", last)
    with work_display("all") as show:
        for what, done in (("maps", 1), ("maps", 20), ("spectrum", 50)):
            show(what, done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:4] == ["maps ...", "maps: 1 % of all", "maps: 20 % of all", "spectrum ..."]
    assert re.fullmatch(r"spectrum: 50 % of all, about .+ left", lines[4])


def test_the_time_left_of_all_work_stays_on_a_narrow_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with work_display("all") as show:
        show("softmax: predict the validation split", 50, 100)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err).split("\n")
    assert re.search(r"all .+ 50/100 %, softmax: predict the validation split \S+ left", lines[0]), lines


def test_json_is_written_only_where_a_file_is_named(tmp_path) -> None:
    write_json(None, {"a": 1})
    write_json(tmp_path / "figures.json", {"a": [1, None]})
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]
    assert json.loads((tmp_path / "figures.json").read_text()) == {"a": [1, None]}
