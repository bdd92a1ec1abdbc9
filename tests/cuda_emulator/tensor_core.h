// What a warp does with fragments of matrices. Which lane holds what: PTX ISA, sections "Matrix
// Fragments for mma.m16n8k16" and "mma.m16n8k32".
#pragma once

#include "machine.h"

namespace emu {

// What lane l brings: rows l / 4 and l / 4 + 8 of A and D, column l / 4 of B.
template <class Sum>
struct Fragments {
  unsigned a[4];
  unsigned b[2];
  Sum d[4];
};

// D += A B, A [16][K] by rows, B [K][8] by columns; element(word, i): number i of a word. Sums of
// float are rounded one after the other, k ascending; a card's order is its own.
template <int K, class Sum, class Element>
void mma(Sum (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const char* what,
         Element element) {
  constexpr int kPerWord = K / 8;
  const Quiet quiet;
  const Fragments<Sum> mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  const Fragments<Sum>* all = meet(kWholeWarp, what, mine, [=](Fragments<Sum>* of) {
    Sum rows[16][K], columns[8][K];
    for (int l = 0; l < kWarp; l++)
      for (int i = 0; i < kPerWord; i++) {
        const int k = l % 4 * kPerWord + i;
        for (int r = 0; r < 4; r++)
          rows[l / 4 + 8 * (r % 2)][k + K / 2 * (r / 2)] = element(of[l].a[r], i);
        for (int r = 0; r < 2; r++) columns[l / 4][k + K / 2 * r] = element(of[l].b[r], i);
      }
    for (int l = 0; l < kWarp; l++)
      for (int r = 0; r < 4; r++)
        for (int k = 0; k < K; k++)
          of[l].d[r] += rows[l / 4 + 8 * (r / 2)][k] * columns[l % 4 * 2 + r % 2][k];
  });
  for (int r = 0; r < 4; r++) d[r] = all[machine.self->lane].d[r];
}

inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  mma<16>(d, a, b, "mma.m16n8k16", [](unsigned word, int i) {
    __half_raw half;
    half.x = static_cast<unsigned short>(word >> (16 * i));
    return __half2float(__half(half));
  });
}

inline void mma_m16n8k32(int (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  mma<32>(d, a, b, "mma.m16n8k32",
          [](unsigned word, int i) { return int{static_cast<signed char>(word >> (8 * i))}; });
}

// Lane l brings row l % 8 of tile l / 8, 16 bytes, and gets word l % 4 of row l / 4 of each tile.
inline void ldmatrix_x4(unsigned (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    fail("ldmatrix, but the address of a row is no multiple of 16");
  const unsigned* rows[4];
  const unsigned lane = machine.self->lane;
  {
    const Quiet quiet;
    const void* const* all = meet(kWholeWarp, "ldmatrix", row, [](const void**) {});
    for (unsigned i = 0; i < 4; i++) rows[i] = static_cast<const unsigned*>(all[8 * i + lane / 4]);
  }
  for (int i = 0; i < 4; i++) to[i] = rows[i][lane % 4];  // the thread's own accesses
}

}  // namespace emu
