"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from .simt.emulator import Missing, emulated_module


def emulate_gpu() -> str:
    """Let kernels run without a GPU; what is emulated, or what is missing for it.

    Triton kernels run in Triton's interpreter, which has to be known before the first import of
    triton, CUDA kernels in the emulator, which pgolf.extension loads. Seed 2 is a random order of
    threads: a missing barrier shows.
    """
    if torch.cuda.is_available():
        return "nothing, there is a GPU"
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("PGOLF_EMULATOR_SEED", "2")
    if os.environ.get("PGOLF_CUDA_MODULE"):
        return "Triton, and CUDA as PGOLF_CUDA_MODULE says"
    try:
        os.environ["PGOLF_CUDA_MODULE"] = str(emulated_module())
    except Missing as missing:
        return f"Triton; not CUDA, whose tests are left out: {missing}"
    return "Triton and CUDA"


EMULATED = emulate_gpu()

# One process for each core fills them: threads would only wait for each other. Tests of threads ask
# for theirs.
if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    return f"emulated: {EMULATED}"


# No test depends on wall time, and the machines that run them are small and shared.
settings.register_profile("pgolf", deadline=None)
settings.load_profile("pgolf")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of sample shards and tokenizers that may lie beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no sample data at {folder}")
    return folder
