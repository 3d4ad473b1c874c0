#include "machine.h"

#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>

// All __shared__ variables lie between these two: the linker keeps the order of its objects.
extern __thread char simt_shared_begin[64], simt_shared_end[64];

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr unsigned char kPoison = 0xFF;

__thread bool in_kernel = false;
__thread Machine* this_machine = nullptr;

// Not a thread_local object: its destructor would come after that of the thread's memory.
pthread_key_t machine_key() {
  static const pthread_key_t made = [] {
    pthread_key_t key;
    pthread_key_create(&key, [](void* machine) { delete static_cast<Machine*>(machine); });
    return key;
  }();
  return made;
}

unsigned seed_of_environment() {
  const char* const text = std::getenv("PGOLF_EMULATOR_SEED");
  return text ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : 0;
}

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::syncwarp: return "__syncwarp";
    case Collective::shfl: return "__shfl_sync";
    case Collective::shfl_up: return "__shfl_up_sync";
    case Collective::shfl_down: return "__shfl_down_sync";
    case Collective::shfl_xor: return "__shfl_xor_sync";
    case Collective::ballot: return "a vote";
  }
  return "";
}

std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "%#x", mask);
  return text;
}

std::string text_of(const Meeting& meeting) {
  return std::string(name_of(meeting.kind)) + " at " + text_of(meeting.site) + " with mask " +
         hex(meeting.mask);
}

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

int lowest(unsigned mask) { return __builtin_ctz(mask); }

}  // namespace

std::string text_of(Site site) {
  const char* const slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string text_of(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

Machine& Machine::get() {
  if (this_machine == nullptr) {
    this_machine = new Machine;
    pthread_setspecific(machine_key(), this_machine);
  }
  return *this_machine;
}

bool Machine::running() { return in_kernel; }

void Machine::launch(const cudaLaunchConfig_t& config, const void* kernel,
                     void (*thread)(const void*), const void* context) {
  kernel_ = kernel;
  thread_ = thread;
  context_ = context;
  prepare(config, seed_of_environment());
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  for (uint64_t i = 0; i < blocks && failure_.empty(); ++i) {
    run_block(seed_ % 2 ? blocks - 1 - i : i);
  }
  if (failure_.empty()) return;
  abandon();
  throw std::runtime_error(failure_);
}

void Machine::prepare(const cudaLaunchConfig_t& config, unsigned seed) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  gridDim = {grid.x, grid.y, grid.z};
  blockDim = {block.x, block.y, block.z};
  seed_ = seed;
  failure_.clear();
  const unsigned threads = block.x * block.y * block.z;
  warps_.resize((threads + kWarp - 1) / kWarp);
  for (unsigned i = 0; i < threads; ++i) {
    const uint3 index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    warps_[i / kWarp].lanes[i % kWarp].index = index;
  }
  warp_order_.resize(warps_.size());
  std::iota(warp_order_.begin(), warp_order_.end(), 0);
  std::iota(lane_order_.begin(), lane_order_.end(), 0);
  if (seed_ == 1) {
    std::reverse(warp_order_.begin(), warp_order_.end());
    std::reverse(lane_order_.begin(), lane_order_.end());
  }
  dynamic_shared_.resize(config.dynamicSmemBytes);
}

void Machine::order_threads(uint64_t block) {
  std::minstd_rand random(seed_ + 0x9E3779B9u * static_cast<unsigned>(block + 1));
  const auto shuffle = [&](auto& order) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  };
  shuffle(warp_order_);
  shuffle(lane_order_);
}

void Machine::run_block(uint64_t block) {
  blockIdx = {static_cast<unsigned>(block % gridDim.x),
              static_cast<unsigned>(block / gridDim.x % gridDim.y),
              static_cast<unsigned>(block / gridDim.x / gridDim.y)};
  if (seed_ > 1) order_threads(block);
  std::memset(simt_shared_begin, kPoison, simt_shared_end - simt_shared_begin);
  std::fill(dynamic_shared_.begin(), dynamic_shared_.end(), kPoison);
  unsigned left = blockDim.x * blockDim.y * blockDim.z;
  for (Warp& warp : warps_) {
    const unsigned lanes = std::min<unsigned>(left, kWarp);
    warp.runnable = ~0u >> (kWarp - lanes);
    warp.at_barrier = warp.done = 0;
    left -= lanes;
  }
  const auto runnable = [](const Warp& warp) { return warp.runnable != 0; };
  do {
    for (const int i : warp_order_) {
      run_warp(warps_[i]);
      if (!failure_.empty()) return;
    }
    open_barrier();
  } while (std::any_of(warps_.begin(), warps_.end(), runnable));
}

