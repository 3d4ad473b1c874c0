// Every launcher that bindings.cpp exposes. A launcher takes raw pointers, sizes and, on a GPU, a
// stream (cudaStream_t as void*, so that this header needs no CUDA); it has checked nothing:
// bindings.cpp has. GPU launchers return nullptr, or the text of the CUDA error.
#pragma once

#include <cstdint>

namespace pgolf {

namespace cpu {
void pack_bits(const int8_t* codes, uint8_t* packed, int64_t count, int bits);
void unpack_bits(const uint8_t* packed, int8_t* codes, int64_t count, int bits);
}  // namespace cpu

namespace cuda {
const char* pack_bits(const int8_t* codes, uint8_t* packed, int64_t count, int bits, void* stream);
const char* unpack_bits(const uint8_t* packed, int8_t* codes, int64_t count, int bits,
                        void* stream);
}  // namespace cuda

}  // namespace pgolf
