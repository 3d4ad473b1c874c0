"""Python processes that pgolf starts: they see the modules that this one sees, and end with it.

A module in the user's folder with the name of one of Python's or pgolf's must not replace it, and
the child runs the same copy of pgolf as this process.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from pgolf.stop import handled

# Runs with `python -c`, which puts '' in front of the search path: the working directory. (-P would
# leave it out, from Python 3.11 on.) On Linux the child is sent SIGTERM when its parent ends,
# however that happens; an execv keeps that. Ctrl-C reaches both, and the parent prints the message.
_START = """
import sys
sys.path[:] = {path!r} + [p for p in sys.path if p and p not in {path!r}]
import os, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
    if os.getppid() != {parent}:
        sys.exit(1)
"""
# Packages come from the files that they have here, whatever the search path finds first.
_PACKAGES = """
import importlib.util, runpy
for name, file in {packages!r}:
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
"""
_MODULE = "runpy.run_module({!r}, run_name='__main__', alter_sys=True)\n"


def search_path() -> list[str]:
    """This process's search path without the folder that it was started in."""
    return [os.path.abspath(p) for p in sys.path if p not in ("", ".", os.getcwd())]


def _command(code: str, *arguments: str) -> list[str]:
    start = _START.format(path=search_path(), parent=os.getpid())
    return [sys.executable, "-c", start + code, *arguments]


def _run(code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(code, *arguments), encoding="utf-8", errors="replace", **options)


def run_code(
    code: str, *arguments: str, packages: tuple[str, ...] = ("pgolf",), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run the text of a program in a process of its own, and wait for its end.

    Args:
        arguments: of its command line.
        packages: imported from the files that this process has imported them from.
        options: more arguments of `subprocess.run`; output is text in UTF-8.
    """
    return _run(_imports(packages) + code, *arguments, **options)


def _imports(packages: tuple[str, ...]) -> str:
    files = [(name, sys.modules[name].__file__) for name in packages]
    return _PACKAGES.format(packages=files)


def run_module(module: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a module of pgolf, or of another package that is imported here, as `run_code` does."""
    packages = tuple(sorted({"pgolf", module.partition(".")[0]}))
    return run_code(_MODULE.format(module), *arguments, packages=packages, **options)


def run_forwarding(module: str, *arguments: str) -> tuple[int, list[int]]:
    """Run a module of pgolf as `run_module` does, and send it the signals that come here.

    It is in a session of its own, where Ctrl-C does not reach it twice.

    Returns:
        Its exit code as a shell has it, and these signals.
    """
    sent, process = [], None

    def forward(number: int, frame: FrameType | None) -> None:
        sent.append(number)
        if process is not None:
            process.send_signal(number)

    with handled(forward, signal.SIGINT):
        command = _command(_imports(("pgolf",)) + _MODULE.format(module), *arguments)
        process = subprocess.Popen(command, start_new_session=True)
        for number in sent:  # before it was there
            process.send_signal(number)
        code = process.wait()
    return code if code >= 0 else 128 - code, sent


def run_script(
    script: Path | str, *arguments: str, env: Mapping[str, str], **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a file as `python FILE` would, as `run_code` does; it is not given pgolf.

    Args:
        env: the environment, in which PYTHONPATH becomes this process's search path.
    """
    code = "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    env = {**env, "PYTHONPATH": os.pathsep.join(search_path())}
    return _run(code, str(script), *arguments, env=env, **options)
