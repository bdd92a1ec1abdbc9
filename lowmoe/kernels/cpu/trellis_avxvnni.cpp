// AVX-VNNI: the look-ups of AVX2, vpdpbusd for the products.
#include "lowmoe/kernels/cpu/trellis_avx2.h"

namespace lowmoe {

namespace {

struct Vnni {
  static constexpr size_t kMostDots = 4;

  // As asm for the reason that trellis_avx512.cpp has.
  static __m256i add(__m256i sums, __m256i values, __m256i columns) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(values), "x"(columns));
    return sums;
  }

  static int32_t start(const RoundedTokens& token, size_t g, int n_slices) {
    return -kTileOffset * sum_of_group(token, g, n_slices);
  }
  static __m256i add_tile(__m256i sums, __m256i codes, __m256i columns) {
    return add(sums, codes, columns);
  }
};

struct AvxVnni : Dots256<Vnni>, Tiles256<Vnni> {
  static constexpr size_t kMostTokens = 6;  // 12 sums, 2 registers of codes, 1 of a token
};

}  // namespace

extern const TrellisKernels kTrellisAvxVnni;
const TrellisKernels kTrellisAvxVnni{dot_block<AvxVnni>, multiply_block<AvxVnni>};

}  // namespace lowmoe
