// pgolf._C: checks the arguments, lets go of the GIL and calls a launcher.
//
// Pointers arrive as integers (tensor.data_ptr()), so that nothing here depends on torch. The size of
// a buffer follows from the shape beside it, or is given and checked (pack_bits).
#include "bindings/bindings.h"
#include "build_reason.h"  // written by setup.py: why it built what it built
#include "kernels.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = PGOLF_COMPILER;
  info["cuda"] = bool(PGOLF_CUDA);
  info["nvcc"] = PGOLF_NVCC;
  info["cudart"] = PGOLF_CUDART;
  info["archs"] = py::str(PGOLF_ARCHS).attr("split")();
  info["pybind11"] = PGOLF_PYBIND11;
  info["reason"] = PGOLF_REASON;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pgolf's C++ and CUDA kernels; use them through pgolf.ops";
  m.def("build_info", &build_info, "What this module was built with, and why.");
  m.def("cpu_isa", &pgolf::cpu::isa, "The instruction set of the CPU kernels in this process.");
  pgolf::bindings::bind_embed_smear(m);
  pgolf::bindings::bind_grad_norm(m);
  pgolf::bindings::bind_leaky_relu2(m);
  pgolf::bindings::bind_muon_momentum(m);
  pgolf::bindings::bind_newton_schulz(m);
  pgolf::bindings::bind_pack_bits(m);
  pgolf::bindings::bind_param_update(m);
  pgolf::bindings::bind_qk_rope(m);
  pgolf::bindings::bind_residual_norm(m);
  pgolf::bindings::bind_softcap_cross_entropy(m);
  pgolf::bindings::bind_weight_cast(m);
  pgolf::bindings::bind_xsa(m);
}
