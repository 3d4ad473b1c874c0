"""The mutator of C++ sources on code of our own; the kernels' turn is test_kernels.py."""

import pytest

from .cpp import functions, mutants, tokens

SOURCE = """
#include <a.h>  // not + code
namespace n {
constexpr int kSize[] = {1, 2};
int host(int a) { return a + 1; }
template <typename T, int kN>
struct Row {
  T at[kN];
  __device__ T sum() const { return at[0] + at[1]; }
  T size() const { return kN + 1; }
};
template <typename T>
__global__ void __launch_bounds__(kThreads)
    kernel(const T* x, int n) {
  __shared__ float held[kThreads];
  // all + here
  const auto add = [&](int i) { return x[i] - 2; };
  if (n > 0) held[0] = add(n);
  __syncthreads();
}
}
"""


def body(*lines: str) -> list[str]:
    """Changes of a device function with these lines."""
    source = "__device__ void f() {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"
    return [m.change for m in mutants("file", source, {"f"})]


def test_device_functions_are_found() -> None:
    found = functions(tokens(SOURCE))
    assert [(f.name, f.is_kernel) for f in found] == [("sum", False), ("kernel", True)]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("return a - b;", ["a + b"]),
        ("return a < b;", ["a <= b", "a >= b"]),
        ("return a && !b;", ["a || !b", "a && b"]),
        ("return f<T, kN>(-a);", ["f<T, kN>(a)"]),
        ("return static_cast<const T*>(a);", []),
        ("return x[i];", ["x[i + 1]"]),
        ("return 1;", ["2", "0"]),
        ("return 0xFFu;", ["0x7fu"]),
        ("return 0.5f;", ["1.0f"]),
        ("return fmaxf(a, b);", ["fminf(a, b)"]),
        ("return threadIdx.x;", ["blockIdx.x"]),
        ("static_assert(a == 8);", []),
        ("__shared__ float held[8];", []),
    ],
)
def test_changes_of_an_expression(line: str, wanted: list[str]) -> None:
    before = line.rstrip(";")
    assert body(line) == [f"{before} => return {new}" for new in wanted]


def test_statements_are_dropped_where_names_stay_known() -> None:
    assert body("__syncthreads();") == ["__syncthreads() => nothing"]
    assert body("a += b;")[0] == "a += b => nothing"
    assert body("T* const a = b;") == body("const int a = b;") == body("int a = b;") == []
    assert "if (a) g() => if (a)" in body("if (a) g();")


def test_conditions_are_turned_round() -> None:
    assert body("if (a) return;") == ["if (a) return => if (!(a)) return"]


def test_masks_and_widths_of_shuffles() -> None:
    call = "return __shfl_xor_sync(mask, a, step, kLanes)"
    assert body(f"{call};") == [
        f"{call} => {new}"
        for new in (
            "return __shfl_down_sync(mask, a, step, kLanes)",
            "return __shfl_xor_sync(~0u, a, step, kLanes)",
            "return __shfl_xor_sync(1u, a, step, kLanes)",
            "return __shfl_xor_sync(mask, a, step)",
        )
    ]


def test_each_mutant_is_the_source_with_one_change() -> None:
    found = mutants("file", SOURCE, {"kernel", "sum"})
    assert len({m.name for m in found}) == len({m.source for m in found}) == len(found) > 10
    for mutant in found:
        lines = zip(SOURCE.splitlines(), mutant.source.splitlines(), strict=True)
        different = [i for i, (old, new) in enumerate(lines, 1) if old != new]
        assert different == [mutant.line]
    assert not any("here" in m.change or "host" in m.name for m in found)


def test_equal_changes_in_two_places_have_two_names() -> None:
    assert body("g(a + b);", "g(a + b);").count("g(a + b) => g(a - b) (again)") == 1
