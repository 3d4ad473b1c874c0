"""The trace of a few steps, for chrome://tracing and Perfetto (profile=FIRST:LAST)."""

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from pgolf.errors import StorageError
from pgolf.files import atomic_write, storage_errors
from pgolf.settings import profiled_steps
from pgolf.training.session import Session

FILE = "profile-{}-{}.json.gz"  # the first step in it and the last


class Profile:
    """Records on the first rank from the start of one step to the end of another.

    It begins and ends where no step is on its way, which is off the training clock; the steps that
    it records are slower, and are on it. The other ranks wait while it is written.
    """

    def __init__(self, session: Session):
        self.session = session
        self.text = session.config.run.profile
        self.first, self.last = profiled_steps(self.text)
        self._profiler: torch.profiler.profile | None = None
        self._began = 0
        self._recorded = self._closed = False

    def due(self, step: int) -> bool:
        """Whether `at` has something to do once that step is over."""
        return step in (self.first - 1, self.last)

    def at(self, step: int) -> None:
        """Begin or end, by the number of the last step; on every rank."""
        on = self.first - 1 <= step < self.last
        self.session.ranks.on_first(lambda: self._begin(step) if on else self._end(step))

    def close(self, step: int, stopped: bool = False) -> None:
        """Training is over, or stopped: keep what there is, once; on every rank."""
        if not self._closed:
            self._closed = True
            self.session.ranks.on_first(lambda: self._close(step, stopped))

    def _close(self, step: int, stopped: bool) -> None:
        self._end(step)
        if not self._recorded and not stopped:
            self.session.say(
                f"warning: profile={self.text}: training was over after step {step}, no trace"
            )

    def _begin(self, step: int) -> None:
        if self._profiler is None:
            on_gpu = self.session.ranks.device.type == "cuda"
            seen = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
            self._profiler = torch.profiler.profile(activities=seen)
            self._profiler.start()
            self._began = step

    def _end(self, step: int) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if step == self._began:
            return
        self._recorded = True
        file = Path(self.session.folder.path) / FILE.format(self._began + 1, step)
        try:
            with storage_errors(file), tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / file.name  # torch compresses what is called so
                profiler.export_chrome_trace(str(trace))
                atomic_write(file, trace.read_bytes())
        except StorageError as e:
            self.session.folder.warn(e)
        else:
            self.session.say(f"profile={self.text}: {file}")
