// weight_cast: a row of weights, on its integer grid if it has one, times the row's scale, in another
// element type. The formula, for CPU and GPU; F is float or double.
//
//   out    = scale Q(w)            Q: the grid of fake_quant.h, or the identity
//   dw     = scale dout            0 where a code was clipped, if that is asked for
//   dscale = sum over the row of dout Q(w)
#pragma once

#include "fake_quant.h"
#include "host_device.h"
#include "kernels.h"

namespace pgolf {

// What all matrices of one weight cast share.
struct WeightCastShape {
  double floor;
  int64_t multiple;
  bool full_range;
  bool clip_mask;   // no gradient for weights whose code was clipped
  const float* on;  // one number where the weights lie; may be null if no matrix has a grid
  Dtype from, to;   // of w and dw, of out and dout; `to` is bf16 or the type that `from` computes in
};

// One matrix of it. Numbers a row are float, or double for double; out and dw are contiguous.
struct CastMatrix {
  int64_t rows, cols;
  int64_t first_item;  // of all matrices' rows
  Rows w;
  const void* scale;         // (rows,), or null: 1
  const float* clip_factor;  // (rows,), or null: no grid
  const float* bits;         // one number, where there is a grid
  void* out;
  void* step;  // (rows,) of the grid, or null where nobody asks
};

struct CastGradient {
  int64_t rows, cols;
  int64_t first_item;  // of all matrices' rows
  Rows dout, w;       // w may be null where there is neither a scale nor a mask
  const void* scale;  // (rows,), or null: 1
  const void* step;   // (rows,) as the forward pass gave it, or null: no grid
  const float* bits;  // one number, where there is a grid
  void* dw;
  void* dscale;  // (rows,), or null: nobody asks
};

enum class Quantise { no, to_codes, to_multiples };

// What the elements of a row share.
template <typename F>
struct CastRow {
  FakeQuantGrid<F> grid;  // and the row's step on it, unless Quantise::no
  F step, scale;
  bool all_pass;  // whether weights whose code was clipped have a gradient, too
};

// Q(w)
template <Quantise kHow, typename F>
PGOLF_HOST_DEVICE static inline F quantised(F w, const CastRow<F>& row) {
  if constexpr (kHow == Quantise::no) {
    return w;
  } else {
    const F code = fake_quant_code<kHow == Quantise::to_multiples>(w, row.step, row.grid);
    return fake_quant_clamp(code, row.grid) * row.step;
  }
}

template <typename F>
struct CastGradients {
  F dw, dscale;
};

// Of one element; dscale is its share.
template <Quantise kHow, typename F>
PGOLF_HOST_DEVICE static inline CastGradients<F> cast_gradients(F dout, F w,
                                                                const CastRow<F>& row) {
  if constexpr (kHow == Quantise::no) {
    return {row.scale * dout, dout * w};
  } else {
    const F code = fake_quant_code<kHow == Quantise::to_multiples>(w, row.step, row.grid);
    const bool kept = row.all_pass | ((code >= row.grid.least) & (code <= row.grid.qmax));
    return {kept ? row.scale * dout : F(0), dout * (fake_quant_clamp(code, row.grid) * row.step)};
  }
}

}  // namespace pgolf
