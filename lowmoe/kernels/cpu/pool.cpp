#include "lowmoe/kernels/cpu/pool.h"

#include <stdexcept>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif
#ifndef _WIN32
#include <unistd.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lowmoe {

namespace {

// Waiting for another thread of a quiet machine takes less than this.
constexpr auto kSpin = std::chrono::microseconds(20);
// On a busy machine the one waited for may be waiting for this very core, so it is offered. Python
// and sampling between two passes take some 100 us; longer pauses are worth a sleep.
constexpr auto kOffer = std::chrono::microseconds(500);
constexpr int kLooksBetweenClocks = 64;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long process_id() {
#ifdef _WIN32
  return 0;  // no fork there
#else
  return getpid();
#endif
}

void pin(int cpu) {
#ifdef __linux__
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  // A cpuset may have shrunk since the list was made; then the thread stays where it is.
  (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
  (void)cpu;
#endif
}

}  // namespace

Pool::Pool(int n_threads)
    : n_threads_(n_threads), process_(process_id()), shares_(new Share[n_threads]) {}

// The other constructor is through, so if a thread cannot be started the destructor ends the rest.
Pool::Pool(int n_threads, const std::vector<int>& cpus) : Pool(n_threads) {
  for (int thread = 1; thread < n_threads; thread++) {
    const int cpu = cpus.empty() ? -1 : cpus[(thread - 1) % cpus.size()];
    workers_.emplace_back([this, thread, cpu] { work(thread, cpu); });
  }
}

Pool::Busy::Busy(Pool& pool) : pool_(pool) {
  if (process_id() != pool.process_) {
    throw std::runtime_error("a forked process cannot compute with its parent's threads");
  }
  if (pool.busy_.exchange(true, std::memory_order_acquire)) {
    throw std::runtime_error("another thread is computing with this pool");
  }
}

Pool::~Pool() {
  if (process_id() != process_) {  // the threads are the parent's
    for (std::thread& worker : workers_) worker.detach();
    return;
  }
  closing_.store(true, std::memory_order_relaxed);
  run_.fetch_add(1);
  run_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void Pool::start(Call call, void* context) {
  call_ = call;
  context_ = context;
  run_.fetch_add(1);
  run_.notify_all();
}

void Pool::finish() { Team(*this, 0).barrier(); }

void Pool::work(int thread, int cpu) {
  if (cpu >= 0) pin(cpu);
  uint32_t seen = 0;
  for (;;) {
    await_change(run_, seen);
    seen++;
    if (closing_.load(std::memory_order_relaxed)) return;
    call_(context_, thread, *this);
    Team(*this, thread).barrier();
  }
}

// Who changes the value does so in the one order of all (seq_cst), for notify_all only looks
// whether anybody sleeps: x86 lets a load overtake an earlier store that is a mere release, and
// then the looker sees nobody while the sleeper, on its way, still sees the old value.
void Pool::await_change(const std::atomic<uint32_t>& value, uint32_t old) {
  const auto begin = std::chrono::steady_clock::now();
  for (auto waited = begin - begin; waited < kOffer;
       waited = std::chrono::steady_clock::now() - begin) {
    for (int i = 0; i < kLooksBetweenClocks; i++) {
      if (value.load(std::memory_order_acquire) != old) return;
      relax();
    }
    if (waited > kSpin) std::this_thread::yield();
  }
  value.wait(old, std::memory_order_acquire);
}

void Team::barrier() {
  const uint32_t round = pool_.barriers_.load(std::memory_order_relaxed);
  if (pool_.arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 ==
      static_cast<uint32_t>(pool_.size())) {
    pool_.arrived_.store(0, std::memory_order_relaxed);
    pool_.barriers_.store(round + 1);
    pool_.barriers_.notify_all();
    return;
  }
  pool_.await_change(pool_.barriers_, round);
}

}  // namespace lowmoe
