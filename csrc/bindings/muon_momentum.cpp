// muon_momentum for Python.
#include <pybind11/stl.h>

#include <cmath>

#include "bindings/bindings.h"
#include "bindings/tensors.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

struct Matrices {
  std::vector<MomentumMatrix> list;
  MuonMomentumShape shape;
};

Matrices checked_matrices(const Addresses& grads, const Addresses& momenta, const Addresses& xs,
                          const Sizes& rows, const Sizes& cols, const Codes& grad_dtypes,
                          const Codes& momentum_dtypes, int x_dtype, bool nesterov, bool row_norm,
                          double safety) {
  check_length("momenta", momenta, grads.size());
  check_length("xs", xs, grads.size());
  check_length("rows", rows, grads.size());
  check_length("cols", cols, grads.size());
  check_length("grad_dtypes", grad_dtypes, grads.size());
  check_length("momentum_dtypes", momentum_dtypes, grads.size());
  if (!(safety > 0 && std::isfinite(safety))) {
    refuse("safety", safety, "it has to be positive and finite");
  }
  Matrices found = {{}, {static_cast<int64_t>(grads.size()), 0, nesterov, row_norm, safety,
                         checked_cuda_dtype("x_dtype", x_dtype)}};
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t count = count_of({{"rows", rows[i]}, {"cols", cols[i]}});
    if (count == 0) refuse("rows x cols", count, "matrices have elements");
    found.list.push_back({pointer<const void>(grads[i]), pointer<void>(momenta[i]),
                          pointer<void>(xs[i]), rows[i], cols[i], found.shape.rows,
                          found.shape.rows,
                          checked_element("grads", grads[i], count, grad_dtypes[i]),
                          checked_element("momenta", momenta[i], count, momentum_dtypes[i])});
    checked_element("xs", xs[i], count, x_dtype);
    found.shape.rows += rows[i];
    if (found.shape.rows > INT32_MAX) refuse("rows", rows[i], "too many rows in one call");
  }
  return found;
}

void check_scalars(Address scalars, Address norm, Address squares, int64_t room, int64_t rows) {
  check_pointer("scalars", scalars, 1);
  check_pointer("norm", norm, 1);
  check_pointer("squares", squares, rows);
  if (room < rows) {
    refuse("room", room, "squares has to hold " + std::to_string(rows) + " numbers");
  }
}

void muon_momentum(const Addresses& grads, const Addresses& momenta, const Addresses& xs,
                   const Sizes& rows, const Sizes& cols, const Codes& grad_dtypes,
                   const Codes& momentum_dtypes, int x_dtype, Address scalars, Address norm,
                   Address squares, int64_t room, bool nesterov, bool row_norm, double safety,
                   int threads) {
  const Matrices found = checked_matrices(grads, momenta, xs, rows, cols, grad_dtypes,
                                          momentum_dtypes, x_dtype, nesterov, row_norm, safety);
  check_scalars(scalars, norm, squares, room, found.shape.rows);
  cpu::kernels().muon_momentum(found.shape, found.list.data(), pointer<UpdateScalars>(scalars),
                               pointer<float>(norm), pointer<double>(squares),
                               checked_threads(threads));
}

#if PGOLF_CUDA
void muon_momentum_cuda(const Addresses& grads, const Addresses& momenta, const Addresses& xs,
                        const Sizes& rows, const Sizes& cols, const Codes& grad_dtypes,
                        const Codes& momentum_dtypes, int x_dtype, Address scalars, Address norm,
                        Address squares, int64_t room, bool nesterov, bool row_norm, double safety,
                        Address stream) {
  const Matrices found = checked_matrices(grads, momenta, xs, rows, cols, grad_dtypes,
                                          momentum_dtypes, x_dtype, nesterov, row_norm, safety);
  check_scalars(scalars, norm, squares, room, found.shape.rows);
  check_launch(cuda::muon_momentum(found.shape, found.list.data(), pointer<UpdateScalars>(scalars),
                                   pointer<float>(norm), pointer<double>(squares),
                                   pointer<void>(stream)));
}
#endif

}  // namespace

void bind_muon_momentum(py::module_& m) {
  using A = py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("muon_momentum", &muon_momentum, unlocked, A("grads"), A("momenta"), A("xs"), A("rows"),
        A("cols"), A("grad_dtypes"), A("momentum_dtypes"), A("x_dtype"), A("scalars"), A("norm"),
        A("squares"), A("room"), A("nesterov"), A("row_norm"), A("safety"), A("threads"));
#if PGOLF_CUDA
  m.def("muon_momentum_cuda", &muon_momentum_cuda, unlocked, A("grads"), A("momenta"), A("xs"),
        A("rows"), A("cols"), A("grad_dtypes"), A("momentum_dtypes"), A("x_dtype"), A("scalars"),
        A("norm"), A("squares"), A("room"), A("nesterov"), A("row_norm"), A("safety"), A("stream"));
#endif
}

}  // namespace pgolf::bindings
