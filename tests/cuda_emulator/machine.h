// The threads of one block: who runs, who waits for whom, what a warp exchanges.
//
// One thread runs at a time, until it must wait for others; then another goes on. Which one is the
// launch's order: a kernel whose result depends on it lacks a barrier.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda_fp16.h"
#include "fiber.h"

namespace emu {

// Threads and blocks one after the other, the last first, or any other value: shuffled by it.
enum Order : unsigned { kForward = 0, kReverse = 1 };

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;
inline constexpr unsigned kWholeWarp = ~0u;
// Memory nobody has written: as float16 and float32 NaN in the forward order, for it spreads, and
// in the others a large number, for a maximum drops NaN. So whoever reads it gives different
// results.
inline constexpr unsigned char kUnwritten[] = {0xff, 0x7b};

// One kind of meeting of lanes. Two sets of places, for a lane that is through may begin the next
// meeting before the others have read this one.
struct Meeting {
  static constexpr size_t kMostBytes = 64;
  alignas(kMostBytes) unsigned char brought[2][kWarp][kMostBytes];
  const char* what = nullptr;
  unsigned arrived = 0;
  unsigned turn = 0;
};

struct Warp {
  Meeting all;
  std::map<unsigned, Meeting> some;  // by mask

  Meeting& meeting(unsigned mask) { return mask == kWholeWarp ? all : some[mask]; }
};

struct AsyncCopy {
  uint4* to;
  const uint4* from;
  unsigned group;
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  unsigned lane = 0;
  Warp* warp = nullptr;
  const char* waits_in = nullptr;
  bool ended = false;
  std::vector<AsyncCopy> copies;  // under way, oldest first
  unsigned n_groups = 0;          // of copies that were committed
  bool fenced = false;            // since its last atomic operation
  void* last_atomic = nullptr;    // what that one was about
};

// Threads that can go on.
class Ready {
 public:
  bool empty() const { return first_ == end_; }
  void clear() { first_ = end_; }
  void add(Thread* thread) { at(end_++) = thread; }
  Thread* take(unsigned order, std::mt19937& random) {
    if (order == kForward) return at(first_++);
    if (order != kReverse) std::swap(at(first_ + random() % (end_ - first_)), at(end_ - 1));
    return at(--end_);
  }

 private:
  Thread*& at(unsigned i) { return threads_[i % kMaxThreads]; }
  std::array<Thread*, kMaxThreads> threads_{};
  unsigned first_ = 0, end_ = 0;
};

// The barrier of all threads of a block.
struct Barrier {
  unsigned arrived = 0;
  unsigned turn = 0;
  unsigned votes[2] = {};  // of each turn's parity, for some may arrive again before all have read
  char tokens[2] = {};     // for ThreadSanitizer, likewise
};

// The threads of a block, with their stacks. They serve one block after the other.
struct Crew {
  explicit Crew(dim3 block);
  ~Crew();
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  dim3 block;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  char* stacks;
  bool is_stuck = false;  // some threads were left in the middle of a kernel
};

struct Machine {
  dim3 grid, block;
  uint3 block_index{};
  Crew* crew = nullptr;
  Thread* self = nullptr;
  Ready ready;
  Fiber host;
  std::mt19937 random;
  unsigned order = kForward;
  const std::function<void(void**)>* kernel = nullptr;
  void** arguments = nullptr;
  uint4* dynamic_shared = nullptr;
  char begin_token = 0, end_token = 0;  // for ThreadSanitizer: of the host and a launch's threads
  std::string fault;                    // why the launch cannot go on
};
inline Machine machine;

// Gives up the launch: the calling thread is left where it is.
[[noreturn]] inline void fail(const std::string& why) {
  machine.fault = why;
  machine.self->fiber.switch_to(machine.host, machine.host);
  __builtin_unreachable();
}

// Whose turn it is when the running thread cannot go on; with nobody left, the host's.
inline Fiber& next() {
  if (machine.ready.empty()) return machine.host;
  machine.self = machine.ready.take(machine.order, machine.random);
  return machine.self->fiber;
}

// Goes on when another thread has made this one ready.
inline void wait(const char* what) {
  Thread* self = machine.self;
  self->waits_in = what;
  self->fiber.switch_to(next(), machine.host);
  self->waits_in = nullptr;
}

// What lane `lane` brought; what no lane of the mask brought is undefined on a card.
template <class T>
T brought_by(const T* brought, unsigned mask, unsigned lane) {
  if (mask >> lane & 1) return brought[lane];
  T undefined;
  std::memset(static_cast<void*>(&undefined), kUnwritten[machine.order != kForward], sizeof(T));
  return undefined;
}

// Every lane of the mask brings a T; the last to arrive runs finish() on all of them. Returns what
// was brought, by lane; valid until this lane's next meeting with the same mask.
//   ordered  whether memory is, too, as after __syncwarp
template <class T, class Finish>
const T* meet(unsigned mask, const char* what, const T& mine, Finish finish, bool ordered = false) {
  static_assert(sizeof(T) <= Meeting::kMostBytes && std::is_trivially_copyable_v<T>);
  Thread* self = machine.self;
  if (!(mask >> self->lane & 1)) fail(std::string(what) + ": the calling lane is not in its mask");
  Meeting& meeting = self->warp->meeting(mask);
  auto& places = meeting.brought[meeting.turn & 1];
  if (meeting.arrived && meeting.what != what && std::strcmp(meeting.what, what) != 0)
    fail("lanes of one warp meet in " + std::string(meeting.what) + " and in " + what);
  // Lanes side by side, so that they can be read as an array.
  T* brought = reinterpret_cast<T*>(places);
  brought[self->lane] = mine;
  meeting.what = what;
  meeting.arrived |= 1u << self->lane;
  if (ordered) releases(places);
  if (meeting.arrived == mask) {
    finish(brought);
    meeting.arrived = 0, meeting.turn++;
    Thread* first = self - self->lane;
    for (unsigned lane = 0; lane < kWarp; lane++)
      if (mask >> lane & 1 && first + lane != self) machine.ready.add(first + lane);
  } else {
    wait(what);
  }
  if (ordered) acquires(places);
  return brought;
}

// All threads of the block; returns how many brought true. Orders memory.
inline unsigned meet_in_block(const char* what, bool vote) {
  Crew& crew = *machine.crew;
  Barrier& barrier = crew.barrier;
  const unsigned parity = barrier.turn & 1;
  releases(&barrier.tokens[parity]);
  barrier.votes[parity] += vote;
  if (++barrier.arrived == crew.threads.size()) {
    barrier.arrived = 0, barrier.turn++;
    barrier.votes[parity ^ 1] = 0;
    for (Thread& thread : crew.threads)
      if (&thread != machine.self) machine.ready.add(&thread);
  } else {
    wait(what);
  }
  acquires(&barrier.tokens[parity]);
  return barrier.votes[parity];
}

}  // namespace emu
