"""An operator is added with the files that CONTRIBUTING.md lists: a toy one, in a copy."""

import re
import shutil

import pytest

from .test_build import ROOT, build, copy_checkout, python

OPERATOR = '''"""toy: y = factor x."""

import torch
from torch import Tensor

from pgolf.ops.choose import resolve
from pgolf.ops.launch import DTYPE_CODES, in_cpp, launcher, run_cpp
from pgolf.ops.operator import Operator, Sample, Work, register


def reference(x: Tensor, factor: float) -> Tensor:
    return x * factor


def toy(x: Tensor, factor: float, impl: str = "auto") -> Tensor:
    impl = resolve("toy", impl, x)
    run = reference if impl == "reference" else launcher("toy", impl, "forward")
    return run(x, factor)


def _forward(x: Tensor, factor: float) -> Tensor:
    y = torch.empty_like(x)
    run_cpp("toy", x, x.data_ptr(), y.data_ptr(), DTYPE_CODES[x.dtype], x.numel(), factor)
    return y


OPERATOR = register(
    Operator(
        name="toy",
        call=toy,
        reference=reference,
        differentiable=(),
        implementations={"cpu": in_cpp("toy", dtypes=(torch.float32,), forward=_forward)},
        preferred={"cpu": [("cpu", "a test")], "cuda": []},
        samples=lambda: [Sample("3", lambda device, dtype: ((torch.ones(3), 2.0), {}))],
        cost=lambda x, factor: (Work(0, 0, 0), Work(0, 0, 0)),
    )
)
'''
HEADER = """#pragma once
#include "kernels.h"
namespace pgolf {
struct ToyShape {
  int64_t count;
  float factor;
};
}  // namespace pgolf
"""
KERNEL = """#include "toy.h"
#include "host/parallel.h"
namespace pgolf::cpu::PGOLF_ISA {
void toy(const ToyShape& shape, const float* x, float* y, int threads) {
  parallel_for(shape.count, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) y[i] = shape.factor * x[i];
  });
}
}  // namespace pgolf::cpu::PGOLF_ISA
"""
BINDING = """#include "toy.h"
#include "bindings/checks.h"
namespace pgolf::bindings {
namespace {
template <typename On>
void toy(Address x, Address y, int dtype, int64_t count, float factor, On on) {
  if (checked_dtype<On>("dtype", dtype) != Dtype::fp32) refuse("dtype", dtype, "only fp32");
  count_of({{"count", count}});
  check_pointer("x", x, count);
  check_pointer("y", y, count);
  launch::toy(on, ToyShape{count, factor}, x, y);
}
const Functions functions = {PGOLF_BOTH(toy, "x y dtype count factor")};
}  // namespace
}  // namespace pgolf::bindings
"""
LAUNCHER = """PGOLF_STRUCT(ToyShape)
PGOLF_LAUNCHER(toy, const ToyShape& shape, const float* x, float* y)

#undef PGOLF_LAUNCHER"""
WHOLE_FILES = {
    "pgolf/ops/NAME.py": OPERATOR,
    "csrc/NAME.h": HEADER,
    "csrc/cpu/NAME.cpp": KERNEL,
    "csrc/bindings/NAME.cpp": BINDING,
}
# File: (what is there, what takes its place).
REGISTERS = {
    "pgolf/ops/__init__.py": (
        "from pgolf.ops.weight_cast",
        "from pgolf.ops.toy import toy\nfrom pgolf.ops.weight_cast",
    ),
    "csrc/launchers.def": ("#undef PGOLF_LAUNCHER", LAUNCHER),
}
ELSEWHERE = {"csrc/cuda/NAME.cu", "triton_kernels/NAME.py", "triton_kernels/configs.json"}
CALL = """
import torch, pgolf.ops
from pgolf import _C
from pgolf.ops.choose import choose
x = torch.arange(5.0)
print(pgolf.ops.toy(x, 3.0, "cpu").tolist(), choose("toy", "auto", "cpu", torch.float32).impl)
try: _C.toy(x=x.data_ptr(), y=0, dtype=0, count=5, factor=3.0, threads=1)
except ValueError as e: print(e)
"""


def listed() -> dict[str, str]:
    """File -> what it holds, of the table in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = re.search(r"\n## Add an operator\n(.*?)\n## ", text, re.DOTALL)[1]
    return dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", section, re.MULTILINE))


def test_at_most_nine_files_two_of_them_registers():
    files = listed()
    assert set(files) == {*WHOLE_FILES, *REGISTERS, *ELSEWHERE} and len(files) <= 9
    assert {f for f, what in files.items() if what.startswith("register")} == set(REGISTERS)
    for file in files:
        assert (ROOT / file.replace("NAME", "xsa")).exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ on PATH")
def test_a_toy_operator(tmp_path):
    root = copy_checkout(tmp_path)
    for file, text in WHOLE_FILES.items():
        (root / file.replace("NAME", "toy")).write_text(text)
    for file, (old, new) in REGISTERS.items():
        text = (root / file).read_text()
        assert text.count(old) == 1
        (root / file).write_text(text.replace(old, new))
    setup = root / "setup.py"  # one instruction set is enough
    setup.write_text(setup.read_text().replace("platform.machine()", "'riscv64'"))
    build(root, PGOLF_BUILD="cpu")
    called, refused = python(CALL, root, tmp_path).splitlines()
    assert called == "[0.0, 3.0, 6.0, 9.0, 12.0] cpu"
    assert refused == "y is a null pointer: it has to hold 5 elements"
