// What the threads of a block and of a warp do together: barriers, shuffles, votes.
//
// Stricter than a card in this: a thread that has ended never arrives, and only barriers order
// memory, shuffles do not. CUDA C++ Programming Guide, sections on synchronization and warps.
#pragma once

#include <bit>

#include "machine.h"

inline void __syncthreads() {
  const emu::Quiet quiet;
  emu::meet_in_block("__syncthreads", false);
}
inline int __syncthreads_count(int vote) {
  const emu::Quiet quiet;
  return static_cast<int>(emu::meet_in_block("__syncthreads_count", vote != 0));
}
inline int __syncthreads_or(int vote) { return __syncthreads_count(vote) > 0; }
inline int __syncthreads_and(int vote) { return __syncthreads_count(vote == 0) == 0; }

inline void __syncwarp(unsigned mask = emu::kWholeWarp) {
  const emu::Quiet quiet;
  emu::meet(mask, "__syncwarp", char{}, [](char*) {}, true);
}

namespace emu {

// The value of lane source(lane, first, last), where first..last are the `width` lanes around this.
template <class T, class Source>
T shuffle(unsigned mask, const char* what, T mine, int width, Source source) {
  const Quiet quiet;
  const T* brought = meet(mask, what, mine, [](T*) {});
  const int lane = static_cast<int>(machine.self->lane), first = lane & ~(width - 1);
  return brought_by(brought, mask, source(lane, first, first + width - 1));
}

// join(a, b) of the values of all lanes of the mask.
template <class T, class Join>
T reduce(unsigned mask, const char* what, T mine, Join join) {
  const Quiet quiet;
  const T* brought = meet(mask, what, mine, [=](T* all) {
    T sum = all[std::countr_zero(mask)];
    for (int lane = std::countr_zero(mask) + 1; lane < kWarp; lane++)
      if (mask >> lane & 1) sum = join(sum, all[lane]);
    for (int lane = 0; lane < kWarp; lane++) all[lane] = sum;
  });
  return brought[machine.self->lane];
}

}  // namespace emu

template <class T>
T __shfl_sync(unsigned mask, T mine, int source, int width = emu::kWarp) {
  return emu::shuffle(mask, "__shfl_sync", mine, width,
                      [=](int, int first, int) { return first + (source & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T mine, int bits, int width = emu::kWarp) {
  return emu::shuffle(mask, "__shfl_xor_sync", mine, width, [=](int lane, int, int last) {
    return (lane ^ bits) <= last ? lane ^ bits : lane;
  });
}
template <class T>
T __shfl_up_sync(unsigned mask, T mine, unsigned by, int width = emu::kWarp) {
  return emu::shuffle(mask, "__shfl_up_sync", mine, width, [=](int lane, int first, int) {
    const int source = lane - static_cast<int>(by);
    return source >= first ? source : lane;
  });
}
template <class T>
T __shfl_down_sync(unsigned mask, T mine, unsigned by, int width = emu::kWarp) {
  return emu::shuffle(mask, "__shfl_down_sync", mine, width, [=](int lane, int, int last) {
    const int source = lane + static_cast<int>(by);
    return source <= last ? source : lane;
  });
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
  const unsigned mine = vote ? 1u << emu::machine.self->lane : 0;
  return emu::reduce(mask, "__ballot_sync", mine, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote == 0) == 0; }

inline unsigned __reduce_add_sync(unsigned mask, unsigned mine) {
  return emu::reduce(mask, "__reduce_add_sync", mine, [](unsigned a, unsigned b) { return a + b; });
}
inline int __reduce_add_sync(unsigned mask, int mine) {
  return static_cast<int>(__reduce_add_sync(mask, static_cast<unsigned>(mine)));
}
template <class T>
T __reduce_max_sync(unsigned mask, T mine) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return emu::reduce(mask, "__reduce_max_sync", mine, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T mine) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return emu::reduce(mask, "__reduce_min_sync", mine, [](T a, T b) { return b < a ? b : a; });
}
