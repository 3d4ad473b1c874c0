// fake_quant for Python.
#include <cmath>

#include "bindings/bindings.h"
#include "bindings/checks.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

FakeQuantShape checked_fake_quant_shape(int dtype, int64_t rows, int64_t cols, int bits,
                                             bool on, double floor, int64_t multiple,
                                             bool full_range) {
  count_of({{"rows", rows}, {"cols", cols}});
  check_bits(bits);
  if (std::isnan(floor)) refuse("floor", floor, "it has to be a number");
  if (multiple < 1) refuse("multiple", multiple, "it has to be at least 1");
  return {rows, cols, bits, on, floor, multiple, full_range, checked_dtype("dtype", dtype)};
}

Rows checked_rows(const std::string& name, Address address, int64_t rows, int64_t cols,
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
  const Rows w_rows = checked_rows("w", w, rows, cols, w_row_stride);
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
  const Rows dout_rows = checked_rows("dout", dout, rows, cols, dout_row_stride);
  const Rows w_rows = checked_rows("w", w, rows, cols, w_row_stride);
  check_pointer("scale", scale, cols ? rows : 0);
  check_pointer("dw", dw, rows * cols);
  cpu::kernels().fake_quant_backward(shape, dout_rows, w_rows, pointer<const void>(scale),
                                     pointer<void>(dw), checked_threads(threads));
}

}  // namespace

void bind_fake_quant(py::module_& m) {
  using A = py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("fake_quant", &fake_quant, unlocked, A("w"), A("clip_factor"), A("out"), A("scale"),
        A("dtype"), A("rows"), A("cols"), A("w_row_stride"), A("bits"), A("on"), A("floor"),
        A("multiple"), A("full_range"), A("threads"));
  m.def("fake_quant_backward", &fake_quant_backward, unlocked, A("dout"), A("w"), A("scale"),
        A("dw"), A("dtype"), A("rows"), A("cols"), A("dout_row_stride"), A("w_row_stride"),
        A("bits"), A("on"), A("multiple"), A("full_range"), A("threads"));
}

}  // namespace pgolf::bindings
