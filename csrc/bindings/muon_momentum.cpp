// muon_momentum for Python.
#include "bindings/tensors.h"
#include "param_update.h"

namespace pgolf::bindings {
namespace {

struct Matrices {
  std::vector<MomentumMatrix> list;
  MuonMomentumShape shape;
};

Matrices checked_matrices(const Addresses& grads, const Addresses& momenta, const Addresses& xs,
                          const Sizes& rows, const Sizes& cols, const Codes& grad_dtypes,
                          const Codes& momentum_dtypes, int x_dtype, bool nesterov,
                          bool row_norm) {
  check_length("momenta", momenta, grads.size());
  check_length("xs", xs, grads.size());
  check_length("rows", rows, grads.size());
  check_length("cols", cols, grads.size());
  check_length("grad_dtypes", grad_dtypes, grads.size());
  check_length("momentum_dtypes", momentum_dtypes, grads.size());
  Matrices found = {{}, {static_cast<int64_t>(grads.size()), 0, nesterov, row_norm,
                         checked_float_dtype("x_dtype", x_dtype)}};
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t count = count_of({{"rows", rows[i]}, {"cols", cols[i]}});
    if (count == 0) refuse("rows x cols", count, "matrices have elements");
    found.list.push_back({grads[i], momenta[i],
                          xs[i], rows[i], cols[i], found.shape.rows,
                          checked_element("grads", grads[i], count, grad_dtypes[i]),
                          checked_element("momenta", momenta[i], count, momentum_dtypes[i])});
    checked_element("xs", xs[i], count, x_dtype);
    found.shape.rows += rows[i];
    if (found.shape.rows > INT32_MAX) refuse("rows", rows[i], "too many rows in one call");
  }
  return found;
}

void check_scalars(Address scalars, Address norm, Address squares, int64_t capacity, int64_t rows) {
  check_pointer("scalars", scalars, 1);
  check_pointer("norm", norm, 1);
  check_pointer("squares", squares, rows);
  if (capacity < rows) {
    refuse("capacity", capacity, "squares has to hold " + std::to_string(rows) + " numbers");
  }
}

template <typename On>
void muon_momentum(const Addresses& grads, const Addresses& momenta, const Addresses& xs,
                   const Sizes& rows, const Sizes& cols, const Codes& grad_dtypes,
                   const Codes& momentum_dtypes, int x_dtype, Address scalars, Address norm,
                   Address squares, int64_t capacity, bool nesterov, bool row_norm, On on) {
  const Matrices found = checked_matrices(grads, momenta, xs, rows, cols, grad_dtypes,
                                          momentum_dtypes, x_dtype, nesterov, row_norm);
  check_scalars(scalars, norm, squares, capacity, found.shape.rows);
  launch::muon_momentum(on, found.shape, found.list.data(), scalars,
                               norm, squares);
}

const Functions functions = {
    PGOLF_BOTH(muon_momentum,
               "grads momenta xs rows cols grad_dtypes momentum_dtypes x_dtype scalars norm squares "
               "capacity nesterov row_norm"),
};

}  // namespace
}  // namespace pgolf::bindings
