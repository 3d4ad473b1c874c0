// Runs the threads of a launch, block after block, and refuses what CUDA leaves undefined:
//
//   - a warp collective (shuffle, vote, __syncwarp) for whose mask not all lanes come, or not to the
//     same place in the source with the same mask; a lane that its own mask does not name
//   - a shuffle that reads a lane outside of the mask, or whose width is no power of two
//   - __syncthreads that not all threads of the block reach, also because some have returned
//   - a misaligned access, and an index outside of an array whose size is known (checks.cpp)
//
// Shared memory is all NaN (bytes of 0xFF) at the start of every block. Between two meetings the
// threads run one after the other, in an order that the environment variable PGOLF_EMULATOR_SEED
// chooses: 0 forward, 1 backward, others at random, so that a missing barrier shows.
#pragma once

#include <array>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

namespace simt {

constexpr int kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 << 10;
constexpr int kMultiprocessors = 4;  // few, so that persistent kernels go round their loops

// What the lanes of a mask wait for. It belongs to the lowest of them.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  Collective kind = {};
  int width = 0;
  Site site = {};
};

struct Lane {
  uint3 index;             // threadIdx
  Fiber* fiber = nullptr;  // from its first instruction to its last
  uint64_t value = 0;      // what it brings to a meeting, and then what it gets
  int argument = 0;
  Site site = {};  // of the collective or barrier at which it waits
};

// Lanes as bits. A lane that is none of the first three waits for a meeting.
struct Warp {
  unsigned runnable = 0, at_barrier = 0, done = 0;
  std::array<Lane, kWarp> lanes;
  std::array<Meeting, kWarp> meetings;
};

// One for each thread of the operating system.
class Machine {
 public:
  static Machine& get();  // of this thread
  static bool running();  // whether this thread is in a kernel

  // Throws std::runtime_error where a thread broke a rule.
  void launch(const cudaLaunchConfig_t& config, const void* kernel, void (*thread)(const void*),
              const void* context);

  // For the thread that is running.
  uint64_t meet(Collective kind, unsigned mask, uint64_t value, int argument, int width, Site site);
  void block_barrier(Site site);
  [[noreturn]] void fail(const std::string& what);
  void* dynamic_shared() { return dynamic_shared_.data(); }

 private:
  static void fiber_main();

  void prepare(const cudaLaunchConfig_t& config, unsigned seed);
  void run_block(uint64_t block);
  void order_threads(uint64_t block);
  void run_warp(Warp& warp);
  void resume(Warp& warp, int lane);
  void wait();
  void open_barrier();
  void share(const Meeting& meeting);
  int source(const Meeting& meeting, int lane) const;
  void explain_meeting();
  std::string state_of(unsigned thread) const;
  void note_failure(const std::string& what, const Warp& warp, int lane);
  void abandon();

  Context scheduler_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;

  // The launch.
  const void* kernel_ = nullptr;
  void (*thread_)(const void*) = nullptr;
  const void* context_ = nullptr;
  unsigned seed_ = 0;
  std::vector<Warp> warps_;
  std::vector<int> warp_order_;
  std::array<int, kWarp> lane_order_;
  std::vector<unsigned char> dynamic_shared_;  // operator new aligns it to 16 bytes

  // The thread that runs, and what it did wrong.
  Warp* warp_ = nullptr;
  int lane_ = 0;
  std::string failure_;
};

// "src/file.cu:12"
std::string text_of(Site site);
std::string text_of(uint3 index);
// The name of a function of this module, from its symbol table; its address where there is none.
std::string name_of(const void* function);

}  // namespace simt
