"""Parts within a time: what passes, fails, is cut off, and that nothing stays behind."""

import sys
import time
from pathlib import Path

import pytest

from bench import parts
from bench.parts import Part

QUICK = (sys.executable, "-S", "-c")


def part(name: str, *codes: str, share: float = 1.0, **options) -> Part:
    return Part(name, share, lambda seconds: [(*QUICK, code) for code in codes], **options)


def test_parts_pass_fail_or_are_left_out_and_the_others_run(tmp_path) -> None:
    outcomes = parts.run(
        [
            part("a", "print('out'); import sys; print('err', file=sys.stderr)"),
            part("b", "raise SystemExit(3)", "print('goes on')", says=lambda: ["said"]),
            part("c", "pass", missing="no such tool"),
            part("d", "import os; print(os.environ['WORD'])", env={"WORD": "given"}),
            part("e", "pass", says=lambda: [][0]),
        ],
        60, tmp_path,
    )  # fmt: skip
    assert [(o.name, o.verdict, o.good) for o in outcomes] == [
        ("a", "passed", True), ("b", "FAILED, code 3", False),
        ("c", "left out: no such tool", False), ("d", "passed", True), ("e", "passed", True),
    ]  # fmt: skip
    logs = {file.stem: file.read_text() for file in tmp_path.glob("*.log")}
    assert set(logs) == set("abde")
    assert logs["a"].startswith(f"$ {sys.executable} -S -c print") and "out" in logs["a"]
    assert "err" in logs["a"] and "goes on" in logs["b"] and "given" in logs["d"]
    assert outcomes[1].says == ["said"]
    assert outcomes[4].says[0].startswith("its results cannot be read: IndexError")


def test_time_that_is_left_goes_to_those_that_follow(tmp_path, monkeypatch) -> None:
    now, may = [0.0], []
    monkeypatch.setattr(parts.time, "monotonic", lambda: now[0])

    def took(seconds: float):
        def commands(given: float) -> list:
            may.append(given)
            now[0] += seconds
            return []

        return commands

    made = [Part("a", 1, took(5)), Part("b", 2, took(85)), Part("c", 1, took(0))]
    outcomes = parts.run(made, 100, tmp_path)
    assert may == [25, pytest.approx(95 * 2 / 3), 10]
    assert parts.run(made[:1], 1.9, tmp_path)[0].verdict == "no time was left" and len(may) == 3
    assert all(o.good for o in outcomes)


def test_what_others_need_may_take_all_the_time_that_is_left(tmp_path, monkeypatch) -> None:
    now, may = [0.0], []
    monkeypatch.setattr(parts.time, "monotonic", lambda: now[0])
    given = lambda seconds: may.append(seconds) or []  # noqa: E731
    made = [Part("data", 1, given, needed=True), Part("b", 3, given), Part("c", 1, given)]
    parts.run(made, 100, tmp_path)
    assert may == [100, 75, 100]


def test_a_command_may_be_ended_before_the_part(tmp_path, monkeypatch) -> None:
    """It takes no time of those after it, which judge what it has left."""
    monkeypatch.setattr(parts, "GRACE", 0.1)
    endless = "print('begun', flush=True); import time; time.sleep(60)"
    judge = "print('judged')"
    halves = part("a", endless, judge, until=(0.2,))
    failing = part("b", "raise SystemExit(3)", "pass", unjudged=1)
    wrong = part("c", "raise SystemExit(3)", "raise SystemExit(4)", unjudged=1)
    outcomes = parts.run([halves, failing, wrong], 15, tmp_path)
    assert [(o.verdict, o.good) for o in outcomes] == [
        ("passed", True), ("passed", True), ("FAILED, code 4", False)
    ]  # fmt: skip
    log = (tmp_path / "a.log").read_text()
    assert "begun\nended after 20% of the time\n$ " in log and log.endswith("judged\n")


def test_what_a_command_leaves_running_is_ended(tmp_path) -> None:
    file = tmp_path / "pid"
    leaves = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(file)!r}, 'w').write(str(child.pid))"
    )
    (outcome,) = parts.run([part("a", leaves)], 60, tmp_path)
    assert outcome.verdict == "passed"
    assert ended(int(file.read_text()))


def ended(pid: int) -> bool:
    """Whether a process ends, within ten seconds."""
    deadline = time.monotonic() + 10
    while (status := parts._stat(pid)) and status[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    return not status or status[0] == "Z"


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True)
open({file!r}, "w").write(f"kept {{child.pid}}")
time.sleep(60)
"""


@pytest.mark.parametrize("endless", [False, True])
def test_what_is_cut_off_keeps_what_it_has_and_leaves_no_process(
    tmp_path, monkeypatch, endless
) -> None:
    """Also one that heeds no signal, and its child in a session of its own, as torchrun's are."""
    monkeypatch.setattr(parts, "GRACE", 0.1)
    monkeypatch.setattr(parts, "LEAST", 0.1)
    file = tmp_path / "result"
    says = lambda: [file.read_text()]  # noqa: E731
    one = part("a", STUBBORN.format(file=str(file)), "open('never', 'w')", says=says,
               endless=endless)  # fmt: skip
    seen = []
    began = time.monotonic()
    (outcome,) = parts.run([one], 1.0, tmp_path, lambda so_far: seen.append(len(so_far)))
    assert time.monotonic() - began < 20 and seen == [1]
    assert outcome.verdict == "cut off after 1 s" and outcome.good == endless
    assert outcome.says[0].startswith("kept ")
    assert ended(int(outcome.says[0].split()[1]))
    assert not (Path(parts.ROOT) / "never").exists()


def test_an_interruption_ends_what_runs_and_is_told(tmp_path, monkeypatch) -> None:
    def interrupted(*args) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(parts.subprocess.Popen, "wait", interrupted)
    ended, seen = [], []
    monkeypatch.setattr(parts, "_end", lambda process: ended.append(process) or process.kill())
    with pytest.raises(KeyboardInterrupt):
        parts.run([part("a", "import time; time.sleep(60)"), part("b", "pass")], 60, tmp_path,
                  lambda so_far: seen.extend(so_far))  # fmt: skip
    assert len(ended) == 1 and [(o.name, o.verdict) for o in seen] == [("a", "interrupted")]
