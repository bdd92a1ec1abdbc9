// Threads that work through a few phases together, again and again, thousands of times a second.
//
// The caller is thread 0 and works too. The others may be pinned to a core each; between runs they
// spin for a while, then sleep. One run at a time, in the process that made the pool.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "lowmoe/kernels/cpu/profile.h"

namespace lowmoe {

class Pool;

// What a function that runs on all threads sees of the others.
class Team {
 public:
  Team(Pool& pool, int thread) : pool_(pool), thread_(thread) {}

  int thread() const { return thread_; }
  int size() const;

  // Calls f(i) once for every i in [0, n), shared among the threads, and returns when all are done.
  // Every thread must come by, with the same n. Each begins with a share of its own, neighbouring
  // indices in order, and takes from the others' when that is done. Allocates nothing.
  template <class F>
  void each(const char* phase, size_t n, F&& f);

  // Returns when all threads have come by.
  void barrier();

 private:
  Pool& pool_;
  int thread_;
};

class Pool {
 public:
  // cpus: where the threads 1, 2, ... are pinned, in turn; empty leaves them free.  Throws
  // std::system_error if the machine has no more threads to give.
  Pool(int n_threads, const std::vector<int>& cpus);
  ~Pool();
  Pool(const Pool&) = delete;

  int size() const { return n_threads_; }
  Profile& profile() { return profile_; }

  // f(team) on every thread; returns when all have returned.  Throws std::runtime_error while
  // another thread's run is under way, and in a forked process, which has no threads but its own.
  template <class F>
  void run(F&& f) {
    const Busy busy(*this);
    auto call = [](void* context, int thread, Pool& pool) {
      Team team(pool, thread);
      (*static_cast<std::remove_reference_t<F>*>(context))(team);
    };
    start(call, &f);
    call(&f, 0, *this);
    finish();
  }

 private:
  friend class Team;
  using Call = void (*)(void* context, int thread, Pool& pool);

  // Held by the one run that there may be.
  class Busy {
   public:
    explicit Busy(Pool& pool);
    ~Busy() { pool_.busy_.store(false, std::memory_order_release); }
    Busy(const Busy&) = delete;

   private:
    Pool& pool_;
  };

  // One thread's share of a phase: the number of the phase above, the next index below. A thread
  // that comes early to another's share still finds the phase before in it, and takes nothing.
  struct alignas(128) Share {
    std::atomic<uint64_t> next{0};
    uint32_t phase = 0;
  };

  explicit Pool(int n_threads);
  void start(Call call, void* context);
  void finish();
  void work(int thread, int cpu);
  void await_change(const std::atomic<uint32_t>& value, uint32_t old);

  const int n_threads_;
  const long process_;
  std::atomic<bool> busy_{false};
  Profile profile_;
  std::unique_ptr<Share[]> shares_;
  Call call_ = nullptr;
  void* context_ = nullptr;
  alignas(128) std::atomic<uint32_t> run_{0};  // counts runs
  alignas(128) std::atomic<uint32_t> arrived_{0};
  alignas(128) std::atomic<uint32_t> barriers_{0};
  std::atomic<bool> closing_{false};
  std::vector<std::thread> workers_;
};

inline int Team::size() const { return pool_.size(); }

template <class F>
void Team::each(const char* phase, size_t n, F&& f) {
  const size_t size = pool_.size();
  const auto begin = [&](size_t t) { return n * t / size; };
  Profile::Clock clock(pool_.profile(), thread_);
  Pool::Share& own = pool_.shares_[thread_];
  const uint64_t round = ++own.phase;
  own.next.store(round << 32 | begin(thread_), std::memory_order_release);
  for (size_t k = 0; k < size; k++) {
    const size_t t = (thread_ + k) % size;
    std::atomic<uint64_t>& next = pool_.shares_[t].next;
    for (;;) {
      // A look first: taking is a write, and most shares are empty by then.
      const uint64_t seen = next.load(std::memory_order_acquire);
      if (seen >> 32 != round || (seen & 0xffffffff) >= begin(t + 1)) break;
      const uint64_t taken = next.fetch_add(1, std::memory_order_acq_rel);
      if (taken >> 32 != round || (taken & 0xffffffff) >= begin(t + 1)) break;
      f(static_cast<size_t>(taken & 0xffffffff));
    }
  }
  clock.worked(phase);
  barrier();
  clock.waited();
}

}  // namespace lowmoe
