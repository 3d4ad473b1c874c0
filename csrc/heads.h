// A tensor (N, T, heads, d) of known element type, with any strides, for CPU and GPU.
#pragma once

#include "host_device.h"
#include "kernels.h"

namespace pgolf {

template <typename T>
struct Tokens {
  const T* data;
  int64_t batch_stride, time_stride, head_stride;

  explicit Tokens(Heads x)
      : data(static_cast<const T*>(x.data)),
        batch_stride(x.batch_stride),
        time_stride(x.time_stride),
        head_stride(x.head_stride) {}

  PGOLF_HOST_DEVICE const T* row(int64_t batch, int64_t time, int64_t head = 0) const {
    return data + batch * batch_stride + time * time_stride + head * head_stride;
  }
};

}  // namespace pgolf
