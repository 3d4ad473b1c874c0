// The CPU kernels xsa, leaky_relu2, newton_schulz_normalize and fake_quant for Python.
#include "bindings/cpu.h"

#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <vector>

#include "bindings/checks.h"
#include "leaky_relu2.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

using Strides = std::array<int64_t, 3>;

// ---- xsa

cpu::XsaShape checked_xsa_shape(int dtype, int64_t n, int64_t t, int64_t h, int64_t g, int64_t d) {
  const cpu::XsaShape shape = {n, t, h, g, d, checked_dtype("dtype", dtype)};
  count_of({{"h", h}, {"n", n}, {"t", t}, {"d", d}});
  count_of({{"g", g}, {"n", n}, {"t", t}, {"d", d}});
  if (g == 0 ? h != 0 : h % g != 0) {
    refuse("h", h, "it has to be a multiple of g, which is " + std::to_string(g));
  }
  if (g > 0 && h / g > cpu::kMaxHeadsPerGroup) {
    refuse("h", h, "at most " + std::to_string(cpu::kMaxHeadsPerGroup) +
                       " query heads may share a value head, and g is " + std::to_string(g));
  }
  return shape;
}

cpu::Heads checked_heads(const std::string& name, const cpu::XsaShape& shape, int64_t heads,
                         Address address, const Strides& strides) {
  check_pointer(name, address, shape.batch * shape.time * heads * shape.size);
  check_strides(name + "_strides", {{shape.batch, strides[0]},
                                    {shape.time, strides[1]},
                                    {heads, strides[2]}});
  return {pointer<const void>(address), strides[0], strides[1], strides[2]};
}

void check_heads_output(const std::string& name, const cpu::XsaShape& shape, int64_t heads,
                        Address address) {
  check_pointer(name, address, shape.batch * shape.time * heads * shape.size);
}

void xsa(Address y, Address v, Address z, int dtype, int64_t n, int64_t t, int64_t h, int64_t g,
         int64_t d, const Strides& y_strides, const Strides& v_strides, int threads) {
  const cpu::XsaShape shape = checked_xsa_shape(dtype, n, t, h, g, d);
  const cpu::Heads y_heads = checked_heads("y", shape, h, y, y_strides);
  const cpu::Heads v_heads = checked_heads("v", shape, g, v, v_strides);
  check_heads_output("z", shape, h, z);
  cpu::kernels().xsa(shape, y_heads, v_heads, pointer<void>(z), checked_threads(threads));
}

void xsa_backward(Address dz, Address y, Address v, Address dy, Address dv, int dtype, int64_t n,
                  int64_t t, int64_t h, int64_t g, int64_t d, const Strides& dz_strides,
                  const Strides& y_strides, const Strides& v_strides, int threads) {
  const cpu::XsaShape shape = checked_xsa_shape(dtype, n, t, h, g, d);
  const cpu::Heads dz_heads = checked_heads("dz", shape, h, dz, dz_strides);
  const cpu::Heads y_heads = checked_heads("y", shape, h, y, y_strides);
  const cpu::Heads v_heads = checked_heads("v", shape, g, v, v_strides);
  check_heads_output("dy", shape, h, dy);
  check_heads_output("dv", shape, g, dv);
  cpu::kernels().xsa_backward(shape, dz_heads, y_heads, v_heads, pointer<void>(dy),
                              pointer<void>(dv), checked_threads(threads));
}

// ---- leaky_relu2

cpu::LeakyRelu2Shape checked_leaky_relu2_shape(Address rstd, int dtype, int64_t rows, int64_t cols,
                                               double slope) {
  count_of({{"rows", rows}, {"cols", cols}});
  if (!(slope >= 0 && slope <= 1)) refuse("slope", slope, "it has to be between 0 and 1");
  return {rows, cols, slope, pointer<const void>(rstd), checked_dtype("dtype", dtype)};
}

void check_leaky_relu2_buffers(std::initializer_list<std::pair<const char*, Address>> buffers,
                               Address bits, int64_t rows, int64_t cols) {
  for (const auto& [name, address] : buffers) check_pointer(name, address, rows * cols);
  check_pointer("bits", bits, rows * sign_words(cols));
}

void leaky_relu2(Address pre, Address post, Address bits, Address rstd, int dtype, int64_t rows,
                 int64_t cols, double slope, int threads) {
  const auto shape = checked_leaky_relu2_shape(rstd, dtype, rows, cols, slope);
  check_leaky_relu2_buffers({{"pre", pre}, {"post", post}}, bits, rows, cols);
  cpu::kernels().leaky_relu2(shape, pointer<const void>(pre), pointer<void>(post),
                             pointer<uint32_t>(bits), checked_threads(threads));
}

void leaky_relu2_backward(Address dpost, Address post, Address bits, Address rstd, Address dpre,
                          int dtype, int64_t rows, int64_t cols, double slope, int threads) {
  const auto shape = checked_leaky_relu2_shape(rstd, dtype, rows, cols, slope);
  check_leaky_relu2_buffers({{"dpost", dpost}, {"post", post}, {"dpre", dpre}}, bits, rows, cols);
  cpu::kernels().leaky_relu2_backward(shape, pointer<const void>(dpost), pointer<const void>(post),
                                      pointer<const uint32_t>(bits), pointer<void>(dpre),
                                      checked_threads(threads));
}

