#include "host/parallel.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace pgolf::cpu {
namespace {

// A chunk is long against taking it (one atomic addition), short against a time slice. A helper is
// woken for no less work than waking it costs (about 10 us, in which a core moves 256 KiB).
constexpr int64_t kChunkBytes = 64 << 10;
constexpr int64_t kBytesPerThread = 256 << 10;
constexpr int kMaxThreads = 256;

struct Job {
  RangeFunction function;
  const void* context;
  int64_t count;
  int64_t chunk;
  std::fenv_t environment;  // the caller's rounding and flush-to-zero hold for all
  std::atomic<int64_t> next{0};

  void run() {
    for (;;) {
      const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
      if (begin >= count) return;
      function(context, begin, std::min(begin + chunk, count));
    }
  }
};

class Pool {
 public:
  // Runs the job on the caller's thread and on up to `helpers` others. Returns when it is done; does
  // not wait for helpers that have not woken by then.
  void run(Job& job, int helpers) {
    std::unique_lock<std::mutex> only_caller(caller_, std::try_to_lock);
    if (!only_caller) return job.run();
    std::unique_lock<std::mutex> lock(mutex_);
    start(helpers);
    job_ = &job;
    places_ = std::min(helpers, helpers_);
    lock.unlock();
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    job.run();
    lock.lock();
    places_ = 0;
    done_.wait(lock, [&] { return working_ == 0; });
  }

 private:
  void start(int helpers) {
    // Signals stay with Python's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; helpers_ < helpers; ++helpers_) std::thread(&Pool::help, this).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: those that are there do the work.
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return places_ > 0; });
      --places_;
      ++working_;
      Job& job = *job_;
      lock.unlock();
      std::fesetenv(&job.environment);
      job.run();
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_;  // held by the one caller whose job it is
  std::mutex mutex_;   // guards all below
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int helpers_ = 0;  // threads that exist
  int places_ = 0;   // helpers that may still join the job
  int working_ = 0;  // helpers that have
};

// Never destroyed: its threads end with the process. The child of a fork has none of them, and locks
// may be held there by threads that do not exist: it forgets the pool and makes its own.
std::atomic<Pool*> current_pool{nullptr};
[[maybe_unused]] const int at_fork =
    pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });

Pool& pool() {
  Pool* pool = current_pool.load();
  if (pool == nullptr) {
    Pool* const fresh = new Pool;
    if (current_pool.compare_exchange_strong(pool, fresh)) return *fresh;
    delete fresh;
  }
  return *pool;
}

}  // namespace

void parallel_for(int64_t count, int64_t bytes_per_item, int threads, RangeFunction function,
                  const void* context) {
  bytes_per_item = std::max<int64_t>(bytes_per_item, 1);
  const int64_t chunk = std::max<int64_t>(kChunkBytes / bytes_per_item, 1);
  const int64_t useful = count / std::max<int64_t>(kBytesPerThread / bytes_per_item, 1);
  threads = static_cast<int>(std::min<int64_t>({threads, useful, kMaxThreads}));
  Job job{function, context, count, chunk, {}};
  if (threads <= 1) return job.run();
  std::fegetenv(&job.environment);
  pool().run(job, threads - 1);
}

}  // namespace pgolf::cpu
