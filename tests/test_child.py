"""Processes that pgolf starts see its modules, whatever lies around, and end with it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import pgolf
from pgolf.child import run_code, run_module, run_script, search_path
from pgolf.stop import Stopped, stoppable

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def traps(tmp_path, monkeypatch):
    """A working directory of modules that are called as Python's, torch's and pgolf's."""
    for name in ("json", "ctypes", "signal", "runpy", "pgolf", "torch", "importlib"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('trapped')")
    (tmp_path / "random.py").write_text("raise SystemExit('trapped')")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_module_of_the_working_directory_takes_nobodys_place(traps):
    done = run_code("import json, pgolf, torch.version as t, random\n"
                    "print(json.dumps([json.__file__, pgolf.__file__, t.__file__]))",
                    capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    paths = json.loads(done.stdout)
    assert paths[1] == pgolf.__file__ and not any(f.startswith(str(traps)) for f in paths)
    done = run_module("pgolf", "--version", capture_output=True)
    assert done.stdout == f"pgolf {pgolf.__version__}\n", done.stderr


def test_the_parents_package_wins(tmp_path, monkeypatch):
    """Another copy, found first by the environment's search path."""
    (tmp_path / "pgolf").mkdir()
    (tmp_path / "pgolf" / "__init__.py").write_text("__version__ = 'another'")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = run_module("pgolf", "--version", capture_output=True, env=env)
    assert done.stdout == f"pgolf {pgolf.__version__}\n", done.stderr


def test_a_script_sees_the_libraries_of_its_parent(traps, tmp_path_factory, monkeypatch):
    library = tmp_path_factory.mktemp("libraries")
    (library / "only_here.py").write_text("print('found')")
    monkeypatch.syspath_prepend(str(library))
    script = tmp_path_factory.mktemp("script") / "train.py"
    script.write_text("import sys, json, only_here\nprint(sys.argv[1], __name__)")
    done = run_script(script, "word", env=os.environ, capture_output=True)
    assert done.stdout == "found\nword __main__\n", done.stderr
    assert str(traps) not in search_path()


WAITS = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"


def gone(pid: int) -> bool:
    """Whether a process ends within five seconds; a zombie has ended."""
    for _ in range(500):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
@pytest.mark.parametrize("call", ["run_code(W)", "run_script(sys.argv[1], env=os.environ)"])
def test_a_child_ends_with_a_parent_that_is_killed(tmp_path, call):
    (tmp_path / "script.py").write_text(WAITS)
    code = f"import os, sys\nfrom pgolf.child import run_code, run_script\nW = {WAITS!r}\n{call}"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert gone(child)
    parent.stdout.close()


def test_a_child_ends_with_a_parent_that_is_stopped(tmp_path):
    note = tmp_path / "pid"
    code = f"import os, time\nprint(os.getpid(), file=open({str(note)!r}, 'w', 1))\ntime.sleep(60)"

    def stop():
        while not (note.exists() and note.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    with pytest.raises(Stopped), stoppable():
        thread.start()
        run_code(code)
    thread.join()
    assert gone(int(note.read_text()))
