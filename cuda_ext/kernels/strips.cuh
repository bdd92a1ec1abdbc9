// Few tokens times all strips of one launch: who computes which cells, how sums find each other.
//
// All cells, in the order strip, plane, column block, are cut into one share for each block, equal
// but for one cell, wherever that falls: so every multiprocessor has the same to do whatever the
// shapes are. The warps of a block take the cells of its share in turn. Where a strip ends, the
// block adds its warps' sums; where a unit (the strips that are finished together) lies in several
// shares, each block leaves its sums in memory and the last to come adds them. All sums are made in
// an order that only sizes decide: the same launch gives the same bits.
//
// Job, the operation:
//   tokens, n_strips, n_planes, n_column_blocks
//   most_tokens                     of any strip
//   tokens_of(strip)                how many
//   first_of_unit(strip), end_of_unit(strip)   strips, at most kUnitStrips of them
//   open(strip, plane, part)        a Run, see runs.cuh
//   row_scales(strip, plane, i)     where 16 bytes of the strip's row scales are, i below 16
//   gain(strip), scale_unit         where it is, and 12 more bytes; see quant/trellis.py
//   finish(first_strip, sums)       what becomes of the sums of a unit; every thread calls it
#pragma once

#include "last_block.cuh"
#include "stream.cuh"

namespace lowmoe {

// A launch has two blocks for each multiprocessor. Where two of them do not fit into its shared
// memory (100 KB; or 164 KB, for 5 to 8 tokens, whose blocks take up to 97), the second half of the
// blocks leaves at once, so that no table is built twice.
template <int kTokens>
constexpr int blocks_for_one_at_work() {
#if !defined(__CUDA_ARCH__)
  return 1;
#elif __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200
  return 2;
#elif __CUDA_ARCH__ < 900
  return kTokens;
#else
  return 1;
#endif
}

inline constexpr int kMostBlocks = 4096;  // of a launch: so many counters are theirs

// Cut like this, products of cells and blocks stay below 2^32 up to 11 million cells, 23 GB a
// plane.
struct Shares {
  unsigned n_cells, n_blocks;  // n_blocks <= n_cells: no share is empty

  __device__ __forceinline__ Shares(int cells, int blocks)
      : n_cells(cells), n_blocks(min(cells, blocks)) {}
  __device__ __forceinline__ int begin(int block) const { return n_cells * block / n_blocks; }
  __device__ __forceinline__ int block_of(int cell) const {
    return ((cell + 1u) * n_blocks - 1) / n_cells;
  }
};

// [strip of the unit][token][row]: sums of whole strips. kRoom: tokens there is room for, 4 or 8.
template <class Job, int kRoom>
using UnitSums = float[Job::kUnitStrips][kRoom][kStripRows];

// What the sums of a run are multiplied with, brought by 17 lanes, 16 bytes each.
struct RunScales {
  alignas(16) __half row_scales[kStripRows];
  alignas(16) float gain;
};

// What a block keeps besides the table. Its share is here because it is seldom asked for: what can
// be computed before all loops the compiler would keep in registers, which the innermost one needs.
template <class Job, int kRoom>
struct StripMemory {
  int begin, end;  // its share
  int strip_cells;
  UnitSums<Job, kRoom> sums;
  RunScales run_scales[kWarps];
};

template <int kTokens, class Job>
class Strips {
 public:
  static constexpr int kRoom = 4 * kTokens;
  using Memory = StripMemory<Job, kRoom>;

  // counters  one for each block, 0; partials  [blocks][2][kUnitStrips][most_tokens][128]
  __device__ __forceinline__ Strips(const Job& job, unsigned* table, Memory& memory, int* counters,
                                    float* partials)
      : job_(job),
        table_(table),
        memory_(memory),
        counters_(counters),
        partials_(partials),
        run_cells_(job.n_column_blocks),
        shares_(run_cells_ * job.n_planes * job.n_strips,
                gridDim.x / blocks_for_one_at_work<kTokens>()) {}

  // Everything. values: the code's table, [64].
  __device__ __forceinline__ void run(const int8_t* values) {
    if (blockIdx.x >= shares_.n_blocks) return;
    const int begin = shares_.begin(blockIdx.x), end = shares_.begin(blockIdx.x + 1);
    if (threadIdx.x == 0) {
      memory_.begin = begin, memory_.end = end;
      memory_.strip_cells = run_cells_ * job_.n_planes;
    }
    // By a shuffle, so that the compiler knows it is the same in all lanes.
    int at = begin + __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kLanes, 0);
    Stream<kTokens, Job> stream(job_, table_);
    if (at < end) stream.fetch(at);
    build_table(table_, values);
    __syncthreads();
    for (int run = begin / run_cells_; run * run_cells_ < memory_.end; run++) {
      at = multiply_run(run, at, stream);
      run = forgotten(run);
      const int strip = run / job_.n_planes;
      const bool is_last = (run + 1) * run_cells_ >= memory_.end;
      if (!is_last && run + 1 < (strip + 1) * job_.n_planes) continue;
      __syncthreads();
      add_warps(strip);
      __syncthreads();
      if (is_last || strip + 1 == job_.end_of_unit(strip)) {
        finish(job_.first_of_unit(strip), job_.end_of_unit(strip));
      }
    }
  }

