// CUDA's functions of one thread, applied to whole arrays: see test_emulator.py.
#include "portable.cuh"

namespace lowmoe {

// y [12, n] of words a, b, c [n].
extern "C" __global__ void on_words(const unsigned* a, const unsigned* b, const unsigned* c,
                                    unsigned* y) {
  const int i = threadIdx.x, n = blockDim.x;
  const auto signed_of = [](unsigned word) { return static_cast<int>(word); };
  const unsigned results[] = {
      static_cast<unsigned>(__popc(a[i])),
      static_cast<unsigned>(__clz(signed_of(a[i]))),
      static_cast<unsigned>(__ffs(signed_of(a[i]))),
      __brev(a[i]),
      __funnelshift_r(a[i], b[i], c[i]),
      __funnelshift_l(a[i], b[i], c[i]),
      __byte_perm(a[i], b[i], c[i]),
      static_cast<unsigned>(__dp4a(signed_of(a[i]), signed_of(b[i]), signed_of(c[i]))),
      __umulhi(a[i], b[i]),
      static_cast<unsigned>(min(signed_of(a[i]), signed_of(b[i]))),
      max(a[i], b[i]),
      __float_as_uint(__uint_as_float(a[i])),
  };
  for (int k = 0; k < 12; k++) y[k * n + i] = results[k];
}
EXPORT_KERNEL(on_words, on_words)

// y [4, n] of x [n]: to the nearest integer, towards 0, down, up.
extern "C" __global__ void to_integers(const float* x, int* y) {
  const int i = threadIdx.x, n = blockDim.x;
  y[i] = __float2int_rn(x[i]);
  y[n + i] = __float2int_rz(x[i]);
  y[2 * n + i] = __float2int_rd(x[i]);
  y[3 * n + i] = __float2int_ru(x[i]);
}
EXPORT_KERNEL(to_integers, to_integers)

// y [9, n] of a, b, c [n].
extern "C" __global__ void on_floats(const float* a, const float* b, const float* c, float* y) {
  const int i = threadIdx.x, n = blockDim.x;
  const float results[] = {
      a[i] * b[i] + c[i],  // two roundings
      fmaf(a[i], b[i], c[i]), __fdiv_rn(a[i], b[i]),
      __frcp_rn(a[i]),        __fsqrt_rn(fabsf(a[i])),
      rsqrtf(fabsf(a[i])),    __fmul_rn(a[i], b[i]),
      __expf(a[i]),           __half2float(__float2half_rn(a[i])),
  };
  for (int k = 0; k < 9; k++) y[k * n + i] = results[k];
}
EXPORT_KERNEL(on_floats, on_floats)

// at [9] is changed by all threads; was [9, n]: what each of them found.
extern "C" __global__ void atomics(int* at, int* was) {
  const int i = threadIdx.x, n = blockDim.x;
  was[i] = atomicAdd(at, i);
  was[n + i] = atomicSub(at + 1, i);
  was[2 * n + i] = atomicMax(at + 2, i);
  was[3 * n + i] = atomicMin(at + 3, -i);
  was[4 * n + i] = atomicAnd(at + 4, ~(1 << i % 32));
  was[5 * n + i] = atomicOr(at + 5, 1 << i % 32);
  was[6 * n + i] = atomicExch(at + 6, i);
  was[7 * n + i] = atomicCAS(at + 7, 0, i + 1);
  was[8 * n + i] = static_cast<int>(atomicInc(reinterpret_cast<unsigned*>(at + 8), 9));
}
EXPORT_KERNEL(atomics, atomics)

extern "C" __global__ void parameters(const float* x, int n, long long large, float fraction,
                                      double* y) {
  y[0] = n;
  y[1] = static_cast<double>(large);
  y[2] = fraction;
  y[3] = x[n];
}
EXPORT_KERNEL(parameters, parameters)

// y [blocks, 2]: what nobody has written, in both kinds of shared memory; then writes to it.
extern "C" __global__ void unwritten(int* y) {
  __shared__ int fixed;
  DYNAMIC_SHARED(int, dynamic);
  y[blockIdx.x * 2] = fixed;
  y[blockIdx.x * 2 + 1] = dynamic[0];
  fixed = dynamic[0] = 0;
}
EXPORT_KERNEL(unwritten, unwritten)

}  // namespace lowmoe
