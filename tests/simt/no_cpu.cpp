// In place of csrc/cpu and csrc/host/isa.cpp: the emulated module is used for its CUDA half only, and
// is built in half of the time without the other.
#include <stdexcept>

#include "kernels.h"

namespace pgolf::cpu {

const char* isa() { return "none"; }

const Kernels& kernels() {
  throw std::runtime_error("this module emulates CUDA kernels, and has none for the CPU");
}

}  // namespace pgolf::cpu
