// token_sums: the gradient of a table whose rows are looked up by id. sums (V, C) holds for each id the
// sum over its tokens, in their order, of x divided by the token's divisor, if it has one.
#pragma once

#include <cstdint>

#include "embed_smear.h"
#include "kernels.h"

namespace pgolf {

struct TokenSumsShape {
  int64_t vocab, width, stride;  // V, C, and from one row of x to the next, in elements
  Dtype dtype;                   // of x and sums
};

}  // namespace pgolf
