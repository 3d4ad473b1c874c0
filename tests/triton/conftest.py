"""Tests of the Triton kernels: in the interpreter, with bfloat16 repaired."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:  # a CPU build of torch comes without it
    collect_ignore_glob = ["test_*.py"]
else:
    from .interpreter import repair

    repair()


@pytest.fixture(autouse=True)
def _interpreted() -> None:
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("this machine has a GPU: set TRITON_INTERPRET=1 to interpret kernels instead")
