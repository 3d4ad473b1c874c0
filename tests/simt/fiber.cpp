#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr size_t kGuardBytes = 64 << 10;  // a multiple of every page size

// Who was left by the last switch. (A compiler may keep its address over a switch, since a fiber
// stays on one thread.)
thread_local Context* left = nullptr;

}  // namespace

#if defined(__x86_64__)

// Pushes the registers that a call keeps, and pops those of the other side. swapcontext would do,
// with two system calls for a mask of signals that never changes.
extern "C" void simt_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

void Fiber::restart() {
  char* const top = memory_ + kGuardBytes + kStackBytes;
  auto* const words = reinterpret_cast<void**>(top) - 10;
  for (int i = 0; i < 6; ++i) words[i] = nullptr;    // the registers
  words[6] = reinterpret_cast<void*>(entry_);        // where `ret` goes
  words[7] = words[8] = words[9] = nullptr;          // no caller; and the alignment of a call
  stack_pointer_ = words;
#else

void Fiber::restart() {
  getcontext(&machine_);
  machine_.uc_stack.ss_sp = memory_ + kGuardBytes;
  machine_.uc_stack.ss_size = kStackBytes;
  machine_.uc_link = nullptr;
  makecontext(&machine_, entry_, 0);
#endif
  bottom_ = memory_ + kGuardBytes;
  size_ = kStackBytes;
  shadow_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom_, size_);
#endif
}

Fiber::Fiber(void (*entry)()) : entry_(entry) {
  void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  mprotect(memory_, kGuardBytes, PROT_NONE);
  restart();
}

Fiber::~Fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(bottom_, size_);
#endif
  munmap(memory_, kGuardBytes + kStackBytes);
}

void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  Context* const from = left;
  __sanitizer_finish_switch_fiber(nullptr, &from->bottom_, &from->size_);
#endif
}

void switch_to(Context& from, Context& to) {
  left = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.shadow_, to.bottom_, to.size_);
#endif
#if defined(__x86_64__)
  simt_switch(&from.stack_pointer_, to.stack_pointer_);
#else
  swapcontext(&from.machine_, &to.machine_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.shadow_, &left->bottom_, &left->size_);
#endif
}

}  // namespace simt
