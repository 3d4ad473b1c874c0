"""Reading a file, hostile or not, takes memory and time in proportion to what it declares."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pgolf.artifact.container import read_artifact
from pgolf.codecs import rans_encode

from .test_hostile import ATTACKS, ONE, halves, streamed

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)

PEAK = """
import os, sys
from pathlib import Path
from pgolf.artifact.container import read_artifact
from pgolf.errors import ArtifactError

def peak():  # of this process alone: ru_maxrss would count the parent's from before fork or exec
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) << 10

for folder in sys.stdin:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    files = sorted(Path(folder.rstrip()).iterdir())
    read_artifact(files[0])
    before = peak()
    for file in files[1:]:
        try:
            read_artifact(file)
        except ArtifactError:
            pass
    print(peak() - before, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def peak_growth():
    """Bytes by which reading all files of a folder but the first raises the peak of a process.

    Each folder gets a process of its own, forked from one that has imported what it needs.
    """
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", PEAK], cwd=root, text=True, bufsize=1,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

        def call(folder: Path) -> int:
            process.stdin.write(f"{folder}\n")
            return int(process.stdout.readline())

        yield call
        process.stdin.close()
        assert process.wait() == 0


def test_no_attack_takes_much_memory(tmp_path, peak_growth, forge, good):
    (tmp_path / "00-good").write_bytes(good)
    for i, attack in enumerate(ATTACKS, 1):
        (tmp_path / f"{i:02}").write_bytes(ATTACKS[attack](forge)[0])
    # Brotli's window of 16 MiB is the largest; the bombs hold 64 MiB and more.
    assert peak_growth(tmp_path) < 20 << 20


@pytest.mark.parametrize(("name", "packing"), [
    ("zstd", "bytes"), ("lzma", "bytes"), ("brotli", "bytes"), ("zstd", "columns"),
])
def test_reading_a_body_takes_a_small_multiple_of_what_is_declared(
    tmp_path, peak_growth, forge, good, name: str, packing: str
):
    side = 6000
    table = [["a", 6, [side, side], *ONE[3:]]]
    header = {"meta": {}, "packing": packing, "tensors": table, "columns": []}
    text = json.dumps(header).encode()
    body = len(text).to_bytes(4, "little") + text + bytes(side * side) + halves(*[1] * side)
    (tmp_path / "0").write_bytes(good)
    (tmp_path / "1").write_bytes(forge.body(body, name))
    assert len(body) < peak_growth(tmp_path) < (8 << 20) + 2 * len(body)


def test_looking_up_takes_little_memory(tmp_path, peak_growth, forge):
    """A body whose every row has an index, which becomes int64 on the way."""
    rows = 4_000_000
    for name, count in (("0", 1), ("1", rows)):
        line = ["a", 4, [count, 2], 2, 0, None]
        file = forge.table(line, data=bytes(3 * count))
        (tmp_path / name).write_bytes(file)
    assert 5 * rows < peak_growth(tmp_path) < (24 << 20) + 2 * 5 * rows


def test_reading_a_stream_takes_little_more_than_its_codes(tmp_path, peak_growth, forge, good):
    shape = (500, 8000)
    codes = (np.random.default_rng(0).normal(0, 5, shape)).astype(np.int8)
    line = ["a", 6, list(shape), 2, 0, None]
    stream = rans_encode.compress([codes, np.zeros((1, 500), np.int8)], [2, 0])
    (tmp_path / "0").write_bytes(good)
    (tmp_path / "1").write_bytes(forge.table(line, stream=stream))
    assert codes.size < peak_growth(tmp_path) < (24 << 20) + 2 * codes.size


@pytest.mark.parametrize("shapes", [
    [(256, 8192)], [(1, 4 << 20)], [(0, 1 << 29)] * 9, [(1, 1)] * 2000,
], ids=["many codes", "wide", "empty", "many matrices"])
def test_small_streams_end_soon_in_little_memory(tmp_path, peak_growth, forge, good, shapes):
    """As much work as streams of their sizes may declare, all codes being 0."""
    lines = [[f"t{i}", 6, shape, 2, None, None] for i, shape in enumerate(shapes)]
    stream = streamed(*(np.zeros(shape, np.int8) for shape in shapes))
    data = forge.table(*lines, data=halves(*[1] * sum(r for r, _ in shapes)), stream=stream)
    (tmp_path / "0").write_bytes(good)
    (tmp_path / "1").write_bytes(data)
    began = time.process_time()
    assert not any(t.data.any() for t in read_artifact(data).tensors.values())
    assert time.process_time() - began < 6  # more than is promised: the machine may be busy
    assert peak_growth(tmp_path) < (24 << 20) + 2 * sum(r * c for r, c in shapes)
