// The declarations of launchers.def, and types that several of them take. A launcher takes raw
// pointers, sizes and, on a GPU, a stream (cudaStream_t as void*, so that this header needs no CUDA);
// it checks nothing: the bindings have. GPU launchers return nullptr, or the text of the CUDA error.
#pragma once

#include <cstdint>

#include "element.h"

namespace pgolf {

// The codes by which Python names an element type.
enum class Dtype { fp32 = 0, bf16 = 1, fp64 = 2 };

// A tensor (N, T, heads, d) with any strides, in elements; elements of a row lie side by side.
struct Heads {
  const void* data;
  int64_t batch_stride, time_stride, head_stride;
};

// A matrix whose rows have any stride, in elements.
struct Rows {
  const void* data;
  int64_t row_stride;
};

#define PGOLF_STRUCT(name) struct name;
#define PGOLF_LAUNCHER(...)
#include "launchers.def"

namespace cpu {

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

#define PGOLF_LAUNCHER(name, ...) const char* name(__VA_ARGS__, void* stream);
#define PGOLF_CPU_LAUNCHER(...)
#include "launchers.def"

}  // namespace cuda

}  // namespace pgolf
