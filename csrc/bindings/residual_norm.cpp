// residual_norm for Python.
#include "residual_norm.h"

#include "bindings/checks.h"

namespace pgolf::bindings {
namespace {

template <typename On>
ResidualNormShape checked_shape(int dtype, int64_t rows, int64_t width, double scale, double eps,
                                bool factored) {
  count_of({{"rows", rows}, {"width", width}, {"width", 4}});  // four rows of sums, too
  if (width > kMaxResidualWidth) {
    refuse("width", width, "it may be at most " + std::to_string(kMaxResidualWidth));
  }
  return {rows, width, scale, eps, factored, checked_dtype<On>("dtype", dtype)};
}

// Null pointers are what is not there; these would be half there.
ResidualNormInputs checked_inputs(const ResidualNormShape& shape, Address x, Address branch,
                                  Address branch_scale, Address skip, Address skip_weight,
                                  Address x0, Address mix0, Address mix1) {
  const int64_t count = shape.rows * shape.width;
  if (branch_scale) check_pointer("branch", branch, count);
  if (skip_weight) check_pointer("skip", skip, count);
  if (mix1) check_pointer("x0", x0, count);
  return {x, branch, branch_scale, skip, skip_weight, x0, mix0, mix1};
}

ResidualNormOutputs checked_outputs(const ResidualNormShape& shape, Address x, Address total,
                                    Address x_in, Address h, Address rstd) {
  check_pointer("x", x, shape.rows * shape.width);
  if (!shape.factored) check_pointer("h", h, shape.rows * shape.width);
  check_pointer("rstd", rstd, shape.width ? shape.rows : 0);
  return {total, x_in, h, rstd};
}

ResidualNormUpstream checked_upstream(const ResidualNormShape& shape, Address x_in, Address rstd,
                                      Address d_total, Address d_x_in, Address dh,
                                      Address total, Address total_scale, Address x_in_scale) {
  if (total_scale) check_pointer("total", total, shape.rows * shape.width);
  check_pointer("x_in", x_in, shape.rows * shape.width);
  check_pointer("rstd", rstd, shape.width ? shape.rows : 0);
  return {x_in, rstd, d_total, d_x_in, dh, total_scale, x_in_scale};
}

ResidualNormGradients checked_gradients(const ResidualNormShape& shape,
                                        const ResidualNormInputs& in,
                                        const ResidualNormUpstream& upstream, Address dx,
                                        Address dbranch, Address dskip, Address dx0,
                                        Address partials, int64_t partial_rows) {
  const int64_t count = shape.rows * shape.width, parts = residual_parts(shape.rows).count;
  const int64_t numbers = residual_parameters(in, upstream) * shape.width;
  if (partial_rows != parts) {
    refuse("partial_rows", partial_rows, "it has to be " + std::to_string(parts));
  }
  check_pointer("dx", dx, count);
  if (in.branch_scale) check_pointer("dbranch", dbranch, count);
  if (in.skip_weight) check_pointer("dskip", dskip, count);
  if (in.mix1) check_pointer("dx0", dx0, count);
  check_pointer("partials", partials, parts * numbers);
  return {dx, dbranch, dskip, dx0, partials};
}

template <typename On>
void residual_norm(Address x, Address branch, Address branch_scale, Address skip,
                   Address skip_weight, Address x0, Address mix0, Address mix1, Address total,
                   Address x_in, Address h, Address rstd, int dtype, int64_t rows, int64_t width,
                   double scale, double eps, bool factored, On on) {
  const auto shape = checked_shape<On>(dtype, rows, width, scale, eps, factored);
  const auto in = checked_inputs(shape, x, branch, branch_scale, skip, skip_weight, x0, mix0, mix1);
  const auto out = checked_outputs(shape, x, total, x_in, h, rstd);
  launch::residual_norm(on, shape, in, out);
}

template <typename On>
void residual_norm_backward(Address total, Address branch, Address branch_scale, Address skip,
                            Address skip_weight, Address x0, Address mix0, Address mix1,
                            Address total_scale, Address x_in_scale, Address x_in, Address rstd,
                            Address d_total, Address d_x_in, Address dh, Address dx,
                            Address dbranch, Address dskip, Address dx0, Address partials,
                            int64_t partial_rows, int dtype, int64_t rows, int64_t width,
                            double scale, double eps, bool factored, On on) {
  const auto shape = checked_shape<On>(dtype, rows, width, scale, eps, factored);
  const auto in =
      checked_inputs(shape, total, branch, branch_scale, skip, skip_weight, x0, mix0, mix1);
  const auto upstream = checked_upstream(shape, x_in, rstd, d_total, d_x_in, dh, total,
                                         total_scale, x_in_scale);
  const auto out = checked_gradients(shape, in, upstream, dx, dbranch, dskip, dx0, partials,
                                     partial_rows);
  launch::residual_norm_backward(on, shape, in, upstream, out);
}

const Functions functions = {
    {
        PGOLF_BOTH(residual_norm,
                   "x branch branch_scale skip skip_weight x0 mix0 mix1 total x_in h rstd dtype "
                   "rows width scale eps factored"),
        PGOLF_BOTH(residual_norm_backward,
                   "total branch branch_scale skip skip_weight x0 mix0 mix1 total_scale x_in_scale "
                   "x_in rstd d_total d_x_in dh dx dbranch dskip dx0 partials partial_rows dtype "
                   "rows width scale eps factored"),
    },
    {
        {"residual_norm.WIDTH_LIMITS.cuda", kMaxResidualWidth},
        {"residual_norm_kernels.MIN_PART", kResidualMinPart},
        {"residual_norm_kernels.MAX_PARTS", kResidualMaxParts},
    }};

}  // namespace
}  // namespace pgolf::bindings
