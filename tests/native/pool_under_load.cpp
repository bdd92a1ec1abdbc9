// Does the pool run every index exactly once a phase, keep phases apart, and wake whoever sleeps?
//
// One line for each question; the exit code is 1 if one is answered no, or if the pool hangs. Built
// with -fsanitize=thread it also asks whether what a phase writes is seen by the next. Linux only:
// /proc tells who sleeps.
//   pool_under_load [rounds]   of each question, but for slow ones; 500 unless said otherwise
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "lowmoe/kernels/cpu/pool.h"

namespace lowmoe {

namespace {

constexpr int kPatienceSeconds = 100;  // for one question, under a sanitizer

using Clock = std::chrono::steady_clock;

int failures = 0;
std::atomic<int> seconds_left{kPatienceSeconds};

void report(bool passed, int n_threads, const char* what) {
  std::printf("%-6s  %2d threads: %s\n", passed ? "yes" : "NO", n_threads, what);
  std::fflush(stdout);
  failures += !passed;
  seconds_left = kPatienceSeconds;
}

// Runs beside the pool, not in a signal: that would wake threads which the pool forgot. Time while
// this process is stopped hardly counts, for it is no fault of the pool's.
void watch() {
  while (seconds_left.fetch_sub(1) > 0) std::this_thread::sleep_for(std::chrono::seconds(1));
  std::printf("NO      the pool hangs\n");
  std::fflush(stdout);
  _exit(1);
}

void work(uint32_t microseconds) {
  for (const auto end = Clock::now() + std::chrono::microseconds(microseconds);
       Clock::now() < end;) {
  }
}

// The state letter of one thread in /proc/self/task/*/stat; it follows a name in parentheses.
char state_of(const std::filesystem::path& task) {
  std::ifstream file(task / "stat");
  std::string line;
  std::getline(file, line);
  const size_t name_end = line.rfind(')');
  return name_end == std::string::npos ? 'X' : line[name_end + 2];
}

void await_others_asleep() {
  const std::string self = std::to_string(gettid());
  for (bool asleep = false; !asleep;) {
    asleep = true;
    for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
      if (task.path().filename() != self) asleep &= state_of(task.path()) == 'S';
    }
  }
}

// Two arrays that phases rewrite in turn, each from what the phase before wrote; no atomics, so
// that only the pool keeps threads apart.
class Rewriting {
 public:
  static constexpr size_t kMost = 300;

  explicit Rewriting(std::mt19937& random) {
    sizes_.resize(1 + random() % 12);
    for (size_t& n : sizes_) n = random() % 4 ? random() % kMost : random() % 5;
    // Mostly phases with nothing to do but to keep apart; now and then some with work.
    most_us_ = random() % 16 == 0 ? 20 : 0;
  }

  void operator()(Team& team) {
    for (size_t phase = 0; phase < sizes_.size(); phase++) {
      const size_t n_before = phase > 0 ? sizes_[phase - 1] : 0;
      const std::vector<size_t>& before = values_[phase % 2];
      std::vector<size_t>& after = values_[(phase + 1) % 2];
      team.each("rewriting", sizes_[phase], [&](size_t i) {
        // What another thread likely wrote.
        if (n_before > 0 && before[(i + n_before / 2) % n_before] != phase) {
          out_of_turn_.store(true, std::memory_order_relaxed);
        }
        if (most_us_ > 0) work(static_cast<uint32_t>(37 * i + phase) % most_us_);
        after[i] = phase + 1;
        times_[i]++;
      });
    }
  }

  bool passed() const {
    for (size_t i = 0; i < kMost; i++) {
      const auto n = std::count_if(sizes_.begin(), sizes_.end(), [=](size_t n) { return i < n; });
      if (times_[i] != static_cast<size_t>(n)) return false;
    }
    return !out_of_turn_.load();
  }

