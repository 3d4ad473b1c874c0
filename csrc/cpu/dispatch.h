// From an element type's code to a template's argument.
#pragma once

#include "element.h"
#include "kernels.h"

namespace pgolf::cpu::PGOLF_ISA {

// body(T{}) for the type T of `dtype`.
template <typename Body>
static inline void with_element(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::fp32:
      return body(float{});
    case Dtype::bf16:
      return body(bf16{});
    case Dtype::fp64:
      return body(double{});
  }
}

}  // namespace pgolf::cpu::PGOLF_ISA
