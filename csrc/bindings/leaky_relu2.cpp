// leaky_relu2 for Python.
#include "bindings/checks.h"
#include "leaky_relu2.h"

namespace pgolf::bindings {
namespace {

template <typename On>
LeakyRelu2Shape checked_shape(Address rstd, int dtype, int64_t rows, int64_t cols, double slope) {
  count_of({{"rows", rows}, {"cols", cols}});
  return {rows, cols, slope, rstd, checked_dtype<On>("dtype", dtype)};
}

void check_buffers(std::initializer_list<std::pair<const char*, Address>> buffers,
                               Address bits, int64_t rows, int64_t cols) {
  for (const auto& [name, address] : buffers) check_pointer(name, address, rows * cols);
  check_pointer("bits", bits, rows * sign_words(cols));
}

template <typename On>
void leaky_relu2(Address pre, Address post, Address bits, Address rstd, int dtype, int64_t rows,
                 int64_t cols, double slope, On on) {
  const auto shape = checked_shape<On>(rstd, dtype, rows, cols, slope);
  check_buffers({{"pre", pre}, {"post", post}}, bits, rows, cols);
  launch::leaky_relu2(on, shape, pre, post,
                             bits);
}

template <typename On>
void leaky_relu2_backward(Address dpost, Address post, Address bits, Address rstd, Address dpre,
                          int dtype, int64_t rows, int64_t cols, double slope, On on) {
  const auto shape = checked_shape<On>(rstd, dtype, rows, cols, slope);
  check_buffers({{"dpost", dpost}, {"post", post}, {"dpre", dpre}}, bits, rows, cols);
  launch::leaky_relu2_backward(on, shape, dpost, post,
                                      bits, dpre);
}

const Functions functions = {
    PGOLF_BOTH(leaky_relu2, "pre post bits rstd dtype rows cols slope"),
    PGOLF_BOTH(leaky_relu2_backward, "dpost post bits rstd dpre dtype rows cols slope"),
};

}  // namespace
}  // namespace pgolf::bindings
