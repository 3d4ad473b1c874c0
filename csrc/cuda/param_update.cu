// One optimiser step of all parameters on a GPU: a block takes a chunk of a tensor, and each number
// is read once and written once.
#include "cuda/multi_tensor.cuh"
#include "param_update.h"

namespace pgolf::cuda {
namespace {

struct Steps {
  AdamWStep adamw;
  MuonStep muon;
  float average_rate;
};

template <int kCount>
__device__ inline void update_adamw(const UpdateTensor& t, const AdamWStep& step, int64_t at,
                                    float (&param)[kCount]) {
  float grad[kCount], m[kCount], v[kCount];
  load_floats(t.source, t.source_dtype, at, grad);
  load_floats(t.exp_avg, t.state_dtype, at, m);
  load_floats(t.exp_avg_sq, t.state_dtype, at, v);
#pragma unroll
  for (int i = 0; i < kCount; ++i) adamw_update(step, grad[i], param[i], m[i], v[i]);
  store_floats(m, t.exp_avg, t.state_dtype, at);
  store_floats(v, t.exp_avg_sq, t.state_dtype, at);
}

template <int kCount>
__device__ inline void update_muon(const UpdateTensor& t, const MuonStep& step, int64_t at,
                                   float (&param)[kCount]) {
  float x[kCount];
  load_floats(t.source, t.source_dtype, at, x);
#pragma unroll
  for (int i = 0; i < kCount; ++i) param[i] = muon_update(step, param[i], x[i]);
}

// Averages and copies hold the parameter as it is stored.
template <int kCount>
__device__ inline void follow(const UpdateTensor& t, float rate, int64_t at,
                              float (&param)[kCount]) {
  if (t.param_dtype == Dtype::bf16) {
#pragma unroll
    for (float& value : param) value = widen(round_to_bf16(value));
  }
  if (t.copy) store_floats(param, t.copy, Dtype::bf16, at);
  if (!t.average || rate == 0) return;
  float average[kCount];
  load_floats(t.average, Dtype::fp32, at, average);
#pragma unroll
  for (int i = 0; i < kCount; ++i) average[i] = moved_average(average[i], param[i], rate);
  store_floats(average, t.average, Dtype::fp32, at);
}

template <int kCount>
__device__ inline void update(const UpdateTensor& t, const Steps& steps, int64_t at) {
  float param[kCount];
  load_floats(t.param, t.param_dtype, at, param);
  if (t.exp_avg) {
    update_adamw(t, steps.adamw, at, param);
  } else {
    update_muon(t, steps.muon, at, param);
  }
  store_floats(param, t.param, t.param_dtype, at);
  follow(t, steps.average_rate, at, param);
}

__global__ void __launch_bounds__(kThreads)
    param_update_chunks(TensorList<UpdateTensor> list, const UpdateScalars* scalars,
                        const float* norm) {
  const int64_t item = list.first_item + blockIdx.x;
  const UpdateTensor t = list.tensors[tensor_of(list.tensors, list.count, item)];
  const UpdateScalars s = scalars[t.group];
  const Steps steps = {adamw_step(s, *norm), muon_step(s, t.scale), s.average_rate};
  const int64_t begin = (item - t.first_item) * kChunk;
  const int64_t end = begin + kChunk < t.count ? begin + kChunk : t.count;
  const bool wide =
      all_aligned(t.param, t.source, t.exp_avg, t.exp_avg_sq, t.average, t.copy);
  for_elements(begin, end, wide, static_cast<int>(threadIdx.x), kThreads,
               [&](auto elements, int64_t at) { update<decltype(elements)::count>(t, steps, at); });
}

}  // namespace

const char* param_update(const UpdateTensor* tensors, int count, int64_t chunks,
                         const UpdateScalars* scalars, const float* norm, void* stream) {
  return for_each_list<TensorList<UpdateTensor>>(tensors, count, chunks, [&](const auto& list) {
    return launch(param_update_chunks, list.end_item - list.first_item, kThreads, stream, list,
                  scalars, norm);
  });
}

}  // namespace pgolf::cuda