// Until all of its lanes have returned or wait for others.
void Machine::run_warp(Warp& warp) {
  while (warp.runnable != 0) {
    for (const int lane : lane_order_) {
      if (warp.runnable >> lane & 1) resume(warp, lane);
      if (!failure_.empty()) return;
    }
  }
}

void Machine::resume(Warp& warp, int lane) {
  Lane& thread = warp.lanes[lane];
  if (thread.fiber == nullptr) {
    if (idle_.empty()) {
      fibers_.push_back(std::make_unique<Fiber>(&Machine::fiber_main));
      idle_.push_back(fibers_.back().get());
    }
    thread.fiber = idle_.back();
    idle_.pop_back();
  }
  warp_ = &warp;
  lane_ = lane;
  threadIdx = thread.index;
  in_kernel = true;
  switch_to(scheduler_, *thread.fiber);
  in_kernel = false;
  if (warp.done >> lane & 1) {
    idle_.push_back(thread.fiber);
    thread.fiber = nullptr;
  }
}

void Machine::fiber_main() {
  arrived();
  Machine& machine = get();
  for (;;) {  // a fiber runs one thread after the other, as long as none waits
    machine.thread_(machine.context_);
    Warp& warp = *machine.warp_;
    warp.done |= 1u << machine.lane_;
    warp.runnable &= ~(1u << machine.lane_);
    switch_to(*warp.lanes[machine.lane_].fiber, machine.scheduler_);
  }
}

void Machine::wait() { switch_to(*warp_->lanes[lane_].fiber, scheduler_); }

void Machine::note_failure(const std::string& what, const Warp& warp, int lane) {
  failure_ = what + " [kernel " + simt::name_of(kernel_) + ", block " + text_of(blockIdx) +
             ", thread " + text_of(warp.lanes[lane].index) + "]";
}

void Machine::fail(const std::string& what) {
  note_failure(what, *warp_, lane_);
  wait();
  std::abort();  // nobody continues a thread that has failed
}

// Threads of a launch that failed are left where they are: they own nothing.
void Machine::abandon() {
  for (Warp& warp : warps_) {
    for (Lane& lane : warp.lanes) {
      if (lane.fiber == nullptr) continue;
      lane.fiber->restart();
      idle_.push_back(lane.fiber);
      lane.fiber = nullptr;
    }
    warp.meetings.fill({});
  }
}

// --- meetings of a warp --------------------------------------------------------------------------

uint64_t Machine::meet(Collective kind, unsigned mask, uint64_t value, int argument, int width,
                       Site site) {
  Warp& warp = *warp_;
  Lane& lane = warp.lanes[lane_];
  const unsigned self = 1u << lane_;
  lane.value = value;
  lane.argument = argument;
  lane.site = site;
  const Meeting mine = {mask, 0, kind, width, site};
  if ((mask & self) == 0) fail(text_of(mine) + ": the mask does not name this lane");
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) {
    fail(text_of(mine) + ": the width " + std::to_string(width) + " is no power of two up to 32");
  }
  Meeting& meeting = warp.meetings[lowest(mask)];
  if (meeting.arrived == 0) meeting = mine;
  if (meeting.mask != mask || meeting.kind != kind || meeting.width != width ||
      !same(meeting.site, site)) {
    fail(text_of(mine) + ": other lanes wait for " + text_of(meeting));
  }
  meeting.arrived |= self;
  warp.runnable &= ~self;
  if (meeting.arrived != mask) {
    wait();
  } else {
    share(meeting);
    meeting.arrived = 0;
    warp.runnable |= mask;
  }
  return lane.value;
}