 private:
  std::vector<size_t> sizes_;  // of each phase
  uint32_t most_us_;
  std::vector<size_t> values_[2] = {std::vector<size_t>(kMost), std::vector<size_t>(kMost)};
  std::vector<size_t> times_ = std::vector<size_t>(kMost);
  std::atomic<bool> out_of_turn_{false};
};

bool rewrite(Pool& pool, std::mt19937& random) {
  Rewriting rewriting(random);
  pool.run(rewriting);
  return rewriting.passed();
}

void run_many(int n_threads, int rounds) {
  Pool pool(n_threads, {});
  std::mt19937 random(n_threads);
  bool passed = true;
  for (int i = 0; i < rounds; i++) passed &= rewrite(pool, random);
  report(passed, n_threads, "every index once, phase after phase");
}

void barriers_hold(int n_threads, int rounds) {
  Pool pool(n_threads, {});
  std::vector<int> counts(n_threads);
  std::atomic<bool> passed{true};
  pool.run([&](Team& team) {
    for (int i = 0; i < rounds; i++) {
      counts[team.thread()]++;
      team.barrier();
      for (int count : counts) {
        if (count != i + 1) passed = false;
      }
      team.barrier();
    }
  });
  report(passed, n_threads, "no thread passes a barrier before all have come");
}

void wake_between_runs(int n_threads, int rounds) {
  Pool pool(n_threads, {});
  std::mt19937 random(n_threads);
  bool passed = true;
  for (int i = 0; i < rounds; i++) {
    await_others_asleep();
    passed &= rewrite(pool, random);
  }
  report(passed, n_threads, "those asleep between runs wake up");
}

void wake_at_barriers(int n_threads, int rounds) {
  Pool pool(n_threads, {});
  std::vector<int> counts(n_threads);
  pool.run([&](Team& team) {
    for (int i = 0; i < rounds; i++) {
      if (i % team.size() == team.thread()) await_others_asleep();
      team.barrier();
      counts[team.thread()]++;
    }
  });
  const bool passed = std::all_of(counts.begin(), counts.end(), [=](int n) { return n == rounds; });
  report(passed, n_threads, "those asleep at a barrier wake up");
}

// Threads that may still be started; the next one fails as where a container allows no more.
std::atomic<int> threads_left{1 << 20};

void run_out_of_threads(int n_threads, int rounds) {
  bool passed = true;
  for (int i = 0; i < rounds; i++) {
    threads_left = i % (n_threads - 1);
    try {
      Pool pool(n_threads, {});
      passed = false;
    } catch (const std::system_error&) {
    }
    threads_left = 1 << 20;
  }
  report(passed, n_threads, "those that were started end if another cannot be");
}

// A wake-up is lost, if ever, while a thread is about to sleep: some 500 us after it began to wait.
void wake_while_falling_asleep(int n_threads, int rounds) {
  Pool pool(n_threads, {});
  std::mt19937 random(n_threads);
  bool passed = true;
  for (int i = 0; i < rounds; i++) {
    work(480 + random() % 60);
    passed &= rewrite(pool, random);
  }
  report(passed, n_threads, "those about to sleep wake up");
}

void destroy(int n_threads, int rounds) {
  std::mt19937 random(n_threads);
  bool passed = true;
  for (int i = 0; i < rounds; i++) {
    std::optional<Pool> pool(std::in_place, n_threads, std::vector<int>{0});
    if (i % 3 > 0) passed &= rewrite(*pool, random);
    if (i % 3 == 1) await_others_asleep();
    pool.reset();
  }
  report(passed, n_threads, "a pool ends unused, asleep, or right after a run");
}

}  // namespace

}  // namespace lowmoe

// Takes the place of the C library's, which it calls.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                              void* (*run)(void*), void* argument) {
  if (lowmoe::threads_left.fetch_sub(1) <= 0) return EAGAIN;
  static const auto create =
      reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  return create(thread, attributes, run, argument);
}

int main(int n_arguments, char** arguments) {
  using namespace lowmoe;
  const int rounds = n_arguments > 1 ? std::atoi(arguments[1]) : 500;
  std::thread(watch).detach();
  const int n_cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (const int n_threads : std::set{1, 2, n_cores, 2 * n_cores + 3}) {
    run_many(n_threads, rounds);
    barriers_hold(n_threads, rounds);
    wake_while_falling_asleep(n_threads, rounds);
    wake_between_runs(n_threads, rounds / 10);
    wake_at_barriers(n_threads, rounds / 10);
    destroy(n_threads, rounds / 10);
    if (n_threads > 1) run_out_of_threads(n_threads, rounds / 10);
  }
  return failures > 0;
}
