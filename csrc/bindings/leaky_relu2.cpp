// leaky_relu2 for Python.
#include "bindings/bindings.h"
#include "bindings/checks.h"
#include "leaky_relu2.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

LeakyRelu2Shape checked_leaky_relu2_shape(Address rstd, int dtype, int64_t rows, int64_t cols,
                                               double slope) {
  count_of({{"rows", rows}, {"cols", cols}});
  if (!(slope >= 0 && slope <= 1)) refuse("slope", slope, "it has to be between 0 and 1");
  return {rows, cols, slope, pointer<const void>(rstd), checked_dtype("dtype", dtype)};
}

void check_leaky_relu2_buffers(std::initializer_list<std::pair<const char*, Address>> buffers,
                               Address bits, int64_t rows, int64_t cols) {
  for (const auto& [name, address] : buffers) check_pointer(name, address, rows * cols);
  check_pointer("bits", bits, rows * sign_words(cols));
}

void leaky_relu2(Address pre, Address post, Address bits, Address rstd, int dtype, int64_t rows,
                 int64_t cols, double slope, int threads) {
  const auto shape = checked_leaky_relu2_shape(rstd, dtype, rows, cols, slope);
  check_leaky_relu2_buffers({{"pre", pre}, {"post", post}}, bits, rows, cols);
  cpu::kernels().leaky_relu2(shape, pointer<const void>(pre), pointer<void>(post),
                             pointer<uint32_t>(bits), checked_threads(threads));
}

void leaky_relu2_backward(Address dpost, Address post, Address bits, Address rstd, Address dpre,
                          int dtype, int64_t rows, int64_t cols, double slope, int threads) {
  const auto shape = checked_leaky_relu2_shape(rstd, dtype, rows, cols, slope);
  check_leaky_relu2_buffers({{"dpost", dpost}, {"post", post}, {"dpre", dpre}}, bits, rows, cols);
  cpu::kernels().leaky_relu2_backward(shape, pointer<const void>(dpost), pointer<const void>(post),
                                      pointer<const uint32_t>(bits), pointer<void>(dpre),
                                      checked_threads(threads));
}

#if PGOLF_CUDA
void leaky_relu2_cuda(Address pre, Address post, Address bits, Address rstd, int dtype,
                      int64_t rows, int64_t cols, double slope, Address stream) {
  checked_cuda_dtype("dtype", dtype);
  const auto shape = checked_leaky_relu2_shape(rstd, dtype, rows, cols, slope);
  check_leaky_relu2_buffers({{"pre", pre}, {"post", post}}, bits, rows, cols);
  check_launch(cuda::leaky_relu2(shape, pointer<const void>(pre), pointer<void>(post),
                                 pointer<uint32_t>(bits), pointer<void>(stream)));
}

void leaky_relu2_backward_cuda(Address dpost, Address post, Address bits, Address rstd,
                               Address dpre, int dtype, int64_t rows, int64_t cols, double slope,
                               Address stream) {
  checked_cuda_dtype("dtype", dtype);
  const auto shape = checked_leaky_relu2_shape(rstd, dtype, rows, cols, slope);
  check_leaky_relu2_buffers({{"dpost", dpost}, {"post", post}, {"dpre", dpre}}, bits, rows, cols);
  check_launch(cuda::leaky_relu2_backward(shape, pointer<const void>(dpost),
                                          pointer<const void>(post), pointer<const uint32_t>(bits),
                                          pointer<void>(dpre), pointer<void>(stream)));
}
#endif

}  // namespace

void bind_leaky_relu2(py::module_& m) {
  using A = py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("leaky_relu2", &leaky_relu2, unlocked, A("pre"), A("post"), A("bits"), A("rstd"),
        A("dtype"), A("rows"), A("cols"), A("slope"), A("threads"));
  m.def("leaky_relu2_backward", &leaky_relu2_backward, unlocked, A("dpost"), A("post"), A("bits"),
        A("rstd"), A("dpre"), A("dtype"), A("rows"), A("cols"), A("slope"), A("threads"));
#if PGOLF_CUDA
  m.def("leaky_relu2_cuda", &leaky_relu2_cuda, unlocked, A("pre"), A("post"), A("bits"), A("rstd"),
        A("dtype"), A("rows"), A("cols"), A("slope"), A("stream"));
  m.def("leaky_relu2_backward_cuda", &leaky_relu2_backward_cuda, unlocked, A("dpost"), A("post"),
        A("bits"), A("rstd"), A("dpre"), A("dtype"), A("rows"), A("cols"), A("slope"),
        A("stream"));
#endif
}

}  // namespace pgolf::bindings
