#include "lowmoe/kernels/cpu/encoder.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {

namespace {

struct Free {
  void operator()(uint8_t* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<uint8_t, Free>;

Scratch new_scratch(size_t bytes) {
  Scratch scratch(static_cast<uint8_t*>(std::aligned_alloc(64, layout::round_up(bytes, 64))));
  if (scratch == nullptr) throw std::bad_alloc();
  return scratch;
}

}  // namespace

Coded encode_matrix(const Isa& isa, const EncoderTask& task, int n_threads) {
  const size_t n_blocks = task.shape.row_blocks();
  const size_t n = std::min<size_t>(n_threads, n_blocks);
  std::vector<Scratch> scratch;
  for (size_t t = 0; t < n; t++) scratch.push_back(new_scratch(isa.encoder->scratch_bytes(task)));
  std::vector<Coded> outcomes(n_blocks, Coded::kFine);
  std::atomic<size_t> next{0};
  std::atomic<bool> is_fine{true};
  const auto work = [&](size_t thread) {
    while (is_fine.load(std::memory_order_relaxed)) {
      const size_t block = next.fetch_add(1, std::memory_order_relaxed);
      if (block >= n_blocks) return;
      outcomes[block] = isa.encoder->encode_block(task, block, scratch[thread].get());
      if (outcomes[block] != Coded::kFine) is_fine.store(false, std::memory_order_relaxed);
    }
  };
  {
    std::vector<std::jthread> threads;
    for (size_t t = 1; t < n; t++) threads.emplace_back(work, t);
    work(0);
  }
  // Blocks are taken in order and finished: all before the first that is not fine were looked at.
  for (const Coded outcome : outcomes) {
    if (outcome != Coded::kFine) return outcome;
  }
  return Coded::kFine;
}

}  // namespace lowmoe
