// Keys and values as they lie in the cache, and steps through them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lowmoe/kernels/cpu/kv_cache.h"

namespace lowmoe::vector {

// So many positions ahead are asked for; 16 to 64 measure alike, none takes twice as long from RAM.
inline constexpr size_t kAhead = 32;
inline constexpr size_t kCacheLine = 64;  // bytes

// Keys or values as they lie in the cache; Stored is float, uint16_t for float16, or int8_t.
template <class Stored>
struct CachedRows {
  const uint8_t* of_zero;
  size_t stride;
  size_t size;

  static constexpr bool kScaled = std::is_same_v<Stored, int8_t>;

  const Stored* at(size_t position) const {
    return reinterpret_cast<const Stored*>(of_zero + position * stride);
  }
  // Asks for n numbers of a row from the i-th on, which may lie past the end: nothing is read.
  // Inlined always: GCC 12 takes a call of it for one without effect, and drops it.
  [[gnu::always_inline]] void prefetch(size_t position, size_t i, size_t n) const {
    const uint8_t* from = of_zero + position * stride + i * sizeof(Stored);
    for (size_t byte = 0; byte < n * sizeof(Stored); byte += kCacheLine) {
      __builtin_prefetch(from + byte);
    }
  }
  float scale(size_t position) const {
    float value;
    std::memcpy(&value, of_zero + position * stride + head_scale_offset(size), sizeof value);
    return value;
  }
};

// Calls f.operator()<k>(i) for i from `from` to n in steps of k: the most at first, then halves.
template <size_t kMost, class F>
void in_steps(size_t from, size_t n, F&& f) {
  for (; from + kMost <= n; from += kMost) f.template operator()<kMost>(from);
  if constexpr (kMost > 1) in_steps<kMost / 2>(from, n, f);
}

// kRows neighbouring positions' rows; with kWhole false, only the first n are, and the others the
// last of these again.
template <size_t kRows, bool kWhole, class Stored>
struct RowPointers {
  const Stored* at[kRows];

  RowPointers(const CachedRows<Stored>& rows, size_t position, size_t n) {
    for (size_t r = 0; r < kRows; r++) at[r] = rows.at(position + (kWhole || r < n ? r : n - 1));
  }
};

}  // namespace lowmoe::vector
