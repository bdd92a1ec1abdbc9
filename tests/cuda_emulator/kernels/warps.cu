// One warp, or one block, whose threads tell what they got from each other: see test_emulator.py.
#include "portable.cuh"

namespace lowmoe {

constexpr unsigned kAll = ~0u;

// y [4, 32]: lane's value through each kind of shuffle.
template <class T>
__device__ void shuffles(const T* x, T* y, int by, int width) {
  const int lane = threadIdx.x;
  const T mine = x[lane];
  y[lane] = __shfl_sync(kAll, mine, by, width);
  y[32 + lane] = __shfl_xor_sync(kAll, mine, by, width);
  y[64 + lane] = __shfl_up_sync(kAll, mine, by, width);
  y[96 + lane] = __shfl_down_sync(kAll, mine, by, width);
}
extern "C" __global__ void shuffles_float(const float* x, float* y, int by, int width) {
  shuffles(x, y, by, width);
}
EXPORT_KERNEL(shuffles_float, shuffles_float)
extern "C" __global__ void shuffles_long(const long long* x, long long* y, int by, int width) {
  shuffles(x, y, by, width);
}
EXPORT_KERNEL(shuffles_long, shuffles_long)

// Lanes of `mask` alone: y[lane] = what lane `source` has, of whom nobody else can know.
extern "C" __global__ void shuffle_of_some(const int* x, int* y, long long mask, int source) {
  if (mask >> threadIdx.x & 1)
    y[threadIdx.x] = __shfl_sync(static_cast<unsigned>(mask), x[threadIdx.x], source);
}
EXPORT_KERNEL(shuffle_of_some, shuffle_of_some)

// y [6, 32] of the lanes whose bit is set in `mask`; others write nothing.
extern "C" __global__ void votes(const int* x, int* y, long long mask) {
  const unsigned lanes = static_cast<unsigned>(mask);
  const int lane = threadIdx.x, mine = x[lane];
  if (!(lanes >> lane & 1)) return;
  y[lane] = static_cast<int>(__ballot_sync(lanes, mine > 0));
  y[32 + lane] = __any_sync(lanes, mine > 0);
  y[64 + lane] = __all_sync(lanes, mine > 0);
  y[96 + lane] = __reduce_add_sync(lanes, mine);
  y[128 + lane] = __reduce_max_sync(lanes, mine);
  y[160 + lane] = __reduce_min_sync(lanes, mine);
}
EXPORT_KERNEL(votes, votes)

// y [3, threads]: how many x of the block are not 0, whether any is, whether all are.
extern "C" __global__ void votes_of_block(const int* x, int* y) {
  const int i = threadIdx.x, n = blockDim.x;
  y[i] = __syncthreads_count(x[i]);
  y[n + i] = __syncthreads_or(x[i]);
  y[2 * n + i] = __syncthreads_and(x[i]);
}
EXPORT_KERNEL(votes_of_block, votes_of_block)

// D += A B of one warp; A [16, 32], B [32, 8], D [16, 8], by rows. The element i of a lane's
// fragment: PTX ISA, "Matrix Fragments for mma.m16n8k32", formulas for .s8.
extern "C" __global__ void product_of_int8(const signed char* a, const signed char* b, int* d) {
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  unsigned of_a[4] = {}, of_b[2] = {};
  for (int i = 0; i < 16; i++) {
    const int row = i < 4 || (i >= 8 && i < 12) ? group : group + 8;
    const int column = in_group * 4 + (i & 3) + (i < 8 ? 0 : 16);
    of_a[i / 4] |= unsigned{static_cast<unsigned char>(a[row * 32 + column])} << (i % 4 * 8);
  }
  for (int i = 0; i < 8; i++) {
    const int row = in_group * 4 + (i & 3) + (i < 4 ? 0 : 16);
    of_b[i / 4] |= unsigned{static_cast<unsigned char>(b[row * 8 + group])} << (i % 4 * 8);
  }
  int of_d[4];
  for (int i = 0; i < 4; i++) of_d[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  mma_m16n8k32(of_d, of_a, of_b);
  for (int i = 0; i < 4; i++) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = of_d[i];
}
EXPORT_KERNEL(product_of_int8, product_of_int8)

// The same of A [16, 16], B [16, 8]: "Matrix Fragments for mma.m16n8k16", formulas for .f16.
extern "C" __global__ void product_of_half(const unsigned short* a, const unsigned short* b,
                                           float* d) {
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  unsigned of_a[4] = {}, of_b[2] = {};
  for (int i = 0; i < 8; i++) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
    of_a[i / 2] |= unsigned{a[row * 16 + column]} << (i % 2 * 16);
  }
  for (int i = 0; i < 4; i++) {
    const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
    of_b[i / 2] |= unsigned{b[row * 8 + group]} << (i % 2 * 16);
  }
  float of_d[4];
  for (int i = 0; i < 4; i++) of_d[i] = d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  mma_m16n8k16(of_d, of_a, of_b);
  for (int i = 0; i < 4; i++) d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = of_d[i];
}
EXPORT_KERNEL(product_of_half, product_of_half)

// y [32, 4] words: what each lane gets of x [4 tiles, 8 rows, 4 words].
extern "C" __global__ void loaded_tiles(const uint4* x, unsigned* y) {
  __shared__ uint4 rows[32];
  rows[31 - threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  unsigned words[4];
  ldmatrix_x4(words, &rows[31 - threadIdx.x]);
  for (int i = 0; i < 4; i++) y[threadIdx.x * 4 + i] = words[i];
}
EXPORT_KERNEL(loaded_tiles, loaded_tiles)

// which [blocks] and threads [blocks, threads]: when each came, counted from 0.
extern "C" __global__ void turns(int* which, int* threads, int* n_blocks, int* n_threads) {
  threads[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(n_threads, 1);
  if (threadIdx.x == 0) which[blockIdx.x] = atomicAdd(n_blocks, 1);
}
EXPORT_KERNEL(turns, turns)

}  // namespace lowmoe
