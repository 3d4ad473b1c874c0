// weight_cast, and with it fake_quant, for Python.
#include "weight_cast.h"

#include "bindings/checks.h"

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
  return {address, stride};
}

int64_t checked_size(int64_t rows, int64_t cols) {
  return count_of({{"rows", rows}, {"cols", cols}});
}

template <typename On>
WeightCastShape checked_shape(Address on, int from, int to, double floor, int64_t multiple,
                              bool full_range, bool clip_mask) {
  if (multiple < 1) refuse("multiple", multiple, "it has to be at least 1");
  const Dtype source = checked_dtype<On>("from", from), target = checked_dtype("to", to);
  const Dtype widest = source == Dtype::fp64 ? Dtype::fp64 : Dtype::fp32;
  if (target != Dtype::bf16 && target != widest) {
    refuse("to", to, "it has to be bf16 or what these weights are computed in");
  }
  return {floor, multiple, full_range, clip_mask, on, source, target};
}

void check_grid(Address on, Address bits) {
  check_pointer("bits", bits, 1);
  check_pointer("on", on, 1);
}

std::vector<CastMatrix> checked_matrices(const std::vector<Matrix>& matrices, Address on) {
  std::vector<CastMatrix> checked;
  checked.reserve(matrices.size());
  int64_t first_row = 0;
  for (const auto& [rows, cols, w, stride, scale, clip_factor, bits, out, step] : matrices) {
    const int64_t count = checked_size(rows, cols);
    if (clip_factor) check_grid(on, bits);
    check_pointer("out", out, count);
    checked.push_back({rows, cols, first_row, checked_rows("w", w, rows, cols, stride),
                       scale, clip_factor, bits, out, step});
    first_row += rows;
  }
  return checked;
}

std::vector<CastGradient> checked_gradients(const std::vector<Gradient>& matrices, Address on,
                                            bool clip_mask) {
  std::vector<CastGradient> checked;
  checked.reserve(matrices.size());
  int64_t first_row = 0;
  for (const auto& [rows, cols, dout, dout_stride, w, w_stride, scale, step, bits, dw, dscale] :
       matrices) {
    const int64_t count = checked_size(rows, cols);
    if (step) check_grid(on, bits);
    check_pointer("dw", dw, count);
    Rows weights = {nullptr, 0};
    if (dscale || (step && clip_mask)) weights = checked_rows("w", w, rows, cols, w_stride);
    checked.push_back({rows, cols, first_row,
                       checked_rows("dout", dout, rows, cols, dout_stride), weights, scale, step,
                       bits, dw, dscale});
    first_row += rows;
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

template <typename On>
void weight_cast(const std::vector<Matrix>& matrices, Address grid_on, int from, int to,
                 double floor, int64_t multiple, bool full_range, On on) {
  const auto shape = checked_shape<On>(grid_on, from, to, floor, multiple, full_range, false);
  const auto checked = checked_matrices(matrices, grid_on);
  if (On::on_cpu) check_values_of_bits(checked);
  launch::weight_cast(on, shape, checked.data(), static_cast<int64_t>(checked.size()));
}

template <typename On>
void weight_cast_backward(const std::vector<Gradient>& matrices, Address grid_on, int from, int to,
                          int64_t multiple, bool full_range, bool clip_mask, On on) {
  const auto shape = checked_shape<On>(grid_on, from, to, 0, multiple, full_range, clip_mask);
  const auto checked = checked_gradients(matrices, grid_on, clip_mask);
  if (On::on_cpu) check_values_of_bits(checked);
  launch::weight_cast_backward(on, shape, checked.data(), static_cast<int64_t>(checked.size()));
}

const Functions functions = {
    {
        PGOLF_BOTH(weight_cast, "matrices on from_dtype to_dtype floor multiple full_range"),
        PGOLF_BOTH(weight_cast_backward,
                   "matrices on from_dtype to_dtype multiple full_range clip_mask"),
    },
    {
        {"int_grid.BITS.0", kMinBits},
        {"int_grid.BITS.4", kMaxBits},
    }};

}  // namespace
}  // namespace pgolf::bindings