// ---- newton_schulz

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
  const cpu::NewtonSchulzShape shape = {
      b, r, c, g_strides[0], g_strides[1], row_norm, safety, checked_dtype("g_dtype", g_dtype),
      checked_dtype("x_dtype", x_dtype)};
  checked_threads(threads);
  if (count == 0) return;
  std::vector<double> squares(static_cast<size_t>(b * r));
  cpu::kernels().newton_schulz_normalize(shape, pointer<const void>(g), pointer<void>(x),
                                         squares.data(), threads);
}

// ---- fake_quant

cpu::FakeQuantShape checked_fake_quant_shape(int dtype, int64_t rows, int64_t cols, int bits,
                                             bool on, double floor, int64_t multiple,
                                             bool full_range) {
  count_of({{"rows", rows}, {"cols", cols}});
  check_bits(bits);
  if (std::isnan(floor)) refuse("floor", floor, "it has to be a number");
  if (multiple < 1) refuse("multiple", multiple, "it has to be at least 1");
  return {rows, cols, bits, on, floor, multiple, full_range, checked_dtype("dtype", dtype)};
}

cpu::Rows checked_rows(const std::string& name, Address address, int64_t rows, int64_t cols,
                       int64_t stride) {
  check_pointer(name, address, rows * cols);
  check_strides(name + "_row_stride", {{rows, stride}, {cols, 1}});
  return {pointer<const void>(address), stride};
}

void fake_quant(Address w, Address clip_factor, Address out, Address scale, int dtype, int64_t rows,
                int64_t cols, int64_t w_row_stride, int bits, bool on, double floor,
                int64_t multiple, bool full_range, int threads) {
  const auto shape =
      checked_fake_quant_shape(dtype, rows, cols, bits, on, floor, multiple, full_range);
  const cpu::Rows w_rows = checked_rows("w", w, rows, cols, w_row_stride);
  const int64_t scales = cols ? rows : 0;
  check_pointer("clip_factor", clip_factor, scales);
  check_pointer("scale", scale, scales);
  check_pointer("out", out, rows * cols);
  cpu::kernels().fake_quant(shape, w_rows, pointer<const float>(clip_factor), pointer<void>(out),
                            pointer<void>(scale), checked_threads(threads));
}

void fake_quant_backward(Address dout, Address w, Address scale, Address dw, int dtype,
                         int64_t rows, int64_t cols, int64_t dout_row_stride, int64_t w_row_stride,
                         int bits, bool on, int64_t multiple, bool full_range, int threads) {
  const auto shape =
      checked_fake_quant_shape(dtype, rows, cols, bits, on, 0, multiple, full_range);
  const cpu::Rows dout_rows = checked_rows("dout", dout, rows, cols, dout_row_stride);
  const cpu::Rows w_rows = checked_rows("w", w, rows, cols, w_row_stride);
  check_pointer("scale", scale, cols ? rows : 0);
  check_pointer("dw", dw, rows * cols);
  cpu::kernels().fake_quant_backward(shape, dout_rows, w_rows, pointer<const void>(scale),
                                     pointer<void>(dw), checked_threads(threads));
}

}  // namespace

void bind_cpu(py::module_& m) {
  using A = py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("cpu_isa", &cpu::isa, "The instruction set of the CPU kernels in this process.");
  m.def("xsa", &xsa, unlocked, A("y"), A("v"), A("z"), A("dtype"), A("n"), A("t"), A("h"), A("g"),
        A("d"), A("y_strides"), A("v_strides"), A("threads"));
  m.def("xsa_backward", &xsa_backward, unlocked, A("dz"), A("y"), A("v"), A("dy"), A("dv"),
        A("dtype"), A("n"), A("t"), A("h"), A("g"), A("d"), A("dz_strides"), A("y_strides"),
        A("v_strides"), A("threads"));
  m.def("leaky_relu2", &leaky_relu2, unlocked, A("pre"), A("post"), A("bits"), A("rstd"),
        A("dtype"), A("rows"), A("cols"), A("slope"), A("threads"));
  m.def("leaky_relu2_backward", &leaky_relu2_backward, unlocked, A("dpost"), A("post"), A("bits"),
        A("rstd"), A("dpre"), A("dtype"), A("rows"), A("cols"), A("slope"), A("threads"));
  m.def("newton_schulz_normalize", &newton_schulz_normalize, unlocked, A("g"), A("x"), A("g_dtype"),
        A("x_dtype"), A("b"), A("r"), A("c"), A("g_strides"), A("row_norm"), A("safety"),
        A("threads"));
  m.def("fake_quant", &fake_quant, unlocked, A("w"), A("clip_factor"), A("out"), A("scale"),
        A("dtype"), A("rows"), A("cols"), A("w_row_stride"), A("bits"), A("on"), A("floor"),
        A("multiple"), A("full_range"), A("threads"));
  m.def("fake_quant_backward", &fake_quant_backward, unlocked, A("dout"), A("w"), A("scale"),
        A("dw"), A("dtype"), A("rows"), A("cols"), A("dout_row_stride"), A("w_row_stride"),
        A("bits"), A("on"), A("multiple"), A("full_range"), A("threads"));
}

}  // namespace pgolf::bindings
