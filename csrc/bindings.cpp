// pgolf._C: checks the arguments, lets go of the GIL and calls a launcher.
//
// Pointers arrive as integers (tensor.data_ptr()), so that nothing here depends on torch. The size of
// a buffer follows from the shape beside it, or is given and checked (pack_bits).
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings/checks.h"
#include "bindings/cpu.h"
#include "build_info.h"  // written by setup.py
#include "kernels.h"
#include "pack_bits.h"

namespace py = pybind11;

namespace {

using pgolf::bindings::pointer;

void check_pack_bits(std::uintptr_t codes, int64_t count, std::uintptr_t packed, int64_t bytes,
                     int bits) {
  using std::to_string;
  pgolf::bindings::check_bits(bits);
  if (count < 0) throw std::invalid_argument("count is " + to_string(count) + ": it is negative");
  if (bytes != pgolf::packed_bytes(count, bits)) {
    throw std::invalid_argument(to_string(count) + " codes of " + to_string(bits) + " bits take " +
                                to_string(pgolf::packed_bytes(count, bits)) + " bytes, not " +
                                to_string(bytes));
  }
  if (count > 0 && (codes == 0 || packed == 0)) throw std::invalid_argument("null pointer");
}

void pack_bits(std::uintptr_t codes, int64_t count, std::uintptr_t packed, int64_t bytes,
               int bits) {
  check_pack_bits(codes, count, packed, bytes, bits);
  py::gil_scoped_release unlocked;
  pgolf::cpu::kernels().pack_bits(pointer<const int8_t>(codes), pointer<uint8_t>(packed), count,
                                  bits);
}

void unpack_bits(std::uintptr_t packed, int64_t bytes, std::uintptr_t codes, int64_t count,
                 int bits) {
  check_pack_bits(codes, count, packed, bytes, bits);
  py::gil_scoped_release unlocked;
  pgolf::cpu::kernels().unpack_bits(pointer<const uint8_t>(packed), pointer<int8_t>(codes), count,
                                    bits);
}

#if PGOLF_CUDA
void check_launch(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA error: ") + error);
}

void pack_bits_cuda(std::uintptr_t codes, int64_t count, std::uintptr_t packed, int64_t bytes,
                    int bits, std::uintptr_t stream) {
  check_pack_bits(codes, count, packed, bytes, bits);
  py::gil_scoped_release unlocked;
  check_launch(pgolf::cuda::pack_bits(pointer<const int8_t>(codes), pointer<uint8_t>(packed),
                                      count, bits, pointer<void>(stream)));
}

void unpack_bits_cuda(std::uintptr_t packed, int64_t bytes, std::uintptr_t codes, int64_t count,
                      int bits, std::uintptr_t stream) {
  check_pack_bits(codes, count, packed, bytes, bits);
  py::gil_scoped_release unlocked;
  check_launch(pgolf::cuda::unpack_bits(pointer<const uint8_t>(packed), pointer<int8_t>(codes),
                                        count, bits, pointer<void>(stream)));
}
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = PGOLF_COMPILER;
  info["cuda"] = bool(PGOLF_CUDA);
  info["nvcc"] = PGOLF_NVCC;
  info["cudart"] = PGOLF_CUDART;
  info["archs"] = py::str(PGOLF_ARCHS).attr("split")();
  info["pybind11"] = PGOLF_PYBIND11;
  info["reason"] = PGOLF_REASON;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "pgolf's C++ and CUDA kernels; use them through pgolf.ops";
  m.def("build_info", &build_info, "What this module was built with, and why.");
  m.def("pack_bits", &pack_bits, py::arg("codes"), py::arg("count"), py::arg("packed"),
        py::arg("bytes"), py::arg("bits"));
  m.def("unpack_bits", &unpack_bits, py::arg("packed"), py::arg("bytes"), py::arg("codes"),
        py::arg("count"), py::arg("bits"));
  pgolf::bindings::bind_cpu(m);
#if PGOLF_CUDA
  m.def("pack_bits_cuda", &pack_bits_cuda, py::arg("codes"), py::arg("count"), py::arg("packed"),
        py::arg("bytes"), py::arg("bits"), py::arg("stream"));
  m.def("unpack_bits_cuda", &unpack_bits_cuda, py::arg("packed"), py::arg("bytes"),
        py::arg("codes"), py::arg("count"), py::arg("bits"), py::arg("stream"));
#endif
}
