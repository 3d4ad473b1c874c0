#pragma once

#include <pybind11/pybind11.h>

namespace pgolf::bindings {

void bind_cpu(pybind11::module_& m);  // the CPU kernels that take tensors of several types

}  // namespace pgolf::bindings
