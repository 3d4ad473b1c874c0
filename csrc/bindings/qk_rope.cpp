// qk_rope for Python.
#include "qk_rope.h"

#include <array>

#include "bindings/checks.h"

namespace pgolf::bindings {
namespace {

using Strides = std::array<int64_t, 3>;

template <typename On>
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
  return {n, t, h, g, d, half, eps, norm, checked_dtype<On>("dtype", dtype)};
}

int64_t tokens_of(const QkRopeShape& shape) { return shape.batch * shape.time; }
int64_t packed_count(const QkRopeShape& shape) {
  return tokens_of(shape) * (shape.heads + 2 * shape.kv_heads) * shape.size;
}

// A factor that is missing has a null pointer.
QkRopeInputs checked_inputs(const QkRopeShape& shape, Address qkv, Address cos, Address sin,
                            Address gain, Address factor) {
  check_pointer("cos", cos, tokens_of(shape) * shape.half);
  check_pointer("sin", sin, tokens_of(shape) * shape.half);
  check_pointer("gain", gain, tokens_of(shape) * shape.heads);
  return {qkv, cos, sin, gain, factor};
}

QkRopeInputs checked_with_qkv(const QkRopeShape& shape, Address qkv, Address cos, Address sin,
                              Address gain, Address factor) {
  check_pointer("qkv", qkv, packed_count(shape));
  return checked_inputs(shape, qkv, cos, sin, gain, factor);
}

QkRopeOutputs checked_outputs(const QkRopeShape& shape, Address q, Address k, Address v) {
  const int64_t rows = tokens_of(shape) * shape.size;
  check_pointer("q", q, rows * shape.heads);
  check_pointer("k", k, rows * shape.kv_heads);
  check_pointer("v", v, rows * shape.kv_heads);
  return {q, k, v};
}

// Values (N, T, G d), or a table of as many rows as `rows` says with ids; a null pointer is none.
template <typename On>
QkRopeValue checked_value(const QkRopeShape& shape, Address value, Address ids, int64_t rows) {
  const int64_t width = shape.kv_heads * shape.size;
  const int64_t count = count_of({{"value_rows", rows}, {"kv_heads", width}});
  if (!ids) return {value, ids, tokens_of(shape)};
  check_pointer("value", value, count);
  if (On::on_cpu) check_ids("value_ids", ids, tokens_of(shape), rows);
  return {value, ids, rows};
}

// A gradient that is missing has a null pointer.
Heads checked_gradient(const std::string& name, const QkRopeShape& shape, int64_t heads,
                       Address address, const Strides& strides) {
  check_strides(name + "_strides", {{shape.batch, strides[0]},
                                    {shape.time, strides[1]},
                                    {heads, strides[2]}});
  return {address, strides[0], strides[1], strides[2]};
}

// Of q, k and v, and of v once more.
QkRopeGradients checked_gradients(const QkRopeShape& shape, const std::array<Address, 4>& addresses,
                                  const std::array<Strides, 4>& strides) {
  return {checked_gradient("dq", shape, shape.heads, addresses[0], strides[0]),
          checked_gradient("dk", shape, shape.kv_heads, addresses[1], strides[1]),
          checked_gradient("dv", shape, shape.kv_heads, addresses[2], strides[2]),
          checked_gradient("dv_again", shape, shape.kv_heads, addresses[3], strides[3])};
}

void check_gradient_outputs(const QkRopeShape& shape, Address dqkv, Address partials,
                            int64_t partial_rows) {
  const int64_t parts = rope_parts(tokens_of(shape)).count;
  if (partial_rows != parts) {
    refuse("partial_rows", partial_rows, "it has to be " + std::to_string(parts));
  }
  check_pointer("dqkv", dqkv, packed_count(shape));
  check_pointer("partials", partials, parts * shape.heads);
}

template <typename On>
void qk_rope(Address qkv, Address cos, Address sin, Address gain, Address factor, Address value,
             Address value_ids, int64_t value_rows, Address q, Address k, Address v, int dtype,
             int64_t n, int64_t t, int64_t h, int64_t g, int64_t d, int64_t half, double eps,
             bool norm, On on) {
  const QkRopeShape shape = checked_qk_rope_shape<On>(dtype, n, t, h, g, d, half, eps, norm);
  const QkRopeInputs in = checked_with_qkv(shape, qkv, cos, sin, gain, factor);
  const QkRopeOutputs out = checked_outputs(shape, q, k, v);
  launch::qk_rope(on, shape, in, checked_value<On>(shape, value, value_ids, value_rows), out);
}

template <typename On>
void qk_rope_backward(Address qkv, Address cos, Address sin, Address gain, Address factor,
                      Address dq, Address dk, Address dv, Address dv_again, Address dqkv,
                      Address partials, int64_t partial_rows, int dtype, int64_t n, int64_t t,
                      int64_t h, int64_t g, int64_t d, int64_t half, double eps, bool norm,
                      const Strides& dq_strides, const Strides& dk_strides,
                      const Strides& dv_strides, const Strides& dv_again_strides, On on) {
  const QkRopeShape shape = checked_qk_rope_shape<On>(dtype, n, t, h, g, d, half, eps, norm);
  const QkRopeInputs in = checked_with_qkv(shape, qkv, cos, sin, gain, factor);
  const QkRopeGradients gradients =
      checked_gradients(shape, {dq, dk, dv, dv_again},
                        {dq_strides, dk_strides, dv_strides, dv_again_strides});
  check_gradient_outputs(shape, dqkv, partials, partial_rows);
  launch::qk_rope_backward(on, shape, in, gradients, dqkv, partials);
}

template <typename On>
void qk_rope_backward_of_results(Address q, Address k, Address rstd, Address cos, Address sin,
                                 Address gain, Address factor, Address dq, Address dk, Address dv,
                                 Address dv_again, Address dqkv, Address partials,
                                 int64_t partial_rows, int dtype, int64_t n, int64_t t, int64_t h,
                                 int64_t g, int64_t d, int64_t half, const Strides& dq_strides,
                                 const Strides& dk_strides, const Strides& dv_strides,
                                 const Strides& dv_again_strides, On on) {
  const QkRopeShape shape = checked_qk_rope_shape<On>(dtype, n, t, h, g, d, half, 0, true);
  const QkRopeInputs in = checked_inputs(shape, Address{0}, cos, sin, gain, factor);
  check_pointer("q", q, tokens_of(shape) * shape.heads * shape.size);
  check_pointer("k", k, tokens_of(shape) * shape.kv_heads * shape.size);
  check_pointer("rstd", rstd, tokens_of(shape) * (shape.heads + shape.kv_heads));
  const QkRopeGradients gradients =
      checked_gradients(shape, {dq, dk, dv, dv_again},
                        {dq_strides, dk_strides, dv_strides, dv_again_strides});
  check_gradient_outputs(shape, dqkv, partials, partial_rows);
  const QkRopeResults results = {q, k, rstd};
  launch::qk_rope_backward_of_results(on, shape, in, results, gradients, dqkv, partials);
}

const Functions functions = {
    {
        PGOLF_BOTH(qk_rope,
                   "qkv cos sin gain factor value value_ids value_rows q k v dtype n t h g d half "
                   "eps norm"),
        PGOLF_BOTH(qk_rope_backward,
                   "qkv cos sin gain factor dq dk dv dv_again dqkv partials partial_rows "
                   "dtype n t h g d half eps norm dq_strides dk_strides dv_strides "
                   "dv_again_strides"),
        PGOLF_BOTH(qk_rope_backward_of_results,
                   "q k rstd cos sin gain factor dq dk dv dv_again dqkv partials partial_rows "
                   "dtype n t h g d half dq_strides dk_strides dv_strides dv_again_strides"),
    },
    {
        {"qk_rope.SIZE_LIMITS.cuda", kMaxRopeSize},
        {"qk_rope_kernels.MIN_PART", kRopeMinPart},
        {"qk_rope_kernels.MAX_PARTS", kRopeMaxParts},
    }};

}  // namespace
}  // namespace pgolf::bindings
