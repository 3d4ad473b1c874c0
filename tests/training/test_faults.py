"""What becomes of a run under torchrun when one of its processes fails: a clear end, and soon."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgolf.training.run_folder import RunFolder

from .tiny import ONE_THREAD, ROOT, TINY, replaced

pytestmark = pytest.mark.slow

WORLD = 3
SOON = 30  # seconds; a rank that stands still is missed after `patience`
ENDLESS = (
    "max_tokens=0", "max_steps=1000000", "val_every=0", "patience=3", "log_every=5",
    "checkpoint_every=30",
)  # fmt: skip


class Run:
    """An endless run of WORLD ranks, with the processes of its ranks."""

    def __init__(self, shards: Path, out: Path):
        self.out, self.said = out, out.with_suffix(".log")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}"]
        settings = replaced(TINY, (*ENDLESS, "batch_tokens=192", "micro_tokens=64", f"out={out}"))
        with self.said.open("w") as said:
            self.torchrun = subprocess.Popen(
                [sys.executable, *launcher, "-m", "pgolf", "train", "demo", f"data={shards}",
                 *settings],
                stdout=said, stderr=subprocess.STDOUT, cwd=ROOT, env=ONE_THREAD,
            )  # fmt: skip
        # Just after a checkpoint, so that none is being written when a process is stopped: a rank
        # that writes one is waited for much longer than `patience`.
        self.wait(lambda: "step:30 checkpoint" in self.said.read_text(), 240)
        children = Path(f"/proc/{self.torchrun.pid}/task/{self.torchrun.pid}/children")
        self.ranks = {}
        for pid in map(int, children.read_text().split()):
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = [v[5:] for v in environment if v.startswith(b"RANK=")]
            self.ranks.update({int(r): pid for r in rank})
        assert sorted(self.ranks) == list(range(WORLD))

    def wait(self, done, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, self.said.read_text()
            time.sleep(0.2)

    def alive(self) -> list[int]:
        """Ranks whose process is there; one that ended and that nobody asks about is not."""
        found = []
        for rank, pid in self.ranks.items():
            stat = Path(f"/proc/{pid}/stat")
            if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(rank)
        return found

    def ended(self) -> list[str]:
        """What it says, in lines of ours, once all its processes are gone."""
        self.wait(lambda: not self.alive(), SOON)
        text = self.said.read_text()
        lines = [line for line in text.splitlines() if line.startswith("pgolf")]
        assert len(lines) <= 5, text
        return lines

    def kill(self) -> None:
        for pid in (self.torchrun.pid, *(self.ranks[r] for r in self.alive())):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.torchrun.wait()


@pytest.fixture
def run(shards, tmp_path):
    started = Run(shards, tmp_path / "run")
    yield started
    started.kill()


def last_checkpoint(run: Run) -> int:
    """The step of the newest one, which can be read."""
    state, _ = RunFolder(run.out, writes=False).load("cpu")
    return state["clock"]["step"]


def test_a_signal_to_any_rank_stops_all_with_a_checkpoint(run):
    os.kill(run.ranks[1], signal.SIGTERM)
    (line,) = run.ended()
    step = int(re.search(r"stopped after step (\d+)", line)[1])
    assert "rank 0" in line and last_checkpoint(run) == step


def test_ranks_do_not_outlive_torchrun(run):
    os.kill(run.torchrun.pid, signal.SIGKILL)
    (line,) = run.ended()
    assert "stopped after step" in line and last_checkpoint(run) >= 30


def test_a_killed_rank_is_named(run):
    os.kill(run.ranks[1], signal.SIGKILL)
    (line,) = run.ended()
    assert re.search(r"\(rank 0\): error: step \d+: rank 1 ended without a word", line)
    assert "resume=true" in line and last_checkpoint(run) >= 30


def test_a_rank_that_stands_still_is_named(run):
    os.kill(run.ranks[0], signal.SIGSTOP)
    run.wait(lambda: run.alive() == [0], SOON)
    os.kill(run.ranks[0], signal.SIGKILL)
    (line,) = run.ended()
    assert re.search(r"\(rank 1\): error: step \d+: rank 0 did not answer for 3 s", line)
    assert run.torchrun.wait(SOON) != 0 and last_checkpoint(run) >= 30


SHORT = """
from pgolf import roll_call
from pgolf.ranks import Ranks
roll_call.INTERVAL = 0.0  # asks the store all the time, at the end too
ranks = Ranks.start("cpu")
assert ranks.sum([ranks.rank + 1.0]) == [3.0]
ranks.stop()
"""


def test_ranks_that_are_done_end_in_peace(tmp_path):
    script = tmp_path / "short.py"
    script.write_text(SHORT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = ONE_THREAD | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
