// What comes before the matmuls of newton_schulz for Python.
#include "bindings/checks.h"
#include "newton_schulz.h"

namespace pgolf::bindings {
namespace {

using Strides = std::array<int64_t, 3>;

void newton_schulz_normalize(Address g, Address x, int g_dtype, int x_dtype, int64_t b, int64_t r,
                             int64_t c, const Strides& g_strides, bool row_norm, double safety,
                             Threads on) {
  const int64_t count = count_of({{"b", b}, {"r", r}, {"c", c}});
  count_of({{"b", b}, {"r", r}});  // squares below, also where c is 0
  check_strides("g_strides", {{b, g_strides[0]}, {r, g_strides[1]}});
  if (g_strides[2] != 1 && c > 1) {
    refuse("g_strides[2]", g_strides[2], "it has to be 1: copy the matrices to rows first");
  }
  check_pointer("g", g, count);
  check_pointer("x", x, count);
  const NewtonSchulzShape shape = {
      b, r, c, g_strides[0], g_strides[1], row_norm, safety, checked_dtype("g_dtype", g_dtype),
      checked_dtype("x_dtype", x_dtype)};
  if (count == 0) return;
  std::vector<double> squares(static_cast<size_t>(b * r));
  launch::newton_schulz_normalize(on, shape, g, x,
                                         squares.data());
}

const Functions functions = {
    PGOLF_CPU(newton_schulz_normalize, "g x g_dtype x_dtype b r c g_strides row_norm safety"),
};

}  // namespace
}  // namespace pgolf::bindings
