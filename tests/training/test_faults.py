"""What becomes of a run under torchrun when one of its processes fails: a clear end, and soon."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pgolf.training.run_folder import RunFolder

from .tiny import ONE_THREAD, ROOT, TINY, replaced

pytestmark = pytest.mark.slow

WORLD = 3
SOON = 30  # seconds; a rank that stands still is missed after `patience`
DETECTED = 15  # seconds from the first line on
ENDLESS = (
    "max_tokens=0", "max_steps=1000000", "val_every=0", "patience=3", "log_every=5",
    "checkpoint_every=30",
)  # fmt: skip


class Run:
    """A run of WORLD ranks, with the processes of its ranks.

    Args:
        program: what torchrun starts.
        settings: in place of TINY's.
    """

    def __init__(
        self, shards: Path, out: Path, program: tuple[str, ...], settings: tuple[str, ...]
    ):
        self.out, self.log = out, out.with_suffix(".log")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={WORLD}"]
        words = replaced(TINY, (*settings, "batch_tokens=192", "micro_tokens=64", f"out={out}"))
        with self.log.open("w") as log:
            self.torchrun = subprocess.Popen(
                [sys.executable, *launcher, *program, "train", "demo", f"data={shards}", *words],
                stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
                env=ONE_THREAD | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        self.ranks: dict[int, int] = {}

    def all_there(self) -> bool:
        """Whether torchrun has started all ranks; notes their processes."""
        children = Path(f"/proc/{self.torchrun.pid}/task/{self.torchrun.pid}/children")
        for pid in map(int, children.read_text().split()):
            with suppress(OSError):  # torchrun has helpers, which come and go
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = [v[5:] for v in environment if v.startswith(b"RANK=")]
                self.ranks.update({int(r): pid for r in rank})
        return sorted(self.ranks) == list(range(WORLD))

    def wait(self, done, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)

    def alive(self) -> list[int]:
        """Ranks whose process is there; one that ended and that nobody asks about is not."""
        running = []
        for rank, pid in self.ranks.items():
            with suppress(OSError):  # gone, perhaps while its file is being read
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                running += [rank] * (state != "Z")
        return running

    def ended(self, soon: float = SOON) -> list[str]:
        """What it says, in lines of ours, once all its processes are gone."""
        self.wait(lambda: not self.alive(), soon)
        text = self.log.read_text()
        # Not "pgolf FAILED", the title of torchrun's table.
        lines = [line for line in text.splitlines() if line.startswith(("pgolf (", "pgolf:"))]
        assert len(lines) <= 5, text
        return lines

    def tracebacks(self) -> list[int]:
        """Ranks that print one, as often as they do."""
        ranks = re.findall(r"^\[rank(\d)\]: Traceback", self.log.read_text(), re.MULTILINE)
        return list(map(int, ranks))

    def root_cause(self) -> tuple[int, str]:
        """(rank, reason) of torchrun's table."""
        cause = self.log.read_text().rpartition("Root Cause")[2]
        rank = re.search(r"^  rank      : (\d)", cause, re.MULTILINE)
        return int(rank[1]), re.search(r"^  traceback : (.*)", cause, re.MULTILINE)[1]

    def exit_codes(self) -> dict[int, int]:
        """Rank -> exit code, of those in torchrun's table."""
        row = r"^  rank      : (\d).*\n  exitcode  : (-?\d+)"
        return {int(r): int(c) for r, c in re.findall(row, self.log.read_text(), re.MULTILINE)}

    def kill(self) -> None:
        for pid in (self.torchrun.pid, *(self.ranks[r] for r in self.alive())):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.torchrun.wait()


@pytest.fixture
def run(shards, tmp_path):
    """An endless one."""
    started = Run(shards, tmp_path / "run", ("-m", "pgolf"), ENDLESS)
    try:
        started.wait(started.all_there, 240)
        # Just after a checkpoint, so that none is being written when a process is stopped: a rank
        # that writes one is waited for much longer than `patience`.
        started.wait(lambda: "step:30 checkpoint" in started.log.read_text(), 240)
        yield started
    finally:
        started.kill()


