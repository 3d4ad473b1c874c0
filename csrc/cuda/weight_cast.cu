// weight_cast and fake_quant on a GPU: the formula of weight_cast.h. A warp takes a row, of whichever
// matrix it lies in; up to kPiece columns stay in registers between the search for the largest
// magnitude and the cast, longer rows are read again.
#include "weight_cast.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/multi_tensor.cuh"

namespace pgolf::cuda {
namespace {

constexpr int kPiece = 1536;        // columns of a row in registers at once
constexpr int kGradientPiece = 512;  // nothing has to wait there
constexpr int32_t kWithoutSign = 0x7FFFFFFF;

// The matrices of a launch, whose items are rows; more would only make its arguments longer.
template <typename Matrix>
using MatrixList = TensorList<Matrix, 96>;

// Whether the grid has no such bits: then it is on, and all that comes out is NaN.
template <typename F>
__device__ inline bool unknown(const FakeQuantGrid<F>& grid) {
  return grid.qmax != grid.qmax;
}

template <typename F>
__device__ inline CastRow<F> cast_row(const WeightCastShape& shape, const float* bits,
                                      const void* scale, int64_t row) {
  CastRow<F> cast = {};
  cast.scale = scale ? static_cast<const F*>(scale)[row] : F(1);
  cast.all_pass = !shape.clip_mask;
  if (bits) {
    cast.grid = fake_quant_grid<F>(*bits, shape.floor, shape.multiple, shape.full_range);
    if (unknown(cast.grid)) {
      cast.scale = cast.grid.qmax;
      cast.all_pass = true;
    }
  }
  return cast;
}

// As integers, magnitudes are ordered as they are as numbers, with NaN on top.
template <typename Piece>
__device__ inline int32_t largest_magnitude(const Piece& piece) {
  int32_t largest = 0;
#pragma unroll
  for (int i = 0; i < Piece::kCount; ++i) {
    const int32_t magnitude = bit_cast<int32_t>(piece.at[i]) & kWithoutSign;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

template <Quantise kHow, int kVector, typename To, typename Piece>
__device__ inline void cast_piece(const Piece& piece, const CastRow<float>& row, To* to, int size) {
#pragma unroll
  for (int first = 0; first < Piece::kCount; first += kVector) {
    const int place = Piece::place(first / kVector);
    if (place >= size) continue;
    Vector<To, kVector> rounded;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      rounded.at[i] = narrow<To>(row.scale * quantised<kHow>(piece.at[first + i], row));
    }
    *reinterpret_cast<Vector<To, kVector>*>(to + place) = rounded;
  }
}

__device__ inline int piece_size(int64_t left, int most) {
  return left < most ? static_cast<int>(left) : most;
}

template <Quantise kHow, typename T, typename To, int kVector>
__global__ void __launch_bounds__(kThreads)
    weight_cast_rows(WeightCastShape shape, MatrixList<CastMatrix> list) {
  using Piece = Row<T, kVector, kWarp, kPiece / (kWarp * kVector)>;
  const bool on = shape.on && *shape.on > 0;
  for (int64_t item = list.first_item + first_item<kWarp>(); item < list.end_item;
       item += item_step<kWarp>()) {
    const int i = tensor_of(list.tensors, list.count, item);
    const CastMatrix& m = list.tensors[i];
    const int64_t r = item - m.first_item;
    const T* w = static_cast<const T*>(m.w.data) + r * m.w.row_stride;
    To* out = static_cast<To*>(m.out) + r * m.cols;

    CastRow<float> row = cast_row<float>(shape, m.clip_factor ? m.bits : nullptr, m.scale, r);
    const bool quantise = m.clip_factor && (on || unknown(row.grid));
    Piece piece = Piece::load(w, piece_size(m.cols, kPiece));
    if (m.clip_factor) {
      int32_t largest = largest_magnitude(piece);
      for (int64_t first = kPiece; first < m.cols; first += kPiece) {
        const Piece more = Piece::load(w + first, piece_size(m.cols - first, kPiece));
        const int32_t magnitude = largest_magnitude(more);
        largest = magnitude > largest ? magnitude : largest;
      }
      const float amax = bit_cast<float>(group_max<kWarp>(largest));
      row.step = fake_quant_step(amax, m.clip_factor[r], row.grid);
      if (m.step && this_lane() == 0) static_cast<float*>(m.step)[r] = row.step;
    }
    for (int64_t first = 0;;) {
      const int size = piece_size(m.cols - first, kPiece);
      if (quantise) {
        cast_piece<kHow, kVector>(piece, row, out + first, size);
      } else {
        cast_piece<Quantise::no, kVector>(piece, row, out + first, size);
      }
      first += kPiece;
      if (first >= m.cols) break;
      piece = Piece::load(w + first, piece_size(m.cols - first, kPiece));
    }
  }
}

template <Quantise kHow, int kVector, typename T, typename Douts, typename Weights>
__device__ inline float piece_gradients(const Douts& douts, const Weights& ws,
                                        const CastRow<float>& row, T* dw, int size) {
  float sum = 0;
#pragma unroll
  for (int first = 0; first < Douts::kCount; first += kVector) {
    const int place = Douts::place(first / kVector);
    if (place >= size) continue;
    Vector<T, kVector> rounded;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const auto d = cast_gradients<kHow>(douts.at[first + i], ws.at[first + i], row);
      rounded.at[i] = narrow<T>(d.dw);
      sum += d.dscale;
    }
    *reinterpret_cast<Vector<T, kVector>*>(dw + place) = rounded;
  }
  return sum;
}

template <Quantise kHow, typename T, typename To, int kVector>
__global__ void __launch_bounds__(kThreads)
    weight_cast_backward_rows(WeightCastShape shape, MatrixList<CastGradient> list) {
  constexpr int kChunks = kGradientPiece / (kWarp * kVector);
  using Douts = Row<To, kVector, kWarp, kChunks>;
  using Weights = Row<T, kVector, kWarp, kChunks>;
  const bool on = shape.on && *shape.on > 0;
  for (int64_t item = list.first_item + first_item<kWarp>(); item < list.end_item;
       item += item_step<kWarp>()) {
    const int i = tensor_of(list.tensors, list.count, item);
    const CastGradient& m = list.tensors[i];
    const int64_t r = item - m.first_item;
    const To* dout = static_cast<const To*>(m.dout.data) + r * m.dout.row_stride;
    const T* w = static_cast<const T*>(m.w.data) + r * m.w.row_stride;
    T* dw = static_cast<T*>(m.dw) + r * m.cols;

    CastRow<float> row = cast_row<float>(shape, m.step ? m.bits : nullptr, m.scale, r);
    if (m.step) row.step = static_cast<const float*>(m.step)[r];
    const bool quantise = m.step && (on || unknown(row.grid));
    const bool reads_w = m.dscale || (quantise && shape.clip_mask);
    float sum = 0;
    for (int64_t first = 0; first < m.cols; first += kGradientPiece) {
      const int size = piece_size(m.cols - first, kGradientPiece);
      const Douts douts = Douts::load(dout + first, size);
      const Weights ws = reads_w ? Weights::load(w + first, size) : Weights::zero();
      sum += quantise ? piece_gradients<kHow, kVector>(douts, ws, row, dw + first, size)
                      : piece_gradients<Quantise::no, kVector>(douts, ws, row, dw + first, size);
    }
    sum = group_sum<kWarp>(sum);
    if (m.dscale && this_lane() == 0) static_cast<float*>(m.dscale)[r] = sum;
  }
}

// body(T{}, To{}) for the element types of the weights and of what they are cast to.
template <typename Body>
const char* with_types(const WeightCastShape& shape, const Body& body) {
  return with_element(shape.from, [&](auto from) {
    return with_element(shape.to, [&](auto to) { return body(from, to); });
  });
}

template <typename T>
bool aligned_rows(Rows x) {
  return aligned({x.data}, {x.row_stride * int64_t{sizeof(T)}});
}
template <typename T, typename To>
bool aligned_matrix(const CastMatrix& m) {
  return aligned_rows<T>(m.w) && aligned_rows<To>({m.out, m.cols});
}
template <typename T, typename To>
bool aligned_matrix(const CastGradient& m) {
  return aligned_rows<To>(m.dout) && aligned_rows<T>(m.w) && aligned_rows<T>({m.dw, m.cols});
}

// Calls start(list, whether 16 bytes can be moved at a time) for lists of all matrices.
template <typename T, typename To, typename Matrix, typename Start>
const char* each_list(const Matrix* matrices, int64_t count, const Start& start) {
  if (count == 0) return nullptr;
  const Matrix& last = matrices[count - 1];
  return for_each_list<MatrixList<Matrix>>(
      matrices, static_cast<int>(count), last.first_item + last.rows, [&](const auto& list) {
        const bool vectors = std::all_of(
            list.tensors, list.tensors + list.count,
            [](const Matrix& m) { return m.rows == 0 || aligned_matrix<T, To>(m); });
        return start(list, vectors);
      });
}

// Elements that a lane moves at once: 16 bytes of the wider type.
template <typename T, typename To>
constexpr int vector_of() {
  return kAccessBytes / static_cast<int>(std::max(sizeof(T), sizeof(To)));
}

template <typename Matrix, typename Kernel>
const char* start_rows(Kernel kernel, const WeightCastShape& shape, const MatrixList<Matrix>& list,
                       void* stream) {
  const int64_t rows = list.end_item - list.first_item;
  return launch(kernel, stepping_blocks(rows, kThreads / kWarp), kThreads, stream, shape, list);
}

template <Quantise kHow, typename T, typename To>
const char* start_cast(const WeightCastShape& shape, const CastMatrix* matrices, int64_t count,
                       void* stream) {
  return each_list<T, To>(matrices, count, [&](const auto& list, bool vectors) {
    constexpr int kVector = vector_of<T, To>();
    return start_rows(vectors ? weight_cast_rows<kHow, T, To, kVector>
                              : weight_cast_rows<kHow, T, To, 1>,
                      shape, list, stream);
  });
}

template <Quantise kHow, typename T, typename To>
const char* start_gradients(const WeightCastShape& shape, const CastGradient* matrices,
                            int64_t count, void* stream) {
  return each_list<T, To>(matrices, count, [&](const auto& list, bool vectors) {
    constexpr int kVector = vector_of<T, To>();
    return start_rows(vectors ? weight_cast_backward_rows<kHow, T, To, kVector>
                              : weight_cast_backward_rows<kHow, T, To, 1>,
                      shape, list, stream);
  });
}

}  // namespace

const char* weight_cast(const WeightCastShape& shape, const CastMatrix* matrices, int64_t count,
                        void* stream) {
  return with_types(shape, [&](auto from, auto to) {
    using T = decltype(from);
    using To = decltype(to);
    return shape.multiple == 1
               ? start_cast<Quantise::to_codes, T, To>(shape, matrices, count, stream)
               : start_cast<Quantise::to_multiples, T, To>(shape, matrices, count, stream);
  });
}

const char* weight_cast_backward(const WeightCastShape& shape, const CastGradient* matrices,
                                 int64_t count, void* stream) {
  return with_types(shape, [&](auto from, auto to) {
    using T = decltype(from);
    using To = decltype(to);
    return shape.multiple == 1
               ? start_gradients<Quantise::to_codes, T, To>(shape, matrices, count, stream)
               : start_gradients<Quantise::to_multiples, T, To>(shape, matrices, count, stream);
  });
}

}  // namespace pgolf::cuda
