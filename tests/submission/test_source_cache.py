"""Minified modules that are kept: found again by what made them, and made anew when in doubt."""

import os
import subprocess
import sys

import pytest

from pgolf.submission import script, source_cache
from pgolf.submission.source_cache import cached

from ..training.tiny import ROOT

SOURCES = {"pgolf": "a=1\n", "loader": "é='\\0'"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pgolf" / "scripts"


def never():
    raise AssertionError("it was kept")


def test_made_once(folder):
    assert cached("k", lambda: SOURCES) == SOURCES
    assert cached("k", never) == SOURCES
    assert cached("another", lambda: {}) == {}
    assert sorted(f.name for f in folder.iterdir()) == ["another.json", "k.json"]


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data.replace(b"a=1", b"a=2"), lambda data: b"",
    lambda data: b"\xff" + data, lambda data: data.partition(b"\n")[0],
])  # fmt: skip
def test_a_damaged_file_is_made_anew(folder, damage):
    cached("k", lambda: SOURCES)
    file = folder / "k.json"
    good = file.read_bytes()
    file.write_bytes(damage(good))
    assert cached("k", lambda: SOURCES) == SOURCES
    assert file.read_bytes() == good


def test_a_place_that_cannot_be_written_costs_only_time(folder):
    folder.parent.write_text("a file")
    assert cached("k", lambda: SOURCES) == SOURCES
    assert cached("k", lambda: {}) == {}


WRITER = """
from pgolf.files import user_cache
from pgolf.submission.source_cache import cached
wanted = {"pgolf": "a=1" * 100_000}
for _ in range(50):
    assert cached("k", lambda: dict(wanted)) == wanted
    (user_cache("scripts") / "k.json").unlink(missing_ok=True)
"""


def test_writers_at_the_same_time():
    """Each reads what it or another made, never a half."""
    command = [sys.executable, "-c", WRITER]
    assert {p.wait() for p in [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]} == {0}


def test_the_oldest_go(folder, monkeypatch):
    monkeypatch.setattr(source_cache, "KEPT", 2)
    for number in range(4):
        cached(str(number), dict)
        os.utime(folder / f"{number}.json", (number, number))
    cached("4", dict)
    assert sorted(f.name for f in folder.iterdir()) == ["3.json", "4.json"]


def test_the_key_is_of_all_that_decides(monkeypatch):
    """Any source, the list of them, the code that makes them smaller, both versions."""
    first = script._key(SOURCES)
    assert script._key(dict(SOURCES)) == first
    keys = [first, script._key({**SOURCES, "pgolf": "a=2\n"}), script._key({"pgolf": "a=1\n"})]
    for of, name, value in (
        (script, "version", lambda package: "0"),
        (sys, "version", "3.99"),
        (script, "__file__", source_cache.__file__),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(of, name, value)
            keys.append(script._key(SOURCES))
    assert len(set(keys)) == len(keys)
