// scaled_copies for Python.
#include "scaled_copies.h"

#include "bindings/tensors.h"

namespace pgolf::bindings {
namespace {

template <typename On>
void scaled_copies_backward(const Addresses& gradients, Address x, Address factors, Address dx,
                            Address partials, int64_t partial_rows, int dtype, int64_t rows,
                            int64_t width, On on) {
  const int64_t copies = static_cast<int64_t>(gradients.size());
  const int64_t numbers = count_of({{"width", width}, {"the length of gradients", copies}});
  const int64_t count = count_of({{"rows", rows}, {"width", width}});
  const int64_t parts = copies_parts(rows).count;
  if (partial_rows != parts) {
    refuse("partial_rows", partial_rows, "it has to be " + std::to_string(parts));
  }
  count_of({{"rows", parts}, {"width", width}, {"the length of gradients", copies}});
  if (copies > INT32_MAX) refuse("the length of gradients", copies, "there are too many");
  check_pointer("x", x, count);
  check_pointer("factors", factors, numbers);
  check_pointer("dx", dx, count);
  check_pointer("partials", partials, parts * numbers);
  const std::vector<const void*> given(gradients.begin(), gradients.end());
  const ScaledCopiesShape shape{rows, width, static_cast<int>(copies),
                                checked_dtype<On>("dtype", dtype)};
  const ScaledCopiesInputs in{x, factors};
  launch::scaled_copies_backward(on, shape, in, given.data(), dx, partials);
}

const Functions functions = {
    {PGOLF_BOTH(scaled_copies_backward,
                "gradients x factors dx partials partial_rows dtype rows width")},
    {
        {"scaled_copies.MIN_PART", kCopiesMinPart},
        {"scaled_copies.MAX_PARTS", kCopiesMaxParts},
    }};

}  // namespace
}  // namespace pgolf::bindings
