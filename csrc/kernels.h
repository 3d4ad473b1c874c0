// What the launchers of launchers.def take, and their declarations. A launcher takes raw pointers,
// sizes and, on a GPU, a stream (cudaStream_t as void*, so that this header needs no CUDA); it checks
// nothing: the bindings have. GPU launchers return nullptr, or the text of the CUDA error.
#pragma once

#include <cstdint>

#include "element.h"
#include "param_update.h"

namespace pgolf {

// The codes by which Python names an element type.
enum class Dtype { fp32 = 0, bf16 = 1, fp64 = 2 };

struct XsaShape {
  int64_t batch, time, heads, groups, size;  // N, T, H, G, d: y is (N, T, H, d), v (N, T, G, d)
  Dtype dtype;
};

// A tensor (N, T, heads, d) with any strides, in elements; elements of a row lie side by side.
struct Heads {
  const void* data;
  int64_t batch_stride, time_stride, head_stride;
};

struct LeakyRelu2Shape {
  int64_t rows, cols;
  double slope;
  const void* rstd;  // (rows,) float, or double for double; or null
  Dtype dtype;
};

struct NewtonSchulzShape {
  int64_t batch, rows, cols;
  int64_t batch_stride, row_stride;  // of g, in elements
  bool row_norm;
  double safety;
  Dtype g_dtype, x_dtype;
};

// A matrix whose rows have any stride, in elements.
struct Rows {
  const void* data;
  int64_t row_stride;
};

// What all matrices of one weight cast share; see weight_cast.h.
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

struct QkRopeShape {
  int64_t batch, time, heads, kv_heads, size;  // N, T, H, G, d: qkv is (N, T, H + 2 G, d)
  int64_t half;                                // r/2 pairs of a head are rotated
  double eps;
  bool norm;
  Dtype dtype;
};

// All contiguous; cos and sin (T, r/2) and gain (H,) are float, or double for double.
struct QkRopeInputs {
  const void *qkv, *cos, *sin, *gain;
};

struct QkRopeOutputs {
  void *q, *k, *v;
};

// Where there is none its data are null.
struct QkRopeGradients {
  Heads dq, dk, dv;
};

struct EmbedSmearShape {
  int64_t batch, time, vocab, width;  // N, T, V, D
  double eps;
  Dtype table_dtype, x_dtype;  // fp64 both or none
};

// Contiguous. Null where there is none: bigram (N, T, D) of x's type, scale (1,) (then it is 1) and
// gate (D,) in float, or double for double, starts (N, T).
struct EmbedSmearInputs {
  const int64_t* ids;  // (N, T)
  const void *table, *bigram, *scale, *gate;
  const bool* starts;
};

// Tokens sorted by id, stable, and where each id begins in that order: (V + 1,).
struct TokenOrder {
  const int64_t *order, *bounds;
};

// dbigram is null where there is no bigram. sums (D + 1,): of the gate's columns and of the scale.
struct EmbedSmearGradients {
  void *dtable, *dbigram, *sums;
};

// Room for smear_chunks x 2 x D and for smear_blocks x (D + 1) numbers, in the type of sums.
struct EmbedSmearScratch {
  void *pieces, *partials;
};

struct ResidualNormShape {
  int64_t rows, width;  // T, D
  double scale, eps;
  Dtype dtype;
};

// Contiguous, null where there is none: x, branch, skip and x0 (T, D), and in float, or double for
// double, branch_scale and skip_weight (D,) and mix (2, D). For the gradient x is total, or null
// where the gradient of mix is not wanted; branch and skip are there if their factors are.
struct ResidualNormInputs {
  const void *x, *branch, *branch_scale, *skip, *skip_weight, *x0, *mix;
};

// (T, D); total and x_in are null where they are not wanted. rstd: (T,) float, or double for double.
struct ResidualNormOutputs {
  void *total, *x_in, *h, *rstd;
};

// What the gradient starts from: what the forward pass made, and gradients, null where there is none.
struct ResidualNormUpstream {
  const void *x_in, *rstd, *d_total, *d_x_in, *dh;
};

// (T, D), null where there is none: dbranch and dskip only where they differ from dx. parameters
// (P, D) and partials (residual_blocks(T), P, D) are float, or double for double; see
// residual_norm.h for what P is.
struct ResidualNormGradients {
  void *dx, *dbranch, *dskip, *dx0, *parameters, *partials;
};

struct LossShape {
  int64_t rows, cols;
  double cap, factor;
  bool gradient;  // otherwise z is only read
  Dtype dtype;    // of z
};

// Tensors of passes over many of them (multi_tensor.h); contiguous, fp32 or bf16.
struct GradientTensor {
  const void* data;
  int64_t count;
  int64_t first_item;  // chunks
  Dtype dtype;
};

struct MomentumMatrix {
  const void* grad;
  void* momentum;
  void* x;  // the direction
  int64_t rows, cols;
  int64_t first_row;   // of all matrices' rows
  int64_t first_item;  // rows, or blocks of them
  Dtype grad_dtype, momentum_dtype;
};

struct MuonMomentumShape {
  int64_t matrices;
  int64_t rows;  // of all of them
  bool nesterov, row_norm;
  double safety;
  Dtype x_dtype;
};

struct UpdateTensor {
  void* param;
  const void* source;         // AdamW: the gradient; Muon: the orthogonalised direction
  void *exp_avg, *exp_avg_sq;  // AdamW: the moments; Muon: null
  float* average;              // or null
  bf16* copy;                  // of the new parameter, or null
  int64_t count;
  int64_t first_item;  // chunks
  float scale;         // Muon: of the direction
  int32_t group;       // row of the scalars
  Dtype param_dtype, source_dtype, state_dtype;
};

namespace cpu {

constexpr int kMaxHeadsPerGroup = 256;

// The launchers, compiled for one instruction set.
struct Kernels {
#define PGOLF_LAUNCHER(name, ...) void (*name)(__VA_ARGS__, int threads);
#include "launchers.def"
};

#ifdef PGOLF_ISA  // which a file of csrc/cpu is being compiled for
namespace PGOLF_ISA {
#define PGOLF_LAUNCHER(name, ...) void name(__VA_ARGS__, int threads);
#include "launchers.def"
}  // namespace PGOLF_ISA
#endif

// The instruction set of this process ("avx512", "avx2" or "plain") and its kernels: the best that
// the CPU has, or the one that the environment variable PGOLF_CPU_ISA names; read once. Throws
// std::invalid_argument where it names one that is unknown or that the CPU does not have.
const char* isa();
const Kernels& kernels();

}  // namespace cpu

namespace cuda {

constexpr int64_t kMaxXsaSize = 256;

#define PGOLF_LAUNCHER(name, ...) const char* name(__VA_ARGS__, void* stream);
#define PGOLF_CPU_LAUNCHER(...)
#include "launchers.def"

}  // namespace cuda

}  // namespace pgolf
