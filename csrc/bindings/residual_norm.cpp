// residual_norm for Python.
#include "residual_norm.h"

#include <cmath>

#include "bindings/bindings.h"
#include "bindings/checks.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

ResidualNormShape checked_shape(int dtype, int64_t rows, int64_t width, double scale, double eps) {
  count_of({{"rows", rows}, {"width", width}, {"width", 4}});  // four rows of sums, too
  if (width > kMaxResidualWidth) {
    refuse("width", width, "it may be at most " + std::to_string(kMaxResidualWidth));
  }
  if (!std::isfinite(scale)) refuse("scale", scale, "it has to be finite");
  if (!(eps >= 0 && std::isfinite(eps))) refuse("eps", eps, "it has to be 0 or more, and finite");
  return {rows, width, scale, eps, checked_dtype("dtype", dtype)};
}

// Null pointers are what is not there; these would be half there.
ResidualNormInputs checked_inputs(const ResidualNormShape& shape, Address x, Address branch,
                                  Address branch_scale, Address skip, Address skip_weight,
                                  Address x0, Address mix) {
  const int64_t count = shape.rows * shape.width;
  if (branch_scale) check_pointer("branch", branch, count);
  if (skip_weight) check_pointer("skip", skip, count);
  if (mix) check_pointer("x0", x0, count);
  return {pointer<const void>(x),           pointer<const void>(branch),
          pointer<const void>(branch_scale), pointer<const void>(skip),
          pointer<const void>(skip_weight),  pointer<const void>(x0),
          pointer<const void>(mix)};
}

ResidualNormOutputs checked_outputs(const ResidualNormShape& shape, Address x, Address total,
                                    Address x_in, Address h, Address rstd) {
  check_pointer("x", x, shape.rows * shape.width);
  check_pointer("h", h, shape.rows * shape.width);
  check_pointer("rstd", rstd, shape.width ? shape.rows : 0);
  return {pointer<void>(total), pointer<void>(x_in), pointer<void>(h), pointer<void>(rstd)};
}

ResidualNormUpstream checked_upstream(const ResidualNormShape& shape, Address x_in, Address rstd,
                                      Address d_total, Address d_x_in, Address dh) {
  check_pointer("x_in", x_in, shape.rows * shape.width);
  check_pointer("rstd", rstd, shape.width ? shape.rows : 0);
  return {pointer<const void>(x_in), pointer<const void>(rstd), pointer<const void>(d_total),
          pointer<const void>(d_x_in), pointer<const void>(dh)};
}

ResidualNormGradients checked_gradients(const ResidualNormShape& shape,
                                        const ResidualNormInputs& in, Address dx, Address dbranch,
                                        Address dskip, Address dx0, Address parameters,
                                        Address partials, int64_t partial_rows) {
  const int64_t count = shape.rows * shape.width, blocks = residual_blocks(shape.rows);
  const int64_t numbers = residual_parameters(in) * shape.width;
  if (partial_rows != blocks) {
    refuse("partial_rows", partial_rows, "it has to be " + std::to_string(blocks));
  }
  check_pointer("dx", dx, count);
  if (in.branch_scale) check_pointer("dbranch", dbranch, count);
  if (in.skip_weight) check_pointer("dskip", dskip, count);
  if (in.mix) check_pointer("dx0", dx0, count);
  check_pointer("parameters", parameters, numbers);
  check_pointer("partials", partials, blocks * numbers);
  return {pointer<void>(dx),  pointer<void>(dbranch),    pointer<void>(dskip),
          pointer<void>(dx0), pointer<void>(parameters), pointer<void>(partials)};
}

void residual_norm(Address x, Address branch, Address branch_scale, Address skip,
                   Address skip_weight, Address x0, Address mix, Address total, Address x_in,
                   Address h, Address rstd, int dtype, int64_t rows, int64_t width, double scale,
                   double eps, int threads) {
  const auto shape = checked_shape(dtype, rows, width, scale, eps);
  const auto in = checked_inputs(shape, x, branch, branch_scale, skip, skip_weight, x0, mix);
  const auto out = checked_outputs(shape, x, total, x_in, h, rstd);
  cpu::kernels().residual_norm(shape, in, out, checked_threads(threads));
}

