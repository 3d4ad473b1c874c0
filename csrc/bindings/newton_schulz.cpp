// What comes before the matmuls of newton_schulz for Python.
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/checks.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

using Strides = std::array<int64_t, 3>;

void newton_schulz_normalize(Address g, Address x, int g_dtype, int x_dtype, int64_t b, int64_t r,
                             int64_t c, const Strides& g_strides, bool row_norm, double safety,
                             int threads) {
  const int64_t count = count_of({{"b", b}, {"r", r}, {"c", c}});
  count_of({{"b", b}, {"r", r}});  // squares below, also where c is 0
  check_strides("g_strides", {{b, g_strides[0]}, {r, g_strides[1]}});
  if (g_strides[2] != 1 && c > 1) {
    refuse("g_strides[2]", g_strides[2], "it has to be 1: copy the matrices to rows first");
  }
  if (!(safety > 0 && std::isfinite(safety))) {
    refuse("safety", safety, "it has to be positive and finite");
  }
  check_pointer("g", g, count);
  check_pointer("x", x, count);
  const NewtonSchulzShape shape = {
      b, r, c, g_strides[0], g_strides[1], row_norm, safety, checked_dtype("g_dtype", g_dtype),
      checked_dtype("x_dtype", x_dtype)};
  checked_threads(threads);
  if (count == 0) return;
  std::vector<double> squares(static_cast<size_t>(b * r));
  cpu::kernels().newton_schulz_normalize(shape, pointer<const void>(g), pointer<void>(x),
                                         squares.data(), threads);
}

}  // namespace

void bind_newton_schulz(py::module_& m) {
  using A = py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("newton_schulz_normalize", &newton_schulz_normalize, unlocked, A("g"), A("x"), A("g_dtype"),
        A("x_dtype"), A("b"), A("r"), A("c"), A("g_strides"), A("row_norm"), A("safety"),
        A("threads"));
}

}  // namespace pgolf::bindings
