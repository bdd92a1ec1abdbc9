// Where things lie: planes as quant/layout.h cuts them, the tokens of a run.
#pragma once

#include "trellis.cuh"

namespace lowmoe {

// Rounded tokens, see cuda_ext/ops.py.
struct RoundedTokens {
  const int8_t* codes;  // [.][n_columns]
  const float* scales;  // [.][n_groups]
  int n_columns, n_groups;

  __device__ __forceinline__ RoundedTokens(const int8_t* codes, const float* scales, int n_in)
      : codes(codes),
        scales(scales),
        n_columns((n_in + layout::kBlockColumns - 1) / layout::kBlockColumns *
                  layout::kBlockColumns),
        n_groups((n_in + 127) / 128) {}
};

// The cells of one plane of a strip, as a lane finds its part of them.
template <int kTokens>
struct Run {
  const uint8_t* plane;
  unsigned words, nibbles;   // of the first cell, bytes from `plane`; words of slice 4 t
  unsigned codes;            // bytes from RoundedTokens::codes
  unsigned scales[kTokens];  // numbers from RoundedTokens::scales

  __device__ __forceinline__ const uint8_t* words_of(unsigned column_block) const {
    return plane + (words + column_block * layout::kBlockCodeBytes);
  }
  __device__ __forceinline__ CellNibbles nibbles_of(unsigned column_block) const {
    const uint8_t* from = plane + (nibbles + column_block * layout::kBlockScaleBytes);
    return {__ldg(reinterpret_cast<const unsigned*>(from)),
            __ldg(reinterpret_cast<const unsigned*>(from + 16))};
  }
  __device__ __forceinline__ CellTokens<kTokens> tokens_of(const RoundedTokens& tokens,
                                                           unsigned column_block) const {
    CellTokens<kTokens> part;
    const int8_t* from = tokens.codes + (codes + column_block * layout::kBlockColumns);
    part.codes = __ldg(reinterpret_cast<const uint4*>(from));
#pragma unroll
    for (int k = 0; k < kTokens; k++) {
      part.scales[k] = __ldg(tokens.scales + (scales[k] + column_block / 2));
    }
    return part;
  }
};

// The regions of a plane of a matrix, in bytes from its beginning.
struct Regions {
  int n_row_blocks, n_column_blocks;
  unsigned nibbles, row_scales, gain;

  Regions() = default;  // in shared memory
  __device__ __forceinline__ Regions(int n_out, int n_in) {
    const layout::PlaneLayout plane{static_cast<size_t>(n_out), static_cast<size_t>(n_in)};
    n_row_blocks = static_cast<int>(plane.row_blocks());
    n_column_blocks = static_cast<int>(plane.column_blocks());
    nibbles = static_cast<unsigned>(plane.group_scale_offset());
    row_scales = static_cast<unsigned>(plane.row_scale_offset());
    gain = static_cast<unsigned>(plane.gain_offset());
  }
  __device__ __forceinline__ unsigned plane_bytes() const {
    return gain + layout::kRegionAlignment;
  }
  __device__ __forceinline__ int n_strips() const {
    return (n_row_blocks + kStripBlocks - 1) / kStripBlocks;
  }

  // A row block of a strip; the last strip may have one only, which then counts twice.
  __device__ __forceinline__ int row_block(int strip, int which) const {
    return min(strip * kStripBlocks + which, n_row_blocks - 1);
  }

  // The words and nibbles of a run of a plane. Offsets have 32 bits: a plane is below 4 GB.
  template <int kTokens>
  __device__ __forceinline__ void open(const uint8_t* plane, int strip, const Part& part,
                                       Run<kTokens>& run) const {
    constexpr int kSliceBytes = layout::kBlockCodeBytes / layout::kSlices;
    const unsigned block = row_block(strip, part.row_block) * n_column_blocks;
    run.plane = plane;
    run.words = block * layout::kBlockCodeBytes + part.t * 4 * kSliceBytes + part.q * 16;
    run.nibbles = nibbles + block * layout::kBlockScaleBytes + part.q * 4;
  }

  // 8 of the 128 row scales of a strip, float16, those of `eighth` 0 to 15.
  __device__ __forceinline__ const uint8_t* row_scales_of(const uint8_t* plane, int strip,
                                                          int eighth) const {
    const int row = row_block(strip, eighth / 8) * layout::kBlockRows + eighth % 8 * 8;
    return plane + row_scales + row * sizeof(__half);
  }
};

// The tokens of a run, at least one. row_of(i): where the i-th of n_tokens is among `tokens`.
template <int kTokens, class F>
__device__ __forceinline__ void give_tokens(const RoundedTokens& tokens, int n_tokens,
                                            const Part& part, F row_of, Run<kTokens>& run) {
  const int column = part.row_block * 4 + part.q;  // of B; with few tokens, every other one is used
  const int i = min(kTokens == 1 ? column / 2 : column, n_tokens - 1);
  run.codes = row_of(i) * tokens.n_columns + 16 * part.t;
#pragma unroll
  for (int k = 0; k < kTokens; k++) {
    run.scales[k] = row_of(min(part.t * kTokens + k, n_tokens - 1)) * tokens.n_groups;
  }
}

}  // namespace lowmoe
