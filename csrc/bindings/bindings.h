// One function a file of this folder: it adds the operator's functions to the module, `NAME` for the
// CPU, whose last argument is the most threads to use, and `NAME_cuda` for a GPU, whose last argument
// is the stream. They let go of the GIL and throw what checks.h says.
#pragma once

#include <pybind11/pybind11.h>

#include "build_info.h"  // written by setup.py: PGOLF_CUDA says whether there are CUDA kernels

namespace pgolf::bindings {

void bind_embed_smear(pybind11::module_& m);
void bind_grad_norm(pybind11::module_& m);
void bind_leaky_relu2(pybind11::module_& m);
void bind_muon_momentum(pybind11::module_& m);
void bind_newton_schulz(pybind11::module_& m);
void bind_param_update(pybind11::module_& m);
void bind_qk_rope(pybind11::module_& m);
void bind_residual_norm(pybind11::module_& m);
void bind_softcap_cross_entropy(pybind11::module_& m);
void bind_weight_cast(pybind11::module_& m);
void bind_xsa(pybind11::module_& m);

}  // namespace pgolf::bindings