// All are there: what each of them gets.
void Machine::share(const Meeting& meeting) {
  if (meeting.kind == Collective::syncwarp) return;
  const bool votes = meeting.kind == Collective::ballot;
  std::array<uint64_t, kWarp> got;
  uint64_t ballot = 0;
  for (unsigned rest = meeting.mask; rest != 0; rest &= rest - 1) {
    const int lane = lowest(rest), from = votes ? lane : source(meeting, lane);
    ballot |= (warp_->lanes[lane].value & 1) << lane;
    got[lane] = warp_->lanes[from].value;
    if ((meeting.mask >> from & 1) == 0) {
      note_failure(text_of(meeting) + ": reads lane " + std::to_string(from) +
                       ", which the mask does not name",
                   *warp_, lane);
      wait();
    }
  }
  for (unsigned rest = meeting.mask; rest != 0; rest &= rest - 1) {
    warp_->lanes[lowest(rest)].value = votes ? ballot : got[lowest(rest)];
  }
}

// The lane whose value a lane gets, as CUDA's guide defines it (section "Warp Shuffle Functions").
int Machine::source(const Meeting& meeting, int lane) const {
  const int argument = warp_->lanes[lane].argument, width = meeting.width;
  const int first = lane & ~(width - 1), last = first + width - 1;
  switch (meeting.kind) {
    case Collective::shfl_up:
      return argument < 0 || argument > lane - first ? lane : lane - argument;
    case Collective::shfl_down:
      return argument < 0 || argument > last - lane ? lane : lane + argument;
    case Collective::shfl_xor: {
      const int from = (lane ^ argument) & (kWarp - 1);
      return from > last ? lane : from;
    }
    default:
      return first + (argument & (width - 1));
  }
}

// --- the block -----------------------------------------------------------------------------------

void Machine::block_barrier(Site site) {
  warp_->lanes[lane_].site = site;
  warp_->at_barrier |= 1u << lane_;
  warp_->runnable &= ~(1u << lane_);
  wait();
}

// No thread can run: let all of them go on from a barrier, or say why they cannot.
void Machine::open_barrier() {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  unsigned waiting = 0, done = 0;
  for (const Warp& warp : warps_) {
    waiting += __builtin_popcount(warp.at_barrier);
    done += __builtin_popcount(warp.done);
  }
  if (done == threads) return;
  if (waiting + done < threads) return explain_meeting();
  const auto waits = [&](unsigned i) { return warps_[i / kWarp].at_barrier >> (i % kWarp) & 1; };
  const auto site = [&](unsigned i) { return warps_[i / kWarp].lanes[i % kWarp].site; };
  unsigned first = 0;
  while (!waits(first)) ++first;
  for (unsigned i = 0; i < threads; ++i) {
    if (waits(i) && same(site(i), site(first))) continue;
    return note_failure("__syncthreads at " + text_of(site(first)) + ": thread " +
                            text_of(warps_[i / kWarp].lanes[i % kWarp].index) + " " + state_of(i),
                        warps_[first / kWarp], first % kWarp);
  }
  for (Warp& warp : warps_) {
    warp.runnable = warp.at_barrier;
    warp.at_barrier = 0;
  }
}

// Some lanes wait for others of their warp that do not come.
void Machine::explain_meeting() {
  for (unsigned w = 0; w < warps_.size(); ++w) {
    for (const Meeting& meeting : warps_[w].meetings) {
      if (meeting.arrived == 0) continue;
      const int absent = lowest(meeting.mask & ~meeting.arrived);
      return note_failure(text_of(meeting) + ": lane " + std::to_string(absent) + " " +
                              state_of(w * kWarp + absent),
                          warps_[w], lowest(meeting.arrived));
    }
  }
}

std::string Machine::state_of(unsigned thread) const {
  if (thread >= blockDim.x * blockDim.y * blockDim.z) return "does not exist in this block";
  const Warp& warp = warps_[thread / kWarp];
  const int lane = thread % kWarp;
  if (warp.done >> lane & 1) return "has returned";
  const char* const what = warp.at_barrier >> lane & 1 ? "__syncthreads" : "a warp collective";
  return std::string("waits for ") + what + " at " + text_of(warp.lanes[lane].site);
}

}  // namespace simt
