// Chooses the instruction set at run time. Compiled for the plainest CPU, as all but csrc/cpu is.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "build_info.h"  // PGOLF_EACH_ISA(F): F(avx512) F(avx2) F(plain), as far as they were built
#include "kernels.h"

namespace pgolf::cpu {

#define PGOLF_DECLARE(isa)         \
  namespace isa {                  \
  extern const Kernels kKernels;   \
  }
PGOLF_EACH_ISA(PGOLF_DECLARE)

namespace {

struct Choice {
  const char* name;
  const Kernels* kernels;
};

#define PGOLF_LIST(isa) {#isa, &isa::kKernels},
constexpr Choice kChoices[] = {PGOLF_EACH_ISA(PGOLF_LIST)};  // best first; plain is last

bool cpu_has(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // What setup.py compiles for. (Asks whether the operating system keeps the registers, too.)
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == "avx2") return __builtin_cpu_supports("avx2");
#endif
  return isa == "plain";
}

Choice choose() {
  const char* wanted = std::getenv("PGOLF_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string usable;
  for (const Choice& choice : kChoices) {
    if (!cpu_has(choice.name)) continue;
    if (any || std::string(wanted) == choice.name) return choice;
    usable += (usable.empty() ? "" : ", ") + std::string(choice.name);
  }
  throw std::invalid_argument("PGOLF_CPU_ISA is " + std::string(wanted) +
                              ", which this CPU does not have or this build does not know: "
                              "choose one of " + usable + ", or unset it for the best of them");
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const char* isa() { return choice().name; }

const Kernels& kernels() { return *choice().kernels; }

}  // namespace pgolf::cpu
