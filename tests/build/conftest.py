"""What tests of the build share."""

import pytest

from .checkout import FAKE_COMPILER, copy_checkout, program


@pytest.fixture
def checkout(tmp_path):
    return copy_checkout(tmp_path)


@pytest.fixture
def fake(tmp_path):
    """(a PATH that holds the stand-in as c++ and nvcc besides sh, the folder of the stand-ins)."""
    folder = tmp_path / "fake $bin"  # what ninja and the shell each want escaped
    for name in ("c++", "nvcc"):
        program(folder / name, FAKE_COMPILER)
    (folder / "sh").symlink_to("/bin/sh")
    return str(folder), folder
