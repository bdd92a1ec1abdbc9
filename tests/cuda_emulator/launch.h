// Runs the blocks of a launch, one after the other.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <numeric>

#include "machine.h"

// Where shared_memory.ld puts what kernels declare __shared__; whole pages.
extern "C" char emu_shared_begin[], emu_shared_end[];

namespace emu {

inline constexpr size_t kStackBytes = 256 * 1024;  // reserved: an untouched page costs nothing
// Among which the blocks of a launch are drawn. ThreadSanitizer knows what a crew did before, so it
// sees races between blocks of different crews alone, and a thread costs it 0.2 ms.
inline constexpr unsigned kCrews = kRacesAreSought ? 4 : 1;

// Zeroed pages of which no sanitizer has seen an access.
inline char* fresh_pages(char* at, size_t bytes) {
  void* pages = mmap(at, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED : 0), -1, 0);
  if (pages == MAP_FAILED) __builtin_trap();
  return static_cast<char*>(pages);
}

// Not by memset: what lies between the variables is out of bounds for AddressSanitizer.
__attribute__((no_sanitize("address", "undefined", "thread"))) inline void fill(
    char* from, char* to, unsigned char with) {
  const uint64_t word = with * 0x0101010101010101u;
  for (auto* p = reinterpret_cast<volatile uint64_t*>(from);
       p < reinterpret_cast<volatile uint64_t*>(to); p++)
    *p = word;
}

// What every thread does, block after block.
inline void run_threads() {
  machine.self->fiber.arrive(machine.host);
  for (;;) {
    acquires(&machine.begin_token);
    (*machine.kernel)(machine.arguments);
    releases(&machine.end_token);
    Thread* self = machine.self;
    Fiber* other;
    {
      const Quiet quiet;  // not during the switch: this thread may never come back
      self->ended = true;
      other = &next();
    }
    self->fiber.switch_to(*other, machine.host);
  }
}

inline Crew::Crew(dim3 block)
    : block(block),
      threads(block.x * block.y * block.z),
      warps((threads.size() + kWarp - 1) / kWarp),
      stacks(fresh_pages(nullptr, threads.size() * kStackBytes)) {
  for (unsigned i = 0; i < threads.size(); i++) {
    Thread& thread = threads[i];
    thread.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    thread.lane = i % kWarp, thread.warp = &warps[i / kWarp];
    thread.fiber.begin(stacks + i * kStackBytes, kStackBytes, run_threads);
  }
}

inline Crew::~Crew() {
  // A thread in the middle of a kernel cannot be ended; it is forgotten, with its stack.
  if (is_stuck) return;
  for (Thread& thread : threads) thread.fiber.end();
  munmap(stacks, threads.size() * kStackBytes);
}

inline std::unique_ptr<uint4[]> prepare_shared(size_t bytes) {
  const size_t fixed_bytes = emu_shared_end - emu_shared_begin;
  if (kRacesAreSought && fixed_bytes) fresh_pages(emu_shared_begin, fixed_bytes);
  const unsigned char unwritten = kUnwritten[machine.order != kForward];
  fill(emu_shared_begin, emu_shared_end, unwritten);
  std::unique_ptr<uint4[]> shared(new uint4[(bytes + 15) / 16]);
  std::memset(shared.get(), unwritten, bytes);
  machine.dynamic_shared = shared.get();
  return shared;
}

// Who of the crew could not end, and why; empty when all have.
inline std::string who_waits() {
  std::map<std::string, std::pair<unsigned, unsigned>> waiting;  // how many and the first, by where
  unsigned n_ended = 0;
  for (unsigned i = 0; i < machine.crew->threads.size(); i++) {
    const Thread& thread = machine.crew->threads[i];
    n_ended += thread.ended;
    if (!thread.ended && !waiting[thread.waits_in].first++) waiting[thread.waits_in].second = i;
  }
  if (waiting.empty()) return "";
  std::string found = "nobody can go on:";
  for (const auto& [what, who] : waiting)
    found += " " + std::to_string(who.first) + " threads wait in " + what + ", the first of them " +
             std::to_string(who.second) + ";";
  return found + " " + std::to_string(n_ended) + " have ended";
}

// Runs one block; afterwards machine.fault is empty, or says why it could not end.
inline void run_block(Crew& crew, uint3 index, size_t shared_bytes) {
  machine.crew = &crew, machine.block_index = index;
  const std::unique_ptr<uint4[]> shared = prepare_shared(shared_bytes);
  machine.ready.clear();
  for (Thread& thread : crew.threads) {
    thread.ended = thread.fenced = false, thread.last_atomic = nullptr;
    thread.copies.clear(), thread.n_groups = 0;
    machine.ready.add(&thread);
  }
  releases(&machine.begin_token);
  machine.self = machine.ready.take(machine.order, machine.random);
  machine.host.switch_to(machine.self->fiber, machine.host);
  if (machine.fault.empty()) machine.fault = who_waits();
  crew.is_stuck = !machine.fault.empty();
}

// Of the latest launch, for the next; where races are sought, none.
inline std::unique_ptr<Crew> crews[kCrews];

// A crew for blocks of this size.
inline std::unique_ptr<Crew>& any_crew(dim3 block) {
  std::unique_ptr<Crew>& crew = crews[kCrews == 1 ? 0 : machine.random() % kCrews];
  const auto is_of = [&](dim3 b) { return b.x == block.x && b.y == block.y && b.z == block.z; };
  if (!crew || !is_of(crew->block)) crew = std::make_unique<Crew>(block);
  return crew;
}

// Runs a whole launch; returns why it could not end, or an empty string.
inline std::string launch(dim3 grid, dim3 block, size_t shared_bytes, unsigned order) {
  const Quiet quiet;
  machine.grid = grid, machine.block = block, machine.order = order, machine.fault.clear();
  machine.random.seed(order);
  machine.host.adopt();
  std::vector<unsigned> turns(size_t{grid.x} * grid.y * grid.z);
  std::iota(turns.begin(), turns.end(), 0);
  if (order == kReverse) std::reverse(turns.begin(), turns.end());
  if (order > kReverse) std::shuffle(turns.begin(), turns.end(), machine.random);
  for (unsigned i : turns) {
    const uint3 index{i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    std::unique_ptr<Crew>& crew = any_crew(block);
    run_block(*crew, index, shared_bytes);
    if (machine.fault.empty()) continue;
    crew.reset();
    return "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
           std::to_string(index.z) + "): " + machine.fault;
  }
  acquires(&machine.end_token);
  if (kRacesAreSought)
    for (std::unique_ptr<Crew>& crew : crews) crew.reset();
  return "";
}

}  // namespace emu
