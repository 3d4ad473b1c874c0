// qk_rope for Python.
#include "qk_rope.h"

#include <pybind11/stl.h>

#include <array>
#include <cmath>

#include "bindings/bindings.h"
#include "bindings/checks.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

using Strides = std::array<int64_t, 3>;

QkRopeShape checked_qk_rope_shape(int dtype, int64_t n, int64_t t, int64_t h, int64_t g, int64_t d,
                                  int64_t half, double eps, bool norm) {
  count_of({{"h", h}, {"n", n}, {"t", t}, {"d", d}});
  count_of({{"g", g}, {"n", n}, {"t", t}, {"d", d}});
  if (d > kMaxRopeSize) {
    refuse("d", d, "heads may have at most " + std::to_string(kMaxRopeSize) + " elements");
  }
  if (half < 0 || half > d / 2) {
    refuse("half", half, "heads of " + std::to_string(d) + " elements have that many pairs");
  }
  if (!(eps >= 0 && std::isfinite(eps))) refuse("eps", eps, "it has to be 0 or more, and finite");
  return {n, t, h, g, d, half, eps, norm, checked_dtype("dtype", dtype)};
}

int64_t tokens_of(const QkRopeShape& shape) { return shape.batch * shape.time; }
int64_t packed_count(const QkRopeShape& shape) {
  return tokens_of(shape) * (shape.heads + 2 * shape.kv_heads) * shape.size;
}

QkRopeInputs checked_inputs(const QkRopeShape& shape, Address qkv, Address cos, Address sin,
                            Address gain) {
  check_pointer("qkv", qkv, packed_count(shape));
  check_pointer("cos", cos, tokens_of(shape) * shape.half);
  check_pointer("sin", sin, tokens_of(shape) * shape.half);
  check_pointer("gain", gain, tokens_of(shape) * shape.heads);
  return {pointer<const void>(qkv), pointer<const void>(cos), pointer<const void>(sin),
          pointer<const void>(gain)};
}

QkRopeOutputs checked_outputs(const QkRopeShape& shape, Address q, Address k, Address v) {
  const int64_t rows = tokens_of(shape) * shape.size;
  check_pointer("q", q, rows * shape.heads);
  check_pointer("k", k, rows * shape.kv_heads);
  check_pointer("v", v, rows * shape.kv_heads);
  return {pointer<void>(q), pointer<void>(k), pointer<void>(v)};
}

// A gradient that is missing has a null pointer.
Heads checked_gradient(const std::string& name, const QkRopeShape& shape, int64_t heads,
                       Address address, const Strides& strides) {
  check_strides(name + "_strides", {{shape.batch, strides[0]},
                                    {shape.time, strides[1]},
                                    {heads, strides[2]}});
  return {pointer<const void>(address), strides[0], strides[1], strides[2]};
}

void check_gradient_outputs(const QkRopeShape& shape, Address dqkv, Address partials,
                            int64_t partial_rows, Address d_gain) {
  const int64_t blocks = rope_blocks(tokens_of(shape));
  if (partial_rows != blocks) {
    refuse("partial_rows", partial_rows, "it has to be " + std::to_string(blocks));
  }
  check_pointer("dqkv", dqkv, packed_count(shape));
  check_pointer("partials", partials, blocks * shape.heads);
  check_pointer("d_gain", d_gain, shape.heads);
}

void qk_rope(Address qkv, Address cos, Address sin, Address gain, Address value, Address q,
             Address k, Address v, int dtype, int64_t n, int64_t t, int64_t h, int64_t g, int64_t d,
             int64_t half, double eps, bool norm, int threads) {
  const QkRopeShape shape = checked_qk_rope_shape(dtype, n, t, h, g, d, half, eps, norm);
  const QkRopeInputs in = checked_inputs(shape, qkv, cos, sin, gain);
  const QkRopeOutputs out = checked_outputs(shape, q, k, v);
  cpu::kernels().qk_rope(shape, in, pointer<const void>(value), out, checked_threads(threads));
}

