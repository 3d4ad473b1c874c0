// pack_bits and its inverse for Python.
#include "pack_bits.h"

#include "bindings/bindings.h"
#include "bindings/checks.h"

namespace py = pybind11;

namespace pgolf::bindings {
namespace {

void check_pack_bits(Address codes, int64_t count, Address packed, int64_t bytes,
                     int bits) {
  using std::to_string;
  check_bits(bits);
  if (count < 0) throw std::invalid_argument("count is " + to_string(count) + ": it is negative");
  if (bytes != packed_bytes(count, bits)) {
    throw std::invalid_argument(to_string(count) + " codes of " + to_string(bits) + " bits take " +
                                to_string(packed_bytes(count, bits)) + " bytes, not " +
                                to_string(bytes));
  }
  if (count > 0 && (codes == 0 || packed == 0)) throw std::invalid_argument("null pointer");
}

void pack_bits(Address codes, int64_t count, Address packed, int64_t bytes,
               int bits) {
  check_pack_bits(codes, count, packed, bytes, bits);
  cpu::kernels().pack_bits(pointer<const int8_t>(codes), pointer<uint8_t>(packed), count,
                                  bits);
}

void unpack_bits(Address packed, int64_t bytes, Address codes, int64_t count,
                 int bits) {
  check_pack_bits(codes, count, packed, bytes, bits);
  cpu::kernels().unpack_bits(pointer<const uint8_t>(packed), pointer<int8_t>(codes), count,
                                    bits);
}

#if PGOLF_CUDA
void pack_bits_cuda(Address codes, int64_t count, Address packed, int64_t bytes, int bits,
                    Address stream) {
  check_pack_bits(codes, count, packed, bytes, bits);
  check_launch(cuda::pack_bits(pointer<const int8_t>(codes), pointer<uint8_t>(packed), count, bits,
                               pointer<void>(stream)));
}

void unpack_bits_cuda(Address packed, int64_t bytes, Address codes, int64_t count, int bits,
                      Address stream) {
  check_pack_bits(codes, count, packed, bytes, bits);
  check_launch(cuda::unpack_bits(pointer<const uint8_t>(packed), pointer<int8_t>(codes), count,
                                 bits, pointer<void>(stream)));
}
#endif

}  // namespace

void bind_pack_bits(py::module_& m) {
  using A = py::arg;
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("pack_bits", &pack_bits, unlocked, A("codes"), A("count"), A("packed"), A("bytes"),
        A("bits"));
  m.def("unpack_bits", &unpack_bits, unlocked, A("packed"), A("bytes"), A("codes"), A("count"),
        A("bits"));
#if PGOLF_CUDA
  m.def("pack_bits_cuda", &pack_bits_cuda, unlocked, A("codes"), A("count"), A("packed"),
        A("bytes"), A("bits"), A("stream"));
  m.def("unpack_bits_cuda", &unpack_bits_cuda, unlocked, A("packed"), A("bytes"), A("codes"),
        A("count"), A("bits"), A("stream"));
#endif
}

}  // namespace pgolf::bindings
