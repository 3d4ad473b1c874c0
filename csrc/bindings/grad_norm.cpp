// grad_norm for Python.
#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "bindings/tensors.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

struct Gradients {
  std::vector<GradientTensor> tensors;
  int64_t chunks = 0;

  int count() const { return static_cast<int>(tensors.size()); }
};

Gradients checked_gradients(const Addresses& grads, const Sizes& counts, const Codes& dtypes,
                            Address partials, int64_t room, Address norm, Address bad) {
  check_length("counts", counts, grads.size());
  check_length("dtypes", dtypes, grads.size());
  Gradients list;
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t first = list.chunks;
    list.chunks = checked_chunks(first, counts[i]);
    list.tensors.push_back({pointer<const void>(grads[i]), counts[i], first,
                            checked_element("grads", grads[i], counts[i], dtypes[i])});
  }
  if (room < 2 * list.chunks) {
    refuse("room", room, "partials has to hold " + std::to_string(2 * list.chunks) + " numbers");
  }
  check_pointer("partials", partials, list.chunks);
  check_pointer("norm", norm, 1);
  check_pointer("bad", bad, 1);
  return list;
}

void grad_norm(const Addresses& grads, const Sizes& counts, const Codes& dtypes, Address partials,
               int64_t room, Address norm, Address bad, int threads) {
  const Gradients list = checked_gradients(grads, counts, dtypes, partials, room, norm, bad);
  cpu::kernels().grad_norm(list.tensors.data(), list.count(), list.chunks,
                           pointer<double>(partials), pointer<float>(norm), pointer<int64_t>(bad),
                           checked_threads(threads));
}

#if PGOLF_CUDA
void grad_norm_cuda(const Addresses& grads, const Sizes& counts, const Codes& dtypes,
                    Address partials, int64_t room, Address norm, Address bad, Address stream) {
  const Gradients list = checked_gradients(grads, counts, dtypes, partials, room, norm, bad);
  check_launch(cuda::grad_norm(list.tensors.data(), list.count(), list.chunks,
                               pointer<double>(partials), pointer<float>(norm),
                               pointer<int64_t>(bad), pointer<void>(stream)));
}
#endif

}  // namespace

void bind_grad_norm(py::module_& m) {
  using A = py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("grad_norm", &grad_norm, unlocked, A("grads"), A("counts"), A("dtypes"), A("partials"),
        A("room"), A("norm"), A("bad"), A("threads"));
#if PGOLF_CUDA
  m.def("grad_norm_cuda", &grad_norm_cuda, unlocked, A("grads"), A("counts"), A("dtypes"),
        A("partials"), A("room"), A("norm"), A("bad"), A("stream"));
#endif
}

}  // namespace pgolf::bindings
