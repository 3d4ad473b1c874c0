// The rows of softcap_cross_entropy for Python.
#include "softcap_cross_entropy.h"

#include <cmath>

#include "bindings/bindings.h"
#include "bindings/checks.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

LossShape checked_loss_shape(Address z, Address targets, Address losses, int dtype, int64_t rows,
                             int64_t cols, double cap, double factor, bool gradient) {
  const int64_t count = count_of({{"rows", rows}, {"cols", cols}});
  if (rows > 0 && cols == 0) refuse("cols", cols, "a row without columns has no loss");
  if (!(cap >= 0 && std::isfinite(cap))) refuse("cap", cap, "it has to be 0 or more, and finite");
  check_pointer("z", z, count);
  check_pointer("targets", targets, rows);
  check_pointer("losses", losses, rows);
  return {rows, cols, cap, factor, gradient, checked_dtype("dtype", dtype)};
}

void softcap_cross_entropy(Address z, Address targets, Address losses, int dtype, int64_t rows,
                           int64_t cols, double cap, double factor, bool gradient, int threads) {
  const LossShape shape =
      checked_loss_shape(z, targets, losses, dtype, rows, cols, cap, factor, gradient);
  const auto* const ids = pointer<const int64_t>(targets);
  for (int64_t i = 0; i < rows; ++i) {
    if ((ids[i] < 0 || ids[i] >= cols) && ids[i] != kIgnoredTarget) {
      refuse("targets[" + std::to_string(i) + "]", ids[i],
             "there are " + std::to_string(cols) + " columns, and " +
                 std::to_string(kIgnoredTarget) + " is ignored");
    }
  }
  cpu::kernels().softcap_cross_entropy(shape, pointer<void>(z), ids, pointer<void>(losses),
                                       checked_threads(threads));
}

#if PGOLF_CUDA
void softcap_cross_entropy_cuda(Address z, Address targets, Address losses, int dtype,
                                int64_t rows, int64_t cols, double cap, double factor,
                                bool gradient, Address stream) {
  const LossShape shape =
      checked_loss_shape(z, targets, losses, dtype, rows, cols, cap, factor, gradient);
  checked_cuda_dtype("dtype", dtype);
  if (cols > kMaxLossColumns) {
    refuse("cols", cols, "at most " + std::to_string(kMaxLossColumns) + " fit a block");
  }
  check_launch(cuda::softcap_cross_entropy(shape, pointer<void>(z), pointer<const int64_t>(targets),
                                           pointer<void>(losses), pointer<void>(stream)));
}
#endif

}  // namespace

void bind_softcap_cross_entropy(py::module_& m) {
  using A = py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("softcap_cross_entropy", &softcap_cross_entropy, unlocked, A("z"), A("targets"),
        A("losses"), A("dtype"), A("rows"), A("cols"), A("cap"), A("factor"), A("gradient"),
        A("threads"));
#if PGOLF_CUDA
  m.def("softcap_cross_entropy_cuda", &softcap_cross_entropy_cuda, unlocked, A("z"), A("targets"),
        A("losses"), A("dtype"), A("rows"), A("cols"), A("cap"), A("factor"), A("gradient"),
        A("stream"));
#endif
}

}  // namespace pgolf::bindings
