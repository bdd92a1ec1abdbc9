// All that differs between the two ways kernels are compiled: by NVRTC for a card, by a C++
// compiler against tests/cuda_emulator for tests. A kernel uses CUDA's own names and what is
// declared here.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_fp16.h>

// Makes a kernel known to the emulator by name; a card finds it by itself.
#define EXPORT_KERNEL(name, ...)
// Shared memory whose size the launch says, aligned to 16 bytes.
#define DYNAMIC_SHARED(T, name) extern __shared__ __align__(16) T name[]

namespace lowmoe {

// 16 bytes that are read once: past the L1 cache.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// D += A B: A [16, 32] int8 by rows, B [32, 8] int8 by columns, D [16, 8] int32. Fragments as in
// the PTX ISA, mma.m16n8k32.
__device__ __forceinline__ void mma_m16n8k32(int (&d)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of float16: A [16, 16], B [16, 8], D float32 [16, 8].
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 tiles of 16-bit elements from shared memory. Lane l brings the address of 16 bytes,
// row l % 8 of tile l / 8, and gets bytes 4 (l % 4) to 4 (l % 4) + 3 of row l / 4 of each tile: for
// int8, a fragment A of mma_m16n8k32.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// 16 bytes from global to shared memory, there after cp_async_wait; both aligned to 16.
__device__ __forceinline__ void cp_async16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace lowmoe
#else
#include "cuda_emu.h"

#define DYNAMIC_SHARED EMU_DYNAMIC_SHARED

namespace lowmoe {

inline uint4 load_once(const uint4* from) { return *from; }
using emu::cp_async16, emu::cp_async_commit, emu::ldmatrix_x4;
using emu::mma_m16n8k16, emu::mma_m16n8k32;
template <int PENDING>
void cp_async_wait() {
  emu::cp_async_wait(PENDING);
}

}  // namespace lowmoe
#endif
