"""What a process that sees the counting device can ask of it."""

import ctypes
import json
from pathlib import Path

import torch


class Device:
    """The counting device that this process was started with.

    Args:
        log: where it writes; an old file is replaced.

    Raises:
        RuntimeError: this process sees another device, or the log can't be opened.
    """

    def __init__(self, log: Path):
        library = ctypes.CDLL(None)
        if not hasattr(library, "counting_name"):
            raise RuntimeError("this process was not started with the counting device")
        library.counting_name.restype = ctypes.c_char_p
        library.counting_kernels.restype = ctypes.c_ulong
        self.name = library.counting_name().decode()
        seen = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        if seen != self.name:
            raise RuntimeError(f"torch sees {seen}, not the {self.name}")
        self._library = library
        if library.counting_open(str(log).encode()):
            raise RuntimeError(f"the counting device cannot write {log}")

    def kernels(self) -> int:
        """Kernels of torch's own that were launched so far."""
        return self._library.counting_kernels()

    def note(self, **event: object) -> None:
        """A line in the log, in its place among the launches; `kind` says what it is."""
        self._library.counting_note(json.dumps(event).encode())

    def work(self, **event: object) -> None:
        """Likewise of work on the current stream, which a graph that is captured records.

        Raises:
            RuntimeError: a capture forbids it.
        """
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if self._library.counting_work(json.dumps(event).encode(), stream):
            raise RuntimeError(f"{event}: a capture goes on, and this is not on its stream")

    def close(self) -> None:
        """End the log.

        Raises:
            RuntimeError: not all of it could be written.
        """
        if self._library.counting_close():
            raise RuntimeError("the counting device could not write its log to the end")
