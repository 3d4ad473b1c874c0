"""Whatever asks a process to end, nothing half done stays, and the exit code names the signal."""

import io
import os
import signal
import subprocess
import sys

import pytest

from pgolf.cli import main
from pgolf.data import prepare
from pgolf.progress import print_anything
from pgolf.stop import SIGNALS, Stopped, stoppable
from pgolf.training import interrupt as module
from pgolf.training.interrupt import Interrupt, Interrupted


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGINT])
def test_a_step_is_finished_whatever_asks_for_the_end(number):
    before = signal.getsignal(number)
    with Interrupt("runs/a", "demo") as interrupt:
        assert not interrupt.number
        send(number)
        assert interrupt.number == number
    assert signal.getsignal(number) == before
    error = interrupt.error(7, interrupt.number, True)
    assert error.exit_code == 128 + number
    assert "step 7" in str(error) and "`pgolf train demo out=runs/a resume=true`" in str(error)
    copied = Interrupted.__reduce__(error)  # as ranks send it
    assert copied[0](*copied[1]).exit_code == error.exit_code


DEADLOCK = """
import ctypes, os, signal, threading
from pgolf.training import interrupt
interrupt.GRACE = 0.2
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
signal.signal(signal.SIGALRM, lambda *_: None)
with interrupt.Interrupt("runs/a", "demo"):
    signal.raise_signal(signal.SIGALRM)  # another one does not end the watch
    # long after the lock below: a signal before it would be noticed
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # no handler of Python's runs in here
"""


def test_a_process_that_cannot_notice_is_ended():
    done = subprocess.run(
        [sys.executable, "-c", DEADLOCK], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "pgolf: SIGTERM: ended in the middle of a step\n"


def test_an_orphan_of_torchrun_is_asked_to_stop(monkeypatch):
    with Interrupt("runs/a", "demo") as interrupt:
        monkeypatch.setattr(module, "PARENT", os.getppid() + 1)
        assert not interrupt.number  # nohup and the like: nobody else started it
        monkeypatch.setattr(module, "ORPHANS_END", True)
        assert interrupt.number == signal.SIGTERM


def test_what_is_ignored_stays_ignored(monkeypatch):
    """nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt("a", "demo") as interrupt, stoppable():
            send(signal.SIGHUP)
        assert not interrupt.number
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_does_not_end_the_tidying_up():
    tidied = False
    with pytest.raises(Stopped, match="SIGUSR1"), stoppable():
        try:
            send(signal.SIGUSR1)
        finally:
            send(signal.SIGTERM)
            tidied = True
    assert tidied and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU])
def test_preparing_data_leaves_nothing(tmp_path, monkeypatch, capsys, number):
    text = tmp_path / "in.txt"
    text.write_text("\n\n".join(f"word {i} " * 300 for i in range(60)))
    out = tmp_path / "out"

    def stopped(source, model, *rest):
        assert len(list(out.parent.glob(".out.*.tmp"))) == 1
        send(number)

    monkeypatch.setattr(prepare, "_train", stopped)
    assert main(["data", "prepare", "--text", str(text), "--out", str(out)]) == 128 + number
    assert signal.Signals(number).name in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.txt"]


def test_output_that_the_terminal_cannot_show(monkeypatch):
    """The box of a table in ASCII, and a name that is not UTF-8 in UTF-8."""
    cases = ("ascii", "10 µnats", b"\\xb5"), ("utf-8", "a\udce9", b"\\udce9")
    for encoding, text, shown in cases:
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        print_anything()
        print(text, flush=True)
        assert shown in raw.getvalue()
