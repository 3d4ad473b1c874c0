"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Without a GPU, Triton kernels run in Triton's interpreter, which has to be known before the first
# import of triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

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
