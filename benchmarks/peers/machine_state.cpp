// How fast do these cores read memory right now, and how far apart are they?
//
//   machine_state THREADS
//
// Prints one JSON object:
//   read_one, read_all  GB/s (1e9) of reading 1 GiB over and over, by one thread and by THREADS
//   round_trip_ns       a cache line from one core to another and back; 0 with one thread
// Every thread stays on a core of its own.  A virtual machine's cores can be moved by its host:
// within 100 ns they share a last-level cache and its link to memory, at several hundred they do
// not.

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kBytes = size_t{1} << 30;
constexpr double kSeconds = 0.3;
// The quickest of many short batches: others' work only ever makes one slower.
constexpr int kBatches = 40;
constexpr int kRoundTrips = 2'000;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

std::vector<int> allowed_cores() {
  cpu_set_t allowed;
  sched_getaffinity(0, sizeof allowed, &allowed);
  std::vector<int> cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &allowed)) cores.push_back(core);
  }
  return cores;
}

void stay_on(int core) {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  pthread_setaffinity_np(pthread_self(), sizeof one, &one);
}

// Independent sums, so that no addition waits for the one before it.
uint64_t sum_of(const uint64_t* words, size_t count) {
  constexpr size_t kLanes = 32;
  uint64_t sums[kLanes] = {};
  for (size_t i = 0; i + kLanes <= count; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) sums[lane] += words[i + lane];
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

double read_gb_s(const uint64_t* words, const std::vector<int>& cores) {
  const size_t share = kBytes / sizeof(uint64_t) / cores.size();
  std::vector<double> rates(cores.size());
  std::atomic<uint64_t> sink{0};
  std::vector<std::thread> threads;
  for (size_t t = 0; t < cores.size(); ++t) {
    threads.emplace_back([&, t] {
      stay_on(cores[t]);
      size_t passes = 0;
      const auto begin = Clock::now();
      do {
        sink += sum_of(words + t * share, share);
        ++passes;
      } while (seconds_since(begin) < kSeconds);
      rates[t] = double(passes) * double(share) * sizeof(uint64_t) / seconds_since(begin) / 1e9;
    });
  }
  for (std::thread& thread : threads) thread.join();
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

double round_trip_ns(int core, int other) {
  alignas(128) std::atomic<int> turn{0};
  double best = 0;
  const auto answer = [&](int core, int parity) {
    stay_on(core);
    for (int batch = 0; batch < kBatches; ++batch) {
      const auto begin = Clock::now();
      for (int i = 0; i < kRoundTrips; ++i) {
        while ((turn.load(std::memory_order_acquire) & 1) != parity) {
        }
        turn.fetch_add(1, std::memory_order_release);
      }
      const double ns = seconds_since(begin) / kRoundTrips * 1e9;
      if (parity == 0 && (batch == 0 || ns < best)) best = ns;
    }
  };
  std::thread second(answer, other, 1);
  answer(core, 0);
  second.join();
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int n_threads = argc == 2 ? std::atoi(argv[1]) : 0;
  std::vector<int> cores = allowed_cores();
  if (n_threads < 1 || size_t(n_threads) > cores.size()) {
    std::fprintf(stderr, "THREADS must be 1 to %zu, the cores allowed here\n", cores.size());
    return 2;
  }
  cores.resize(size_t(n_threads));
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::fprintf(stderr, "no %zu bytes of memory\n", kBytes);
    return 1;
  }
  madvise(memory, kBytes, MADV_HUGEPAGE);
  std::memset(memory, 1, kBytes);
  const auto* words = static_cast<const uint64_t*>(memory);
  const double one = read_gb_s(words, {cores.front()});
  const double all = read_gb_s(words, cores);
  const double trip = n_threads > 1 ? round_trip_ns(cores.front(), cores.back()) : 0;
  std::printf("{\"read_one\": %.2f, \"read_all\": %.2f, \"round_trip_ns\": %.0f}\n", one, all,
              trip);
}
