// xsa for Python.
#include <pybind11/stl.h>

#include <array>

#include "bindings/bindings.h"
#include "bindings/checks.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

using Strides = std::array<int64_t, 3>;

XsaShape checked_xsa_shape(int dtype, int64_t n, int64_t t, int64_t h, int64_t g, int64_t d) {
  const XsaShape shape = {n, t, h, g, d, checked_dtype("dtype", dtype)};
  count_of({{"h", h}, {"n", n}, {"t", t}, {"d", d}});
  count_of({{"g", g}, {"n", n}, {"t", t}, {"d", d}});
  if (g == 0 ? h != 0 : h % g != 0) {
    refuse("h", h, "it has to be a multiple of g, which is " + std::to_string(g));
  }
  if (g > 0 && h / g > cpu::kMaxHeadsPerGroup) {
    refuse("h", h, "at most " + std::to_string(cpu::kMaxHeadsPerGroup) +
                       " query heads may share a value head, and g is " + std::to_string(g));
  }
  return shape;
}

Heads checked_heads(const std::string& name, const XsaShape& shape, int64_t heads,
                         Address address, const Strides& strides) {
  check_pointer(name, address, shape.batch * shape.time * heads * shape.size);
  check_strides(name + "_strides", {{shape.batch, strides[0]},
                                    {shape.time, strides[1]},
                                    {heads, strides[2]}});
  return {pointer<const void>(address), strides[0], strides[1], strides[2]};
}

void check_heads_output(const std::string& name, const XsaShape& shape, int64_t heads,
                        Address address) {
  check_pointer(name, address, shape.batch * shape.time * heads * shape.size);
}

void xsa(Address y, Address v, Address z, int dtype, int64_t n, int64_t t, int64_t h, int64_t g,
         int64_t d, const Strides& y_strides, const Strides& v_strides, int threads) {
  const XsaShape shape = checked_xsa_shape(dtype, n, t, h, g, d);
  const Heads y_heads = checked_heads("y", shape, h, y, y_strides);
  const Heads v_heads = checked_heads("v", shape, g, v, v_strides);
  check_heads_output("z", shape, h, z);
  cpu::kernels().xsa(shape, y_heads, v_heads, pointer<void>(z), checked_threads(threads));
}

void xsa_backward(Address dz, Address y, Address v, Address dy, Address dv, int dtype, int64_t n,
                  int64_t t, int64_t h, int64_t g, int64_t d, const Strides& dz_strides,
                  const Strides& y_strides, const Strides& v_strides, int threads) {
  const XsaShape shape = checked_xsa_shape(dtype, n, t, h, g, d);
  const Heads dz_heads = checked_heads("dz", shape, h, dz, dz_strides);
  const Heads y_heads = checked_heads("y", shape, h, y, y_strides);
  const Heads v_heads = checked_heads("v", shape, g, v, v_strides);
  check_heads_output("dy", shape, h, dy);
  check_heads_output("dv", shape, g, dv);
  cpu::kernels().xsa_backward(shape, dz_heads, y_heads, v_heads, pointer<void>(dy),
                              pointer<void>(dv), checked_threads(threads));
}

#if PGOLF_CUDA
XsaShape checked_xsa_cuda_shape(int dtype, int64_t n, int64_t t, int64_t h, int64_t g, int64_t d) {
  checked_cuda_dtype("dtype", dtype);
  if (d > cuda::kMaxXsaSize) {
    refuse("d", d, "heads may have at most " + std::to_string(cuda::kMaxXsaSize) + " elements");
  }
  return checked_xsa_shape(dtype, n, t, h, g, d);
}

void xsa_cuda(Address y, Address v, Address z, int dtype, int64_t n, int64_t t, int64_t h,
              int64_t g, int64_t d, const Strides& y_strides, const Strides& v_strides,
              Address stream) {
  const XsaShape shape = checked_xsa_cuda_shape(dtype, n, t, h, g, d);
  const Heads y_heads = checked_heads("y", shape, h, y, y_strides);
  const Heads v_heads = checked_heads("v", shape, g, v, v_strides);
  check_heads_output("z", shape, h, z);
  check_launch(cuda::xsa(shape, y_heads, v_heads, pointer<void>(z), pointer<void>(stream)));
}

void xsa_backward_cuda(Address dz, Address y, Address v, Address dy, Address dv, int dtype,
                       int64_t n, int64_t t, int64_t h, int64_t g, int64_t d,
                       const Strides& dz_strides, const Strides& y_strides,
                       const Strides& v_strides, Address stream) {
  const XsaShape shape = checked_xsa_cuda_shape(dtype, n, t, h, g, d);
  const Heads dz_heads = checked_heads("dz", shape, h, dz, dz_strides);
  const Heads y_heads = checked_heads("y", shape, h, y, y_strides);
  const Heads v_heads = checked_heads("v", shape, g, v, v_strides);
  check_heads_output("dy", shape, h, dy);
  check_heads_output("dv", shape, g, dv);
  check_launch(cuda::xsa_backward(shape, dz_heads, y_heads, v_heads, pointer<void>(dy),
                                  pointer<void>(dv), pointer<void>(stream)));
}
#endif

}  // namespace

void bind_xsa(py::module_& m) {
  using A = py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("xsa", &xsa, unlocked, A("y"), A("v"), A("z"), A("dtype"), A("n"), A("t"), A("h"), A("g"),
        A("d"), A("y_strides"), A("v_strides"), A("threads"));
  m.def("xsa_backward", &xsa_backward, unlocked, A("dz"), A("y"), A("v"), A("dy"), A("dv"),
        A("dtype"), A("n"), A("t"), A("h"), A("g"), A("d"), A("dz_strides"), A("y_strides"),
        A("v_strides"), A("threads"));
#if PGOLF_CUDA
  m.def("xsa_cuda", &xsa_cuda, unlocked, A("y"), A("v"), A("z"), A("dtype"), A("n"), A("t"),
        A("h"), A("g"), A("d"), A("y_strides"), A("v_strides"), A("stream"));
  m.def("xsa_backward_cuda", &xsa_backward_cuda, unlocked, A("dz"), A("y"), A("v"), A("dy"),
        A("dv"), A("dtype"), A("n"), A("t"), A("h"), A("g"), A("d"), A("dz_strides"),
        A("y_strides"), A("v_strides"), A("stream"));
#endif
}

}  // namespace pgolf::bindings
