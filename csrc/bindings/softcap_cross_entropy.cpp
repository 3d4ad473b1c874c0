// The rows of softcap_cross_entropy for Python.
#include "softcap_cross_entropy.h"

#include "bindings/checks.h"

namespace pgolf::bindings {
namespace {

template <typename On>
LossShape checked_loss_shape(Address z, Address targets, Address losses, int dtype, int64_t rows,
                             int64_t cols, double cap, double factor, bool gradient) {
  const int64_t count = count_of({{"rows", rows}, {"cols", cols}});
  if (rows > 0 && cols == 0) refuse("cols", cols, "a row without columns has no loss");
  if (!On::on_cpu && cols > kMaxLossColumns) {
    refuse("cols", cols, "at most " + std::to_string(kMaxLossColumns) + " fit a block");
  }
  check_pointer("z", z, count);
  check_pointer("targets", targets, rows);
  check_pointer("losses", losses, rows);
  return {rows, cols, cap, factor, gradient, checked_dtype<On>("dtype", dtype)};
}

template <typename On>
void softcap_cross_entropy(Address z, Address targets, Address losses, int dtype, int64_t rows,
                           int64_t cols, double cap, double factor, bool gradient, On on) {
  const LossShape shape =
      checked_loss_shape<On>(z, targets, losses, dtype, rows, cols, cap, factor, gradient);
  const int64_t* const ids = targets;
  for (int64_t i = 0; i < rows && On::on_cpu; ++i) {
    if ((ids[i] < 0 || ids[i] >= cols) && ids[i] != kIgnoredTarget) {
      refuse("targets[" + std::to_string(i) + "]", ids[i],
             "there are " + std::to_string(cols) + " columns, and " +
                 std::to_string(kIgnoredTarget) + " is ignored");
    }
  }
  launch::softcap_cross_entropy(on, shape, z, ids, losses);
}

const Functions functions = {
    {PGOLF_BOTH(softcap_cross_entropy, "z targets losses dtype rows cols cap factor gradient")},
    {{"softcap_cross_entropy.COLUMN_LIMITS.cuda", kMaxLossColumns}}};

}  // namespace
}  // namespace pgolf::bindings