void residual_norm_backward(Address total, Address branch, Address branch_scale, Address skip,
                            Address skip_weight, Address x0, Address mix, Address x_in,
                            Address rstd, Address d_total, Address d_x_in, Address dh, Address dx,
                            Address dbranch, Address dskip, Address dx0, Address parameters,
                            Address partials, int64_t partial_rows, int dtype, int64_t rows,
                            int64_t width, double scale, double eps, int threads) {
  const auto shape = checked_shape(dtype, rows, width, scale, eps);
  const auto in = checked_inputs(shape, total, branch, branch_scale, skip, skip_weight, x0, mix);
  const auto upstream = checked_upstream(shape, x_in, rstd, d_total, d_x_in, dh);
  const auto out = checked_gradients(shape, in, dx, dbranch, dskip, dx0, parameters, partials,
                                     partial_rows);
  cpu::kernels().residual_norm_backward(shape, in, upstream, out, checked_threads(threads));
}

#if PGOLF_CUDA
void residual_norm_cuda(Address x, Address branch, Address branch_scale, Address skip,
                        Address skip_weight, Address x0, Address mix, Address total, Address x_in,
                        Address h, Address rstd, int dtype, int64_t rows, int64_t width,
                        double scale, double eps, Address stream) {
  checked_cuda_dtype("dtype", dtype);
  const auto shape = checked_shape(dtype, rows, width, scale, eps);
  const auto in = checked_inputs(shape, x, branch, branch_scale, skip, skip_weight, x0, mix);
  const auto out = checked_outputs(shape, x, total, x_in, h, rstd);
  check_launch(cuda::residual_norm(shape, in, out, pointer<void>(stream)));
}

void residual_norm_backward_cuda(Address total, Address branch, Address branch_scale, Address skip,
                                 Address skip_weight, Address x0, Address mix, Address x_in,
                                 Address rstd, Address d_total, Address d_x_in, Address dh,
                                 Address dx, Address dbranch, Address dskip, Address dx0,
                                 Address parameters, Address partials, int64_t partial_rows,
                                 int dtype, int64_t rows, int64_t width, double scale, double eps,
                                 Address stream) {
  checked_cuda_dtype("dtype", dtype);
  const auto shape = checked_shape(dtype, rows, width, scale, eps);
  const auto in = checked_inputs(shape, total, branch, branch_scale, skip, skip_weight, x0, mix);
  const auto upstream = checked_upstream(shape, x_in, rstd, d_total, d_x_in, dh);
  const auto out = checked_gradients(shape, in, dx, dbranch, dskip, dx0, parameters, partials,
                                     partial_rows);
  check_launch(cuda::residual_norm_backward(shape, in, upstream, out, pointer<void>(stream)));
}
#endif

}  // namespace

void bind_residual_norm(py::module_& m) {
  using A = py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  const auto define = [&](const char* name, auto function, const char* last) {
    m.def(name, function, unlocked, A("x"), A("branch"), A("branch_scale"), A("skip"),
          A("skip_weight"), A("x0"), A("mix"), A("total"), A("x_in"), A("h"), A("rstd"), A("dtype"),
          A("rows"), A("width"), A("scale"), A("eps"), A(last));
  };
  const auto define_backward = [&](const char* name, auto function, const char* last) {
    m.def(name, function, unlocked, A("total"), A("branch"), A("branch_scale"), A("skip"),
          A("skip_weight"), A("x0"), A("mix"), A("x_in"), A("rstd"), A("d_total"), A("d_x_in"),
          A("dh"), A("dx"), A("dbranch"), A("dskip"), A("dx0"), A("parameters"), A("partials"),
          A("partial_rows"), A("dtype"), A("rows"), A("width"), A("scale"), A("eps"), A(last));
  };
  define("residual_norm", &residual_norm, "threads");
  define_backward("residual_norm_backward", &residual_norm_backward, "threads");
#if PGOLF_CUDA
  define("residual_norm_cuda", &residual_norm_cuda, "stream");
  define_backward("residual_norm_backward_cuda", &residual_norm_backward_cuda, "stream");
#endif
}

}  // namespace pgolf::bindings