@pytest.fixture
def faulty(shards, tmp_path):
    """What a run says, in lines of ours, that has a fault on rank 1; and that run.

    All its processes are gone soon after the first of these lines, or `patience` later.
    """
    started = []

    def end(fault: str, manifest: bool = True, **settings: int) -> tuple[list[str], Run]:
        data = tmp_path / "words"
        shutil.copytree(shards, data)
        if not manifest:
            (data / "manifest.json").unlink()
        program = (str(Path(__file__).with_name("injected.py")), fault, "1")
        words = tuple(f"{key}={value}" for key, value in settings.items())
        started.append(run := Run(data, tmp_path / "run", program, words))
        run.wait(run.all_there, 240)
        run.wait(lambda: "\npgolf" in f"\n{run.log.read_text()}", 240)
        lines = run.ended(DETECTED + settings.get("patience", 0))
        assert run.torchrun.wait(SOON) != 0
        return lines, run

    yield end
    for run in started:
        run.kill()


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


BUG = "RuntimeError: the injected bug"


def test_a_rank_with_a_bug_is_named_with_its_message(faulty):
    (line,), run = faulty("bug")
    assert f"(rank 0): error: rank 1 failed at step 10: {BUG}; go on with" in line
    assert run.tracebacks() == [1] and run.root_cause() == (1, BUG)
    assert run.exit_codes() == {0: 3, 1: 1, 2: 3}
    assert last_checkpoint(run) == 5


def test_a_rank_that_hangs_in_a_step_is_named(faulty):
    """It lives, and is where the others are."""
    (line, ended), run = faulty("hangs", patience=3)
    assert ended == "pgolf: SIGTERM: ended in the middle of a step"
    assert "(rank 0): error: step 10: rank 1 kept the others waiting for 3 s; go on with" in line
    assert run.tracebacks() == [] and last_checkpoint(run) == 5


def test_a_rank_that_exits_silently_is_named(faulty):
    (line,), run = faulty("exit")
    assert "(rank 0): error: step 10: rank 1 ended without a word" in line
    assert run.tracebacks() == [] and "rank 1 ended" in run.root_cause()[1]
    assert last_checkpoint(run) == 5


def test_a_rank_that_reads_a_foreign_token_is_named(faulty):
    lines, run = faulty("foreign", manifest=False)
    others, mine = sorted(lines)
    what = r"words-other/words_train_0+.bin: token 60000 at position 1\d{3}, expected less than"
    assert re.search(rf"\(rank 1\): error: .*{what}", mine)
    assert re.search(rf"\(rank 0\): error: rank 1 failed at step \d+: .*{what}", others)
    assert run.tracebacks() == [] and last_checkpoint(run) == 5


@pytest.mark.parametrize("fault, what", [
    ("packing", f"rank 1 failed at step 6 (packing and scoring): {BUG}"),
    ("killed", "step 6 (packing and scoring): rank 1 ended without a word: killed?"),
], ids=lambda value: value.partition(" ")[0])  # fmt: skip
def test_a_rank_that_ends_after_training_is_named(faulty, fault, what):
    (line,), run = faulty(fault, max_steps=6)
    assert f"(rank 0): error: {what}; go on with" in line
    assert run.tracebacks() == [1] * (fault == "packing") and run.root_cause()[0] == 1
    assert last_checkpoint(run) == 6


@pytest.mark.parametrize("fault, manifest, what", [
    ("shorter", False, r"rank 0.*rank 1 has words_train_0+.bin of [\d,]+ bytes, rank 0"),
    ("missing", False, r"rank 1.*no shards \*_train_\*.bin in .*words-other"),
    ("shorter", True, r"rank 1.*words_train_0+.bin: \d+ tokens, the manifest states"),
    ("config", True, r"rank 0.*rank 1 has matrix_lr=0.01, rank 0 matrix_lr=0.03: start all"),
    ("option", True, r"rank 1.*unknown key 'lauers': did you mean layers"),
    ("device", True, r"rank 1.*local rank 1 has no GPU"),
], ids=["shorter", "missing", "stated", "config", "option", "device"])  # fmt: skip
def test_a_rank_that_cannot_begin_is_named(faulty, fault, manifest, what):
    (line,), run = faulty(fault, manifest)
    assert re.match(rf"pgolf \(?{what}", line), line
    assert run.tracebacks() == [] and "step:1/" not in run.log.read_text()
    assert not (run.out / "config.json").exists()


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
