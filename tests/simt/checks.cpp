// What -fsanitize=alignment,bounds calls in kernels: accesses that make a GPU stop, or that leave an
// array, are errors of the kernel here. (A build with the whole of UBSan has its own functions.)
#include <stdexcept>

#include "machine.h"

namespace {

// The layouts that the compiler writes, as far as they are read here.
struct Place {
  const char* file;
  uint32_t line, column;
};
struct MisalignedAccess {
  Place place;
  const void* type;
  unsigned char log_alignment, kind;
};
struct IndexOutside {
  Place place;
};

void fail(const Place& place, const std::string& what) {
  const std::string text =
      simt::text_of(simt::Site{place.file, static_cast<int>(place.line), ""}) + ": " + what;
  if (simt::Machine::running()) simt::Machine::get().fail(text);
  throw std::runtime_error(text);
}

}  // namespace

#define SIMT_HANDLER extern "C" __attribute__((visibility("hidden"))) void

SIMT_HANDLER __ubsan_handle_type_mismatch_v1_abort(MisalignedAccess* access, uintptr_t address) {
  fail(access->place, "an address (" + std::to_string(address % 256) + " modulo 256) that is not " +
                          "aligned to " + std::to_string(1 << access->log_alignment) + " bytes");
}

SIMT_HANDLER __ubsan_handle_out_of_bounds_abort(IndexOutside* access, uintptr_t index) {
  fail(access->place, "the index " + std::to_string(static_cast<intptr_t>(index)) +
                          " lies outside of the array");
}