void qk_rope_backward(Address qkv, Address cos, Address sin, Address gain, Address dq, Address dk,
                      Address dv, Address dqkv, Address partials, int64_t partial_rows,
                      Address d_gain, int dtype, int64_t n, int64_t t, int64_t h, int64_t g,
                      int64_t d, int64_t half, double eps, bool norm, const Strides& dq_strides,
                      const Strides& dk_strides, const Strides& dv_strides, int threads) {
  const QkRopeShape shape = checked_qk_rope_shape(dtype, n, t, h, g, d, half, eps, norm);
  const QkRopeInputs in = checked_inputs(shape, qkv, cos, sin, gain);
  const QkRopeGradients gradients = {checked_gradient("dq", shape, h, dq, dq_strides),
                                     checked_gradient("dk", shape, g, dk, dk_strides),
                                     checked_gradient("dv", shape, g, dv, dv_strides)};
  check_gradient_outputs(shape, dqkv, partials, partial_rows, d_gain);
  cpu::kernels().qk_rope_backward(shape, in, gradients, pointer<void>(dqkv),
                                  pointer<void>(partials), pointer<void>(d_gain),
                                  checked_threads(threads));
}

#if PGOLF_CUDA
void qk_rope_cuda(Address qkv, Address cos, Address sin, Address gain, Address value, Address q,
                  Address k, Address v, int dtype, int64_t n, int64_t t, int64_t h, int64_t g,
                  int64_t d, int64_t half, double eps, bool norm, Address stream) {
  checked_cuda_dtype("dtype", dtype);
  const QkRopeShape shape = checked_qk_rope_shape(dtype, n, t, h, g, d, half, eps, norm);
  const QkRopeInputs in = checked_inputs(shape, qkv, cos, sin, gain);
  const QkRopeOutputs out = checked_outputs(shape, q, k, v);
  check_launch(cuda::qk_rope(shape, in, pointer<const void>(value), out, pointer<void>(stream)));
}

void qk_rope_backward_cuda(Address qkv, Address cos, Address sin, Address gain, Address dq,
                           Address dk, Address dv, Address dqkv, Address partials,
                           int64_t partial_rows, Address d_gain, int dtype, int64_t n, int64_t t,
                           int64_t h, int64_t g, int64_t d, int64_t half, double eps, bool norm,
                           const Strides& dq_strides, const Strides& dk_strides,
                           const Strides& dv_strides, Address stream) {
  checked_cuda_dtype("dtype", dtype);
  const QkRopeShape shape = checked_qk_rope_shape(dtype, n, t, h, g, d, half, eps, norm);
  const QkRopeInputs in = checked_inputs(shape, qkv, cos, sin, gain);
  const QkRopeGradients gradients = {checked_gradient("dq", shape, h, dq, dq_strides),
                                     checked_gradient("dk", shape, g, dk, dk_strides),
                                     checked_gradient("dv", shape, g, dv, dv_strides)};
  check_gradient_outputs(shape, dqkv, partials, partial_rows, d_gain);
  check_launch(cuda::qk_rope_backward(shape, in, gradients, pointer<void>(dqkv),
                                      pointer<void>(partials), pointer<void>(d_gain),
                                      pointer<void>(stream)));
}
#endif

}  // namespace

void bind_qk_rope(py::module_& m) {
  using A = py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  const auto define = [&](const char* name, auto function, const char* last) {
    m.def(name, function, unlocked, A("qkv"), A("cos"), A("sin"), A("gain"), A("value"), A("q"),
          A("k"), A("v"), A("dtype"), A("n"), A("t"), A("h"), A("g"), A("d"), A("half"), A("eps"),
          A("norm"), A(last));
  };
  const auto define_backward = [&](const char* name, auto function, const char* last) {
    m.def(name, function, unlocked, A("qkv"), A("cos"), A("sin"), A("gain"), A("dq"), A("dk"),
          A("dv"), A("dqkv"), A("partials"), A("partial_rows"), A("d_gain"), A("dtype"), A("n"),
          A("t"), A("h"), A("g"), A("d"), A("half"), A("eps"), A("norm"), A("dq_strides"),
          A("dk_strides"), A("dv_strides"), A(last));
  };
  define("qk_rope", &qk_rope, "threads");
  define_backward("qk_rope_backward", &qk_rope_backward, "threads");
#if PGOLF_CUDA
  define("qk_rope_cuda", &qk_rope_cuda, "stream");
  define_backward("qk_rope_backward_cuda", &qk_rope_backward_cuda, "stream");
#endif
}

}  // namespace pgolf::bindings
