// grad_norm for Python.
#include "bindings/tensors.h"

namespace pgolf::bindings {
namespace {

struct Gradients {
  std::vector<GradientTensor> tensors;
  int64_t chunks = 0;

  int count() const { return static_cast<int>(tensors.size()); }
};

Gradients checked_gradients(const Addresses& grads, const Sizes& counts, const Codes& dtypes,
                            Address partials, int64_t capacity, Address norm, Address bad) {
  check_length("counts", counts, grads.size());
  check_length("dtypes", dtypes, grads.size());
  Gradients list;
  for (size_t i = 0; i < grads.size(); ++i) {
    const int64_t first = list.chunks;
    list.chunks = checked_chunks(first, counts[i]);
    list.tensors.push_back({grads[i], counts[i], first,
                            checked_element("grads", grads[i], counts[i], dtypes[i])});
  }
  if (capacity < 2 * list.chunks) {
    refuse("capacity", capacity,
           "partials has to hold " + std::to_string(2 * list.chunks) + " numbers");
  }
  check_pointer("partials", partials, list.chunks);
  check_pointer("norm", norm, 1);
  check_pointer("bad", bad, 1);
  return list;
}

template <typename On>
void grad_norm(const Addresses& grads, const Sizes& counts, const Codes& dtypes, Address partials,
               int64_t capacity, Address norm, Address bad, On on) {
  const Gradients list = checked_gradients(grads, counts, dtypes, partials, capacity, norm, bad);
  launch::grad_norm(on, list.tensors.data(), list.count(), list.chunks, partials, norm, bad);
}

const Functions functions = {
    {PGOLF_BOTH(grad_norm, "grads counts dtypes partials capacity norm bad")},
    {{"multi_tensor.CHUNK", kChunk}}};

}  // namespace
}  // namespace pgolf::bindings
