"""What tests of kernels that are called by pointer share."""

import pytest

from pgolf import extension


@pytest.fixture(scope="session")
def kernels():
    """pgolf._C."""
    if extension.load() is None:
        pytest.skip(extension.why_missing())
    return extension.load()
