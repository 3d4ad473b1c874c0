"""Numbers that stand both in pgolf/ops/ and in csrc/ are the same numbers."""

import importlib

import pytest

from pgolf import extension
from pgolf.ops.multi_tensor import COLUMNS


@pytest.fixture(scope="module")
def constants() -> dict[str, int]:
    if extension.load() is None:
        pytest.skip(extension.why_missing())
    return extension.load().constants


def in_python(path: str) -> int:
    """What 'OWNER.NAME' is in pgolf/ops/OWNER.py, or what lies in it at the keys that follow."""
    owner, name, *keys = path.split(".")
    found = getattr(importlib.import_module(f"pgolf.ops.{owner}"), name)
    for key in keys:
        if isinstance(found, dict):
            found = found[key]
        else:
            found = found[int(key)] if key.isdecimal() else found.index(key)
    return found


def test_they_agree(constants):
    assert {path: in_python(path) for path in constants} == constants
    for path in (
        "residual_norm_kernels.MIN_PART", "qk_rope_kernels.MAX_PARTS", "embed_smear_kernels.CHUNK",
        "multi_tensor.CHUNK", "xsa.SIZE_LIMITS.cuda", "int_grid.BITS.4",
    ):  # fmt: skip
        assert path in constants


def test_columns_of_scalars_are_the_fields_of_the_struct(constants):
    fields = [path for path in constants if path.startswith("multi_tensor.COLUMNS.")]
    assert [path.split(".")[-1] for path in sorted(fields, key=constants.get)] == list(COLUMNS)
