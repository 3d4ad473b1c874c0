// xsa for Python.
#include "bindings/checks.h"
#include "xsa.h"

namespace pgolf::bindings {
namespace {

using Strides = std::array<int64_t, 3>;

template <typename On>
XsaShape checked_shape(int dtype, int64_t n, int64_t t, int64_t h, int64_t g, int64_t d) {
  const XsaShape shape = {n, t, h, g, d, checked_dtype<On>("dtype", dtype)};
  count_of({{"h", h}, {"n", n}, {"t", t}, {"d", d}});
  count_of({{"g", g}, {"n", n}, {"t", t}, {"d", d}});
  if (g == 0 ? h != 0 : h % g != 0) {
    refuse("h", h, "it has to be a multiple of g, which is " + std::to_string(g));
  }
  if (g > 0 && h / g > kMaxHeadsPerGroup) {
    refuse("h", h, "at most " + std::to_string(kMaxHeadsPerGroup) +
                       " query heads may share a value head, and g is " + std::to_string(g));
  }
  if (!On::on_cpu && d > kMaxXsaSize) {
    refuse("d", d, "heads may have at most " + std::to_string(kMaxXsaSize) + " elements");
  }
  return shape;
}

Heads checked_heads(const std::string& name, const XsaShape& shape, int64_t heads,
                         Address address, const Strides& strides) {
  check_pointer(name, address, shape.batch * shape.time * heads * shape.size);
  check_strides(name + "_strides", {{shape.batch, strides[0]},
                                    {shape.time, strides[1]},
                                    {heads, strides[2]}});
  return {address, strides[0], strides[1], strides[2]};
}

void check_output(const std::string& name, const XsaShape& shape, int64_t heads,
                        Address address) {
  check_pointer(name, address, shape.batch * shape.time * heads * shape.size);
}

template <typename On>
void xsa(Address y, Address v, Address z, int dtype, int64_t n, int64_t t, int64_t h, int64_t g,
         int64_t d, const Strides& y_strides, const Strides& v_strides, On on) {
  const XsaShape shape = checked_shape<On>(dtype, n, t, h, g, d);
  const Heads y_heads = checked_heads("y", shape, h, y, y_strides);
  const Heads v_heads = checked_heads("v", shape, g, v, v_strides);
  check_output("z", shape, h, z);
  launch::xsa(on, shape, y_heads, v_heads, z);
}

template <typename On>
void xsa_backward(Address dz, Address y, Address v, Address dy, Address dv, int dtype, int64_t n,
                  int64_t t, int64_t h, int64_t g, int64_t d, const Strides& dz_strides,
                  const Strides& y_strides, const Strides& v_strides, On on) {
  const XsaShape shape = checked_shape<On>(dtype, n, t, h, g, d);
  const Heads dz_heads = checked_heads("dz", shape, h, dz, dz_strides);
  const Heads y_heads = checked_heads("y", shape, h, y, y_strides);
  const Heads v_heads = checked_heads("v", shape, g, v, v_strides);
  check_output("dy", shape, h, dy);
  check_output("dv", shape, g, dv);
  launch::xsa_backward(on, shape, dz_heads, y_heads, v_heads, dy,
                              dv);
}

const Functions functions = {
    {
        PGOLF_BOTH(xsa, "y v z dtype n t h g d y_strides v_strides"),
        PGOLF_BOTH(xsa_backward,
                   "dz y v dy dv dtype n t h g d dz_strides y_strides v_strides"),
    },
    {
        {"xsa.SIZE_LIMITS.cuda", kMaxXsaSize},
        {"xsa.SHARE_LIMITS.cpu", kMaxHeadsPerGroup},
    }};

}  // namespace
}  // namespace pgolf::bindings
