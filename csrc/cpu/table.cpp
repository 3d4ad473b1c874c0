// The launchers of one instruction set, for csrc/host/isa.cpp to choose from.
#include "kernels.h"

namespace pgolf::cpu::PGOLF_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
#define PGOLF_LAUNCHER(name, ...) name,
#include "launchers.def"
};

}  // namespace pgolf::cpu::PGOLF_ISA
