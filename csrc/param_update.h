// The arithmetic of one optimiser step, for CPU and GPU, in float whatever the tensors hold. The
// numbers that change from step to step come from memory, so that a CUDA graph can hold the step.
#pragma once

#include <cmath>

#include "host_device.h"
#include "kernels.h"
#include "multi_tensor.h"

namespace pgolf {

// What param_update and muon_momentum read for a group of parameters: a row of their `scalars`.
// In this order, which `COLUMNS` in pgolf/ops/multi_tensor.py repeats:
//   lr, weight_decay
//   momentum      Muon's
//   rate1, rate2  AdamW: 1 - beta1, 1 - beta2
//   bias1, bias2  AdamW: 1 - beta1^step, 1 - beta2^step
//   eps           AdamW's
//   average_rate  of the moving average, 1 - its decay; 0: it is left alone
//   max_norm      of all gradients together; infinity: no limit
#define PGOLF_UPDATE_SCALARS(F)                                                     \
  F(lr) F(weight_decay) F(momentum) F(rate1) F(rate2) F(bias1) F(bias2) F(eps)      \
  F(average_rate) F(max_norm)
struct UpdateScalars {
#define PGOLF_SCALAR(name) float name;
  PGOLF_UPDATE_SCALARS(PGOLF_SCALAR)
#undef PGOLF_SCALAR
};

struct MomentumMatrix {
  const void* grad;
  void* momentum;
  void* x;  // the direction
  int64_t rows, cols;
  int64_t first_item;  // of all matrices' rows
  Dtype grad_dtype, momentum_dtype;
};

struct MuonMomentumShape {
  int64_t matrices;
  int64_t rows;  // of all of them
  bool nesterov, row_norm;
  Dtype x_dtype;
};

struct UpdateTensor {
  void* param;
  const void* source;         // AdamW: the gradient; Muon: the orthogonalised direction
  void *exp_avg, *exp_avg_sq;  // AdamW: the moments; Muon: null
  float* average;              // or null
  int64_t count;
  int64_t first_item;  // chunks
  float scale;         // Muon: of the direction
  int32_t group;       // row of the scalars
  Dtype param_dtype, source_dtype, state_dtype;
};

// As torch.nn.utils.clip_grad_norm_ has it; a NaN stays one.
PGOLF_HOST_DEVICE static inline float clip_factor(float max_norm, float norm) {
  const float factor = max_norm / (norm + 1e-6f);
  return factor > 1.0f ? 1.0f : factor;
}

// What is the same for all parameters of a group.
struct AdamWStep {
  float clip, decay, rate1, rate2, size, root, eps;
};

PGOLF_HOST_DEVICE static inline AdamWStep adamw_step(const UpdateScalars& s, float norm) {
  return {clip_factor(s.max_norm, norm), s.lr * s.weight_decay, s.rate1, s.rate2,
          s.lr / s.bias1, 1.0f / std::sqrt(s.bias2), s.eps};
}

// One parameter with its gradient and moments (torch.optim.AdamW). In this order, each operation
// rounded: the clipped gradient; the decayed parameter; m + rate1 (g - m); v + rate2 (g g - v);
// sqrt(v) root + eps; size m divided by that, taken from the parameter.
PGOLF_HOST_DEVICE static inline void adamw_update(const AdamWStep& s, float grad, float& param,
                                                  float& m, float& v) {
  const float g = grad * s.clip;
  const float decayed = param - s.decay * param;
  m = m + s.rate1 * (g - m);
  v = v + s.rate2 * (g * g - v);
  const float divisor = std::sqrt(v) * s.root + s.eps;
  param = decayed - s.size * m / divisor;
}

struct MuonStep {
  float decay, size;
};

PGOLF_HOST_DEVICE static inline MuonStep muon_step(const UpdateScalars& s, float scale) {
  return {s.lr * s.weight_decay, s.lr * scale};
}

// One parameter and its orthogonalised direction: the decayed parameter, minus size x.
PGOLF_HOST_DEVICE static inline float muon_update(const MuonStep& s, float param, float x) {
  return (param - s.decay * param) - s.size * x;
}

// What is the same for all matrices. Momenta are stored only where the norm is finite.
struct MomentumStep {
  float clip, momentum;
  bool stores;
};

PGOLF_HOST_DEVICE static inline MomentumStep momentum_step(const UpdateScalars& s, float norm) {
  return {clip_factor(s.max_norm, norm), s.momentum, is_finite(norm)};
}

// Nesterov's direction, or the momentum itself, after the gradient went into the momentum.
PGOLF_HOST_DEVICE static inline float muon_direction(const MomentumStep& s, float grad,
                                                     bool nesterov, float& buffer) {
  const float g = grad * s.clip;
  buffer = s.momentum * buffer + g;
  return nesterov ? g + s.momentum * buffer : buffer;
}

// The average, moved towards the new parameter; at rate 1 it becomes the parameter, whatever it was.
PGOLF_HOST_DEVICE static inline float moved_average(float average, float param, float rate) {
  return rate == 1.0f ? param : average + rate * (param - average);
}

}  // namespace pgolf
