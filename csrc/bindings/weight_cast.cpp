// weight_cast, and with it fake_quant, for Python.
#include <pybind11/stl.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/checks.h"
#include "fake_quant.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

// rows, cols, w, its row stride, scale, clip_factor, bits, out, step
using Matrix = std::tuple<int64_t, int64_t, Address, int64_t, Address, Address, Address, Address,
                          Address>;
// rows, cols, dout, its row stride, w, its row stride, scale, step, bits, dw, dscale
using Gradient = std::tuple<int64_t, int64_t, Address, int64_t, Address, int64_t, Address, Address,
                            Address, Address, Address>;

Rows checked_rows(const std::string& name, Address address, int64_t rows, int64_t cols,
                  int64_t stride) {
  check_pointer(name, address, rows * cols);
  check_strides(name + "_row_stride", {{rows, stride}, {cols, 1}});
  return {pointer<const void>(address), stride};
}

int64_t checked_size(int64_t rows, int64_t cols) {
  return count_of({{"rows", rows}, {"cols", cols}});
}

WeightCastShape checked_shape(Address on, int from, int to, double floor, int64_t multiple,
                              bool full_range, bool clip_mask) {
  if (std::isnan(floor)) refuse("floor", floor, "it has to be a number");
  if (multiple < 1) refuse("multiple", multiple, "it has to be at least 1");
  const Dtype source = checked_dtype("from", from), target = checked_dtype("to", to);
  const Dtype widest = source == Dtype::fp64 ? Dtype::fp64 : Dtype::fp32;
  if (target != Dtype::bf16 && target != widest) {
    refuse("to", to, "it has to be bf16 or what these weights are computed in");
  }
  return {floor, multiple, full_range, clip_mask, pointer<const float>(on), source, target};
}

void check_grid(Address on, Address bits) {
  check_pointer("bits", bits, 1);
  check_pointer("on", on, 1);
}

std::vector<CastMatrix> checked_matrices(const std::vector<Matrix>& matrices, Address on) {
  std::vector<CastMatrix> checked;
  checked.reserve(matrices.size());
  for (const auto& [rows, cols, w, stride, scale, clip_factor, bits, out, step] : matrices) {
    const int64_t count = checked_size(rows, cols);
    if (clip_factor) check_grid(on, bits);
    check_pointer("out", out, count);
    checked.push_back({rows, cols, checked_rows("w", w, rows, cols, stride),
                       pointer<const void>(scale), pointer<const float>(clip_factor),
                       pointer<const float>(bits), pointer<void>(out), pointer<void>(step)});
  }
  return checked;
}

std::vector<CastGradient> checked_gradients(const std::vector<Gradient>& matrices, Address on,
                                            bool clip_mask) {
  std::vector<CastGradient> checked;
  checked.reserve(matrices.size());
  for (const auto& [rows, cols, dout, dout_stride, w, w_stride, scale, step, bits, dw, dscale] :
       matrices) {
    const int64_t count = checked_size(rows, cols);
    if (step) check_grid(on, bits);
    check_pointer("dw", dw, count);
    Rows weights = {nullptr, 0};
    if (dscale || (step && clip_mask)) weights = checked_rows("w", w, rows, cols, w_stride);
    checked.push_back({rows, cols, checked_rows("dout", dout, rows, cols, dout_stride), weights,
                       pointer<const void>(scale), pointer<const void>(step),
                       pointer<const float>(bits), pointer<void>(dw), pointer<void>(dscale)});
  }
  return checked;
}

// On a CPU bits can be read.
template <typename Checked>
void check_values_of_bits(const std::vector<Checked>& matrices) {
  for (const auto& m : matrices) {
    const float bits = m.bits ? *m.bits : kMinBits;
    if (!(bits >= kMinBits && bits <= kMaxBits && bits == static_cast<int>(bits))) {
      refuse("bits", bits, "it has to be a whole number, 4 to 8");
    }
  }
}

void weight_cast(const std::vector<Matrix>& matrices, Address on, int from, int to, double floor,
                 int64_t multiple, bool full_range, int threads) {
  const auto shape = checked_shape(on, from, to, floor, multiple, full_range, false);
  const auto checked = checked_matrices(matrices, on);
  check_values_of_bits(checked);
  const auto count = static_cast<int64_t>(checked.size());
  const py::gil_scoped_release unlocked;
  cpu::kernels().weight_cast(shape, checked.data(), count, checked_threads(threads));
}

void weight_cast_backward(const std::vector<Gradient>& matrices, Address on, int from, int to,
                          int64_t multiple, bool full_range, bool clip_mask, int threads) {
  const auto shape = checked_shape(on, from, to, 0, multiple, full_range, clip_mask);
  const auto checked = checked_gradients(matrices, on, clip_mask);
  check_values_of_bits(checked);
  const auto count = static_cast<int64_t>(checked.size());
  const py::gil_scoped_release unlocked;
  cpu::kernels().weight_cast_backward(shape, checked.data(), count, checked_threads(threads));
}

#if PGOLF_CUDA
void weight_cast_cuda(const std::vector<Matrix>& matrices, Address on, int from, int to,
                      double floor, int64_t multiple, bool full_range, Address stream) {
  checked_cuda_dtype("from", from);
  const auto shape = checked_shape(on, from, to, floor, multiple, full_range, false);
  const auto checked = checked_matrices(matrices, on);
  const auto count = static_cast<int64_t>(checked.size());
  const py::gil_scoped_release unlocked;
  check_launch(cuda::weight_cast(shape, checked.data(), count, pointer<void>(stream)));
}

void weight_cast_backward_cuda(const std::vector<Gradient>& matrices, Address on, int from, int to,
                               int64_t multiple, bool full_range, bool clip_mask,
                               Address stream) {
  checked_cuda_dtype("from", from);
  const auto shape = checked_shape(on, from, to, 0, multiple, full_range, clip_mask);
  const auto checked = checked_gradients(matrices, on, clip_mask);
  const auto count = static_cast<int64_t>(checked.size());
  const py::gil_scoped_release unlocked;
  check_launch(cuda::weight_cast_backward(shape, checked.data(), count, pointer<void>(stream)));
}
#endif

}  // namespace

void bind_weight_cast(py::module_& m) {
  using A = py::arg;
  m.def("weight_cast", &weight_cast, A("matrices"), A("on"), A("from_dtype"), A("to_dtype"),
        A("floor"), A("multiple"), A("full_range"), A("threads"),
        "Of each matrix: rows, cols, w, its row stride, scale, clip_factor, bits, out, step.");
  m.def("weight_cast_backward", &weight_cast_backward, A("matrices"), A("on"), A("from_dtype"),
        A("to_dtype"), A("multiple"), A("full_range"), A("clip_mask"), A("threads"),
        "Of each matrix: rows, cols, dout, its row stride, w, its row stride, scale, step, bits, "
        "dw, dscale.");
#if PGOLF_CUDA
  m.def("weight_cast_cuda", &weight_cast_cuda, A("matrices"), A("on"), A("from_dtype"),
        A("to_dtype"), A("floor"), A("multiple"), A("full_range"), A("stream"));
  m.def("weight_cast_backward_cuda", &weight_cast_backward_cuda, A("matrices"), A("on"),
        A("from_dtype"), A("to_dtype"), A("multiple"), A("full_range"), A("clip_mask"),
        A("stream"));
#endif
}

}  // namespace pgolf::bindings
