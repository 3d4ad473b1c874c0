// The launchers that csrc/cpu defines, once for each instruction set; kernels.h says what they do.
#pragma once

#include "kernels.h"

namespace pgolf::cpu::PGOLF_ISA {

void xsa(const XsaShape& shape, Heads y, Heads v, void* z, int threads);
void xsa_backward(const XsaShape& shape, Heads dz, Heads y, Heads v, void* dy, void* dv,
                  int threads);
void leaky_relu2(const LeakyRelu2Shape& shape, const void* pre, void* post, uint32_t* bits,
                 int threads);
void leaky_relu2_backward(const LeakyRelu2Shape& shape, const void* dpost, const void* post,
                          const uint32_t* bits, void* dpre, int threads);
void newton_schulz_normalize(const NewtonSchulzShape& shape, const void* g, void* x,
                             double* squares, int threads);
void weight_cast(const WeightCastShape& shape, const CastMatrix* matrices, int64_t count,
                 int threads);
void weight_cast_backward(const WeightCastShape& shape, const CastGradient* matrices,
                          int64_t count, int threads);
void qk_rope(const QkRopeShape& shape, const QkRopeInputs& in, const void* value,
             const QkRopeOutputs& out, int threads);
void qk_rope_backward(const QkRopeShape& shape, const QkRopeInputs& in,
                      const QkRopeGradients& gradients, void* dqkv, void* partials, void* d_gain,
                      int threads);
void embed_smear(const EmbedSmearShape& shape, const EmbedSmearInputs& in, void* x, void* rstd,
                 int threads);
void embed_smear_backward(const EmbedSmearShape& shape, const EmbedSmearInputs& in,
                          const TokenOrder& tokens, const void* dx, const void* rstd,
                          const EmbedSmearGradients& out, const EmbedSmearScratch& scratch,
                          int threads);
void residual_norm(const ResidualNormShape& shape, const ResidualNormInputs& in,
                   const ResidualNormOutputs& out, int threads);
void residual_norm_backward(const ResidualNormShape& shape, const ResidualNormInputs& in,
                            const ResidualNormUpstream& upstream,
                            const ResidualNormGradients& out, int threads);
void softcap_cross_entropy(const LossShape& shape, void* z, const int64_t* targets, void* losses,
                           int threads);
void grad_norm(const GradientTensor* tensors, int count, int64_t chunks, double* partials,
               float* norm, int64_t* bad, int threads);
void muon_momentum(const MuonMomentumShape& shape, const MomentumMatrix* matrices,
                   const UpdateScalars* scalars, const float* norm, double* squares, int threads);
void param_update(const UpdateTensor* tensors, int count, int64_t chunks,
                  const UpdateScalars* scalars, const float* norm, int threads);

}  // namespace pgolf::cpu::PGOLF_ISA
