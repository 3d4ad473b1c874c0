// token_sums for Python.
#include "token_sums.h"

#include "bindings/checks.h"

namespace pgolf::bindings {
namespace {

template <typename On>
void token_sums(Address order, Address bounds, Address x, Address divisors, Address sums, int dtype,
                int64_t tokens, int64_t vocab, int64_t width, int64_t stride, On on) {
  const int64_t count = count_of({{"tokens", tokens}, {"width", width}});
  const int64_t table = count_of({{"vocab", vocab}, {"width", width}});
  check_strides("stride", {{tokens, stride}, {width, 1}});
  check_pointer("order", order, tokens);
  check_pointer("bounds", bounds, vocab + 1);
  check_pointer("x", x, count);
  check_pointer("sums", sums, table);
  const TokenSumsShape shape = {vocab, width, stride, checked_dtype<On>("dtype", dtype)};
  launch::token_sums(on, shape, TokenOrder{order, bounds}, x, divisors, sums);
}

const Functions functions = {
    {PGOLF_BOTH(token_sums, "order bounds x divisors sums dtype tokens vocab width stride")}};

}  // namespace
}  // namespace pgolf::bindings
