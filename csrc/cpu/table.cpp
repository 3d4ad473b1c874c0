// The launchers of one instruction set, for csrc/host/isa.cpp to choose from.
#include "cpu/launchers.h"

namespace pgolf::cpu::PGOLF_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    xsa,
    xsa_backward,
    leaky_relu2,
    leaky_relu2_backward,
    newton_schulz_normalize,
    weight_cast,
    weight_cast_backward,
    qk_rope,
    qk_rope_backward,
    embed_smear,
    embed_smear_backward,
    residual_norm,
    residual_norm_backward,
    softcap_cross_entropy,
    grad_norm,
    muon_momentum,
    param_update,
};

}  // namespace pgolf::cpu::PGOLF_ISA
