// One optimiser step of all parameters on the CPU: each is read once and written once.
#include <algorithm>

#include "cpu/numbers.h"
#include "host/parallel.h"
#include "kernels.h"
#include "multi_tensor.h"
#include "param_update.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

void update_adamw(const UpdateTensor& t, const AdamWStep& step, int64_t at, int64_t count,
                  float* param) {
  float grad[kRun], m[kRun], v[kRun];
  load_run(t.source, t.source_dtype, at, count, grad);
  load_run(t.exp_avg, t.state_dtype, at, count, m);
  load_run(t.exp_avg_sq, t.state_dtype, at, count, v);
  for (int64_t i = 0; i < count; ++i) adamw_update(step, grad[i], param[i], m[i], v[i]);
  store_run(m, t.exp_avg, t.state_dtype, at, count);
  store_run(v, t.exp_avg_sq, t.state_dtype, at, count);
}

void update_muon(const UpdateTensor& t, const MuonStep& step, int64_t at, int64_t count,
                 float* param) {
  float x[kRun];
  load_run(t.source, t.source_dtype, at, count, x);
  for (int64_t i = 0; i < count; ++i) param[i] = muon_update(step, param[i], x[i]);
}

// An average follows the parameter as it is stored.
void follow(const UpdateTensor& t, float rate, int64_t at, int64_t count, float* param) {
  if (!t.average || rate == 0) return;
  if (t.param_dtype == Dtype::bf16) load_run(t.param, t.param_dtype, at, count, param);
  float* average = t.average + at;
  for (int64_t i = 0; i < count; ++i) average[i] = moved_average(average[i], param[i], rate);
}

void update_chunk(const UpdateTensor& t, const UpdateScalars& scalars, float norm, int64_t chunk) {
  const AdamWStep adamw = adamw_step(scalars, norm);
  const MuonStep muon = muon_step(scalars, t.scale);
  const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, t.count);
  for (int64_t at = begin; at < end; at += kRun) {
    const int64_t count = std::min(kRun, end - at);
    float param[kRun];
    load_run(t.param, t.param_dtype, at, count, param);
    if (t.exp_avg) {
      update_adamw(t, adamw, at, count, param);
    } else {
      update_muon(t, muon, at, count, param);
    }
    store_run(param, t.param, t.param_dtype, at, count);
    follow(t, scalars.average_rate, at, count, param);
  }
}

}  // namespace

void param_update(const UpdateTensor* tensors, int count, int64_t chunks,
                  const UpdateScalars* scalars, const float* norm, int threads) {
  if (!is_finite(*norm)) return;
  constexpr int64_t kBytes = kChunk * 9 * int64_t{sizeof(float)};
  parallel_for(chunks, kBytes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const UpdateTensor& t = tensors[tensor_of(tensors, count, item)];
      update_chunk(t, scalars[t.group], *norm, item - t.first_item);
    }
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
