// y = W x + bias, or y += .., for few tokens: projections and the output head.
#include "activation.cuh"
#include "runs.cuh"
#include "strips.cuh"

namespace lowmoe {

template <int kTokens>
struct Linear {
  static constexpr int kUnitStrips = 1;

  RoundedTokens tokens;
  Regions regions;
  const uint8_t* planes[layout::kMaxPlanes];
  float scale_unit;
  int n_out;
  Biases bias;
  bool add;
  float* y;
  int most_tokens, n_planes, n_strips, n_column_blocks;

  __device__ __forceinline__ int tokens_of(int) const { return most_tokens; }
  __device__ __forceinline__ int first_of_unit(int strip) const { return strip; }
  __device__ __forceinline__ int end_of_unit(int strip) const { return strip + 1; }

  __device__ __forceinline__ const uint8_t* plane_of(int plane) const {
    return plane == 0 ? planes[0] : plane == 1 ? planes[1] : planes[2];  // no array in memory
  }
  __device__ __forceinline__ Run<kTokens> open(int strip, int plane, const Part& part) const {
    Run<kTokens> run;
    regions.open(plane_of(plane), strip, part, run);
    give_tokens(tokens, most_tokens, part, [](int i) { return i; }, run);
    return run;
  }
  __device__ __forceinline__ const uint8_t* row_scales(int strip, int plane, int eighth) const {
    return regions.row_scales_of(plane_of(plane), strip, eighth);
  }
  __device__ __forceinline__ const uint8_t* gain(int) const {
    return plane_of(n_planes - 1) + regions.gain;
  }

  __device__ __forceinline__ void finish(int strip,
                                         const UnitSums<Linear, 4 * kTokens>& sums) const {
    const int row = thread_now() % kStripRows, o = strip * kStripRows + row;
    if (o >= n_out) return;
    const float of_row = bias[o];
    for (int t = thread_now() / kStripRows; t < most_tokens; t += kThreads / kStripRows) {
      float& to = y[static_cast<size_t>(t) * n_out + o];
      const float sum = sums[0][t][row] + of_row;
      to = add ? to + sum : sum;
    }
  }
};

template <int kTokens>
__device__ __forceinline__ void linear(const int8_t* codes, const float* scales, int n_tokens,
                                       const uint8_t* plane_0, const uint8_t* plane_1,
                                       const uint8_t* plane_2, int n_planes, const int8_t* table,
                                       float scale_unit, int n_out, int n_in, const float* bias,
                                       int add, float* y, int* counters, float* partials) {
  DYNAMIC_SHARED(unsigned, pairs);
  __shared__ StripMemory<Linear<kTokens>, 4 * kTokens> memory;
  const Regions regions(n_out, n_in);
  const Linear<kTokens> job{RoundedTokens(codes, scales, n_in),
                            regions,
                            {plane_0, plane_1, plane_2},
                            scale_unit,
                            n_out,
                            {bias},
                            add != 0,
                            y,
                            n_tokens,
                            n_planes,
                            regions.n_strips(),
                            regions.n_column_blocks};
  Strips<kTokens, Linear<kTokens>>(job, pairs, memory, counters, partials).run(table);
}

// y [T, n_out] float32; otherwise as `linear` in cuda_ext/ops.py.
//   bias      [n_out], or null
//   plane_*   of which n_planes count; the others may be any
//   counters  an int for each block, 0 before and after
//   partials  [blocks][2][T][128]
// A launch has kThreads threads a block, Stage::kSharedWords of dynamic shared memory and blocks as
// strips.cuh says.
#define LINEAR(name, tokens_of_lane)                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                                     \
      name(const int8_t* codes, const float* scales, int n_tokens, const uint8_t* plane_0,      \
           const uint8_t* plane_1, const uint8_t* plane_2, int n_planes, const int8_t* table,   \
           float scale_unit, int n_out, int n_in, const float* bias, int add, float* y,         \
           int* counters, float* partials) {                                                    \
    linear<tokens_of_lane>(codes, scales, n_tokens, plane_0, plane_1, plane_2, n_planes, table, \
                           scale_unit, n_out, n_in, bias, add, y, counters, partials);          \
  }                                                                                             \
  EXPORT_KERNEL(name, name)

LINEAR(linear_4, 1)  // up to 4 tokens
LINEAR(linear_8, 2)  // up to 8

}  // namespace lowmoe
