// A warp's cells, on their way from memory and multiplied one after the other.
#pragma once

#include "runs.cuh"

namespace lowmoe {

// A warp's sums of a strip as its lanes have them, [odd][pair][lane][row][token of the lane]: what
// a lane stores is 8 or 16 bytes in one piece, and a warp meets every bank as often as it must.
template <int kTokens>
struct Fragments {
  static constexpr int kOfLane = 2 * kTokens;
  static constexpr int kOfPair = kLanes * kOfLane;
  static constexpr int kNumbers = 8 * kOfPair;  // of all tokens there is room for, 128 rows each
  static_assert(kWarps * kNumbers <= kSpareWords);
  struct alignas(kOfLane * sizeof(float)) OfLane {
    float at[kOfLane];
  };

  static __device__ __forceinline__ int token(int index) {
    return index / kOfLane % 4 * kTokens + index % kTokens;
  }
  static __device__ __forceinline__ int row(int index) {
    const int lane = index / kOfLane % kLanes, pair = index / kOfPair % 4;
    const int of_block = 16 * pair + lane / 4 % 4 * 4 + index / (4 * kOfPair) * 2;
    return lane / 16 * layout::kBlockRows + of_block + index / kTokens % 2;
  }
};

// Makes the compiler forget what it knows of a number: else it keeps what can be computed of it
// before the innermost loop, in registers that this loop needs.
__device__ __forceinline__ int forgotten(int number) {
  asm volatile("" : "+r"(number));
  return number;
}
__device__ __forceinline__ int thread_now() { return forgotten(threadIdx.x); }

// Where a warp's words wait that are under way: 2 KB. Each lane copies what it will read itself, so
// nobody else has to be waited for, and as soon as it has read, the next may come. Unlike
// registers, this waits for memory whatever the compiler makes of the loop, and leaves it 16
// registers.
template <int kTokens>
struct Stage {
  static constexpr int kWords = kLanes * 4 * 4;
  static constexpr bool kIsSpare = kWarps * (Fragments<kTokens>::kNumbers + kWords) <= kSpareWords;
  static constexpr int kApart = (kIsSpare ? 2 : 1) * kLanes * 4;  // words from slice to slice
  static constexpr int kSharedWords = kTableWords + (kIsSpare ? 0 : kWarps * kWords);

  unsigned* own;

  __device__ __forceinline__ explicit Stage(unsigned* shared) {
    const int index = threadIdx.x / kLanes * kWords + threadIdx.x % kLanes * 4;
    own = shared +
          (kIsSpare ? spare(kWarps * Fragments<kTokens>::kNumbers + index) : kTableWords + index);
  }
  __device__ __forceinline__ void fetch(const uint8_t* words) const {
    constexpr int kSliceBytes = layout::kBlockCodeBytes / layout::kSlices;
#pragma unroll
    for (int i = 0; i < 4; i++) cp_async16(own + i * kApart, words + i * kSliceBytes);
    cp_async_commit();
  }
  __device__ __forceinline__ void read(uint4 (&words)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = *reinterpret_cast<const uint4*>(own + i * kApart);
  }
};

// The cells of one warp, one after the other. Words and nibbles of the next one are on their way
// while it multiplies; tokens are near, in L1, and are asked for when they are needed.
template <int kTokens, class Job>
class Stream {
 public:
  __device__ __forceinline__ Stream(const Job& job, unsigned* shared) : job_(job), stage_(shared) {}

  // Begins to bring a cell; the next one is always kWarps further on.
  __device__ __forceinline__ void fetch(int cell) {
    column_block_ += kWarps;
    if (column_block_ >= job_.n_column_blocks) {
      const int run = cell / job_.n_column_blocks;
      column_block_ = cell - run * job_.n_column_blocks;
      run_ = job_.open(run / job_.n_planes, run % job_.n_planes, Part(threadIdx.x % kLanes));
    }
    stage_.fetch(run_.words_of(column_block_));
    nibbles_ = run_.nibbles_of(column_block_);
  }

  // Multiplies the cell that was fetched and, if has_next, fetches the next one.
  __device__ __forceinline__ void multiply(const unsigned* table, int cell, bool has_next,
                                           Sums<kTokens>& sums) {
    cp_async_wait<0>();
    uint4 words[4];
    stage_.read(words);
    const CellNibbles nibbles = nibbles_;
    const CellTokens<kTokens> tokens = run_.tokens_of(job_.tokens, column_block_);
    if (has_next) fetch(cell + kWarps);
    lowmoe::multiply(words, nibbles, tokens, table, sums);
  }

 private:
  const Job& job_;
  Stage<kTokens> stage_;
  Run<kTokens> run_ = {};
  CellNibbles nibbles_ = {};
  int column_block_ = job_.n_column_blocks;
};

}  // namespace lowmoe