 private:
  // This warp's cells of one plane of a strip; returns its next one beyond.
  __device__ __forceinline__ int multiply_run(int run, int at, Stream<kTokens, Job>& stream) {
    begin_run(run / job_.n_planes, run % job_.n_planes);
    Sums<kTokens> sums = {};
    const int end = min(memory_.end, (run + 1) * run_cells_);
#pragma unroll 1
    for (; at < end; at += kWarps) {
      stream.multiply(table_, at, at + kWarps < memory_.end, sums);
    }
    run = forgotten(run);
    const int begin = max(memory_.begin, run * run_cells_);
    if (at - 2 * kWarps < begin) {  // there was no second cell
      cp_async_commit();
      cp_async_wait<0>();
    }
    end_run(sums, run % job_.n_planes == 0 || begin == memory_.begin);
    return at;
  }

  // Scales of a run come from far: they are asked for when it begins and read when it ends. They
  // belong to the group of the words that are asked for next, those of the run's second cell.
  __device__ __forceinline__ void begin_run(int strip, int plane) {
    const int thread = thread_now(), lane = thread % kLanes;
    RunScales& scales = memory_.run_scales[thread / kLanes];
    __syncwarp();  // the last run's have been read
    if (lane < 16) cp_async16(scales.row_scales + 8 * lane, job_.row_scales(strip, plane, lane));
    if (lane == 16) cp_async16(&scales.gain, job_.gain(strip));
  }

  // Adds a run's sums to this warp's sums of the strip, or begins them.
  __device__ __forceinline__ void end_run(const Sums<kTokens>& sums, bool first) {
    __syncwarp();  // all lanes' copies have been waited for
    using F = Fragments<kTokens>;
    const int thread = thread_now(), lane = thread % kLanes, warp = thread / kLanes;
    const __half* scales = memory_.run_scales[warp].row_scales + Part(lane).row(0, 0);
    const float unit = job_.scale_unit * memory_.run_scales[warp].gain;
    auto* own = reinterpret_cast<typename F::OfLane*>(
        table_ + spare(warp * F::kNumbers + lane * F::kOfLane));
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
#pragma unroll
      for (int pair = 0; pair < 4; pair++) {
        // Twice as far in spare words as in numbers.
        typename F::OfLane& to = own[(4 * odd + pair) * 2 * kLanes];
        typename F::OfLane now = {};
        if (!first) now = to;
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const float scale = __half2float(scales[2 * odd + 16 * pair + row]) * unit;
#pragma unroll
          for (int k = 0; k < kTokens; k++) {
            now.at[row * kTokens + k] += sums[odd][pair][row * kTokens + k] * scale;
          }
        }
        to = now;
      }
    }
  }

  // Calls f(index, token, row) for every sum of a strip, shared among the threads.
  template <class F>
  __device__ __forceinline__ void each_sum(int strip, F f) {
    using Order = Fragments<kTokens>;
    const int n_tokens = job_.tokens_of(strip);
#pragma unroll 1
    for (int index = thread_now(); index < Order::kNumbers; index += kThreads) {
      const int token = Order::token(index);
      if (token < n_tokens) f(index, token, Order::row(index));
    }
  }

  __device__ __forceinline__ bool is_mine_alone(int first_strip, int end_strip) const {
    return first_strip * memory_.strip_cells >= memory_.begin &&
           end_strip * memory_.strip_cells <= memory_.end;
  }

  // The sums of a strip that a block leaves for the last one: its share's first unit and its last
  // one may be others' too.
  __device__ __forceinline__ float* partial_of(int block, int begin, int first_strip,
                                               int strip) const {
    const int which = first_strip * memory_.strip_cells > begin;
    const size_t sums = job_.most_tokens * kStripRows;
    return partials_ + ((2 * block + which) * Job::kUnitStrips + strip - first_strip) * sums;
  }

  __device__ __forceinline__ void add_warps(int strip) {
    const int first = job_.first_of_unit(strip);
    const bool is_whole = is_mine_alone(first, job_.end_of_unit(strip));
    float* partial = partial_of(blockIdx.x, memory_.begin, first, strip);
    each_sum(strip, [&](int index, int token, int row) {
      const float* numbers = reinterpret_cast<const float*>(table_);
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; w++) {
        sum += numbers[spare(w * Fragments<kTokens>::kNumbers + index)];
      }
      (is_whole ? memory_.sums[strip - first][token] : partial + token * kStripRows)[row] = sum;
    });
  }

  __device__ __forceinline__ void finish(int first, int end) {
    if (!is_mine_alone(first, end)) {
      const int one = shares_.block_of(first * memory_.strip_cells);
      const int last = shares_.block_of(end * memory_.strip_cells - 1);
      if (!is_last_block(counters_ + one, last - one + 1)) return;
      for (int strip = first; strip < end; strip++) add_blocks(first, strip);
      __syncthreads();
    }
    job_.finish(first, memory_.sums);
  }

  __device__ __forceinline__ void add_blocks(int first, int strip) {
    const int one = shares_.block_of(strip * memory_.strip_cells);
    const int last = shares_.block_of((strip + 1) * memory_.strip_cells - 1);
    each_sum(strip, [&](int, int token, int row) {
      float sum = 0;
#pragma unroll 4
      for (int block = one; block <= last; block++) {
        sum += __ldcg(partial_of(block, shares_.begin(block), first, strip) + token * kStripRows +
                      row);
      }
      memory_.sums[strip - first][token][row] = sum;
    });
  }

  const Job& job_;
  unsigned* table_;
  Memory& memory_;
  int* counters_;
  float* partials_;
  int run_cells_;
  Shares shares_;
};

}  // namespace lowmoe
