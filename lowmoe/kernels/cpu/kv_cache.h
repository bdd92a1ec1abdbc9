// How one head of one token lies in a cache of keys or values, `size` numbers:
//
//   float32   [size] float
//   float16   [size] float16; rounded to the nearest, 65520 and more to infinity
//   int8      [size rounded up to 4] int8 codes, then one float scale: number = code * scale.
//             scale = largest magnitude / 127, 0 where that is below kSilence of vector_round.h,
//             NaN with codes 0 where a number is infinite or NaN
//
// A head's bytes are a multiple of 4 in float32 and int8, of 2 in float16; so is what a caller adds
// up to a stride, and kernels ask for no more alignment.
#pragma once

#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe {

constexpr size_t head_scale_offset(size_t size) { return (size + 3) / 4 * 4; }

constexpr size_t head_bytes(KvFormat format, size_t size) {
  if (format == KvFormat::kFloat32) return sizeof(float) * size;
  if (format == KvFormat::kFloat16) return sizeof(uint16_t) * size;
  return head_scale_offset(size) + sizeof(float);
}

}  // namespace lowmoe
