// Fibers: functions that can be left in the middle and continued, all on one thread of the operating
// system.
#pragma once

#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

// Where a fiber, or the caller of fibers, was left.
class Context {
 public:
  Context() = default;
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

 protected:
  friend void switch_to(Context& from, Context& to);
  friend void arrived();

#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;  // the registers that have to be kept lie there
#else
  ucontext_t machine_ = {};
#endif
  // What AddressSanitizer wants to know: its own stack and the bounds of this one.
  void* shadow_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

// Continues `to` where it was left; returns when something switches back to `from`.
void switch_to(Context& from, Context& to);
// The first call in a fiber that has just begun.
void arrived();

class Fiber : public Context {
 public:
  static constexpr size_t kStackBytes = 256 << 10;  // only the pages that are touched exist

  // Runs entry(), which must not return, when it is first switched to.
  explicit Fiber(void (*entry)());
  ~Fiber();

  // As if it had just been made, wherever it was left.
  void restart();

 private:
  void (*const entry_)();
  char* memory_;  // below the stack lies a page that cannot be touched
};

}  // namespace simt
