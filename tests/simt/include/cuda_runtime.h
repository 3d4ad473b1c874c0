// Stands in for CUDA's header, so that g++ compiles a .cu file as C++ and its kernels run on the
// CPU: every thread of a block as a fiber, which waits where threads wait for each other. The rules
// that a GPU relies on and mostly does not check are errors here; tests/simt/machine.h has the list.
//
// What kernels may use: what is in this file, and <cmath>. Memory that is sized at launch, which CUDA
// declares as `extern __shared__`, comes from simt::dynamic_shared().
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
// A block runs on one thread of the operating system, so that each has shared memory of its own. The
// machine fills all of it with NaN before every block: .cu files have no other thread_local variables.
#define __shared__ static __thread

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#define SIMT_LOCAL __attribute__((tls_model("local-dynamic"), visibility("hidden")))
extern __thread uint3 threadIdx SIMT_LOCAL;
extern __thread uint3 blockIdx SIMT_LOCAL;
extern __thread uint3 blockDim SIMT_LOCAL;
extern __thread uint3 gridDim SIMT_LOCAL;
constexpr int warpSize = 32;

namespace simt {

// Where the kernel's source calls something.
struct Site {
  const char* file;
  int line;
  const char* function;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE(),
                    const char* function = __builtin_FUNCTION()) {
  return {file, line, function};
}

enum class Collective { syncwarp, shfl, shfl_up, shfl_down, shfl_xor, ballot };

// Brings `value` and waits for the lanes of the mask; what this lane gets.
uint64_t meet(Collective kind, unsigned mask, uint64_t value, int argument, int width, Site site);
void block_barrier(Site site);

// The block's memory of cudaLaunchConfig_t::dynamicSmemBytes.
void* dynamic_shared();

template <typename T>
T shuffle(Collective kind, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(kind, mask, bits, argument, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

inline void __syncthreads(simt::Site site = simt::here()) { simt::block_barrier(site); }
inline void __syncwarp(unsigned mask = ~0u, simt::Site site = simt::here()) {
  simt::meet(simt::Collective::syncwarp, mask, 0, 0, warpSize, site);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize,
              simt::Site site = simt::here()) {
  return simt::shuffle(simt::Collective::shfl, mask, value, lane, width, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 simt::Site site = simt::here()) {
  return simt::shuffle(simt::Collective::shfl_up, mask, value, delta, width, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   simt::Site site = simt::here()) {
  return simt::shuffle(simt::Collective::shfl_down, mask, value, delta, width, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize,
                  simt::Site site = simt::here()) {
  return simt::shuffle(simt::Collective::shfl_xor, mask, value, bits, width, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::here()) {
  const uint64_t vote = predicate != 0;
  return simt::meet(simt::Collective::ballot, mask, vote, 0, warpSize, site);
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::here()) {
  return __ballot_sync(mask, predicate, site) == mask;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// --- the runtime ---------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};
const char* cudaGetErrorString(cudaError_t error);

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrMultiProcessorCount = 16,
};
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

using cudaStream_t = struct EmulatedStream*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace simt {

constexpr size_t kMaxParameterBytes = 32764;

// Runs all threads, each of which calls thread(context); `kernel` is what messages name.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   void (*thread)(const void* context), const void* context);

}  // namespace simt

// Returns when the kernel has run. Throws std::runtime_error if it broke a rule.
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using Values = std::tuple<void (*)(Parameters...), std::decay_t<Parameters>...>;
  static_assert(sizeof(std::tuple<std::decay_t<Parameters>...>) <= simt::kMaxParameterBytes,
                "a kernel takes at most 32,764 bytes of parameters");
  const Values values(kernel, static_cast<Parameters>(arguments)...);
  return simt::launch(
      *config, reinterpret_cast<const void*>(kernel),
      [](const void* context) {
        std::apply([](auto* function, const auto&... each) { function(each...); },
                   *static_cast<const Values*>(context));
      },
      &values);
}
