// One optimiser step of all parameters on a GPU: a block takes a chunk of a tensor, and each number
// is read once and written once.
#include <type_traits>

#include "cuda/multi_tensor.cuh"
#include "param_update.h"

namespace pgolf::cuda {
namespace {

struct Steps {
  AdamWStep adamw;
  MuonStep muon;
  float average_rate;
};

// The new parameters as they are stored, which averages hold, too.
template <int kCount>
__device__ inline void store_param(const UpdateTensor& t, int64_t at, float (&param)[kCount]) {
  if (t.param_dtype == Dtype::bf16) {
#pragma unroll
    for (float& value : param) value = widen(round_to_bf16(value));
  }
  store_floats(param, t.param, t.param_dtype, at);
}

// Everything is loaded before anything is stored: as far as the compiler knows, a store may be to
// what a later load reads. Those come last that may be bf16, as widening them waits for them.
template <int kCount>
__device__ inline void update(const UpdateTensor& t, const Steps& steps, int64_t at) {
  const bool adamw = t.exp_avg, averaged = t.average && steps.average_rate != 0;
  float average[kCount], param[kCount], m[kCount], v[kCount], x[kCount];
  if (averaged) load_floats(t.average, Dtype::fp32, at, average);
  load_floats(t.param, t.param_dtype, at, param);
  if (adamw) {
    load_floats(t.exp_avg, t.state_dtype, at, m);
    load_floats(t.exp_avg_sq, t.state_dtype, at, v);
  }
  load_floats(t.source, t.source_dtype, at, x);
  if (adamw) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) adamw_update(steps.adamw, x[i], param[i], m[i], v[i]);
    store_floats(m, t.exp_avg, t.state_dtype, at);
    store_floats(v, t.exp_avg_sq, t.state_dtype, at);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) param[i] = muon_update(steps.muon, param[i], x[i]);
  }
  store_param(t, at, param);
  if (!averaged) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    average[i] = moved_average(average[i], param[i], steps.average_rate);
  }
  store_floats(average, t.average, Dtype::fp32, at);
}

// The address of element `at`, null for null: from a block's first element on, 32 bits tell its
// elements apart, which costs fewer instructions than 64.
template <typename T>
__device__ inline T* element(T* from, Dtype dtype, int64_t at) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  if (dtype == Dtype::fp32) at *= 2;
  return from ? reinterpret_cast<T*>(reinterpret_cast<Byte*>(from) + at * int64_t{sizeof(bf16)})
              : nullptr;
}

// Four blocks an SM, without spills: the compiler's own choice leaves registers for three.
__global__ void __launch_bounds__(kThreads, 4)
    param_update_chunks(TensorList<UpdateTensor> list, const UpdateScalars* scalars,
                        const float* norm) {
  const int64_t item = list.first_item + blockIdx.x;
  UpdateTensor t = list.tensors[tensor_of(list.tensors, list.count, item)];
  const UpdateScalars s = scalars[t.group];
  const float length = *norm;
  if (!is_finite(length)) return;
  const Steps steps = {adamw_step(s, length), muon_step(s, t.scale), s.average_rate};
  const bool wide = all_aligned(t.param, t.source, t.exp_avg, t.exp_avg_sq, t.average);
  const int64_t begin = (item - t.first_item) * kChunk, left = t.count - begin;
  t.param = element(t.param, t.param_dtype, begin);
  t.source = element(t.source, t.source_dtype, begin);
  t.exp_avg = element(t.exp_avg, t.state_dtype, begin);
  t.exp_avg_sq = element(t.exp_avg_sq, t.state_dtype, begin);
  t.average = element(t.average, Dtype::fp32, begin);
  for_elements(0, static_cast<int>(left < kChunk ? left : kChunk), wide,
               static_cast<int>(threadIdx.x), kThreads,
               [&](auto elements, int at) { update<decltype(elements)::count>(t, steps, at); });
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
