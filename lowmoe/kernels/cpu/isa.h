// The innermost loops, once for each instruction set, and the choice among them.
//
// Each set fills these tables in files of its own, compiled for it alone; everything else is
// compiled for the oldest processor and calls through them. Results that are sums of products of
// integers are the same in every set, bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowmoe/kernels/cpu/matrix.h"

namespace lowmoe {

// Products with trellis planes: trellis_*.cpp. All of them: any thread may call, nothing allocated.
struct TrellisKernels {
  // Multiplies the 64 rows of one row block with one token.
  //   y[r] = gain * sum over planes p of  row_scale[p][r] * scale_unit * sum over groups g of 128
  //          columns of  x.scales[g] * T,   T = sum over the group of  nibble * table value * code
  // T is an exact integer below 2^24. In float32: acc_p = fma(T, x.scales[g], acc_p) over g from
  // first to last; y = sum over p, first to last, of  acc_p * (row_scale * (scale_unit * gain)),
  // each product rounded before it is added. So y is the same in every instruction set.
  //   y  64 floats, overwritten
  void (*dot_block)(const TrellisMatrix& w, size_t row_block, const RoundedTokens& x, float* y);

  // The same for n_tokens tokens: decodes each weight once or twice. For few tokens y is that of
  // dot_block, bit for bit. For more, the planes of a stack are first added up and rounded to int8
  // with one scale for each row and 128 columns: trellis_tile.h says where the line is and what it
  // costs.
  //   y        [n_tokens][y_stride] floats, 64 of each token overwritten
  //   scratch  kTileScratchBytes, aligned to 64, this thread's own
  void (*multiply_block)(const TrellisMatrix& w, size_t row_block, const RoundedTokens& x,
                         size_t n_tokens, float* y, size_t y_stride, uint8_t* scratch);
};

inline constexpr size_t kTileScratchBytes = 16 * 1024;

// How keys and values are kept, for each head of each token.
enum class KvFormat : int { kFloat32 = 0, kFloat16 = 1, kInt8 = 2 };

// Queries of tokens that follow each other, and what they see.
struct QueryBlock {
  const float* q;   // token t's at q + t * q_stride: [n_queries][size], as for attend_part
  size_t q_stride;  // floats
  size_t n_tokens;
  size_t n_queries;  // query heads of a token, which share one key-value head
  size_t end;        // token t sees the positions below end + t,
  size_t window;     // of which the latest `window`; SIZE_MAX for all
  float cap = 0;     // scores become cap * tanh(score / cap); 0 for as they are
};

// How attend_block cuts its work at most, in any set.
inline constexpr size_t kBlockPositions = 64;
inline constexpr size_t kBlockRows = 32;  // a row is one query head of one token

// Floats of scratch that attend_block needs for n_rows = n_tokens * n_queries.
constexpr size_t block_scratch_floats(size_t n_rows, size_t size) {
  return (2 * kBlockPositions + layout::round_up(n_rows, kBlockRows)) * size +
         kBlockPositions * kBlockRows;
}

// What one token does to a head's state, and reads of it.
struct StateStep {
  const float* query;  // [n_rows]
  const float* key;    // [n_rows]
  const float* value;  // [n_columns]
  size_t n_rows, n_columns;
  float remains;     // of the state
  float correction;  // times what is added
  bool corrects;     // whether what the state knew of the value is taken off before
};

// Everything in floating point: vector_*.cpp.
struct VectorKernels {
  // y = x / rms(x) * weight.  n floats each; y may be x.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, size_t n, float* y);

  // y = (x - mean) / deviation * weight.  n floats each; y may be x.
  void (*layer_norm)(const float* x, const float* weight, float epsilon, size_t n, float* y);

  // x' = H (d * x) rounded to int8, as quant/activations.py says, bit for bit.
  //   x        n floats, the first of them column `first_column`, a multiple of 128
  //   n        a multiple of 128, unless the last of them is the matrix's last column
  //   d        float16 of the whole matrix
  //   token    one token of `out`, of which only these columns are written
  void (*round_token)(const float* x, const uint16_t* d, size_t first_column, size_t n,
                      const RoundedTokens& token);

  // y[i] = silu(gate[i]) * up[i].  y may be gate.
  void (*silu_multiply)(const float* gate, const float* up, size_t n, float* y);

  // sum of a[i] * b[i].
  float (*dot)(const float* a, const float* b, size_t n);

  // y[i] += scale * x[i].
  void (*add_scaled)(const float* x, float scale, size_t n, float* y);

  // y[t][r] = row r times x[t], rows being int8 heads of kv_cache.h.
  //   x     [n][size]
  //   rows  [n_rows], stride bytes apart
  //   y     [n][y_stride], of which n_rows of each are written
  void (*multiply_rows)(const float* x, size_t n, const uint8_t* rows, size_t stride, size_t size,
                        size_t n_rows, float* y, size_t y_stride);

  // Turns one head to its position: halves of the head turn together, cos and sin have size / 2.
  void (*rotate)(float* head, const float* cos, const float* sin, size_t size);

  // Stores one head of one token; `to` has head_bytes(format, size) bytes, see kv_cache.h.
  void (*store_head)(KvFormat format, const float* head, size_t size, uint8_t* to);

  // Attention of n_queries query heads that share one key-value head, over cached positions
  // [first, last), as a part that can be merged with others:
  //   q       [n_queries][size], already turned and multiplied with 1 / sqrt(size)
  //   keys, values   of position 0; positions are `stride` bytes apart
  //   top, total     [n_queries]: the largest score, and the sum of exp(score - top)
  //   out            [n_queries][size]: the sum of exp(score - top) * value, not divided
  //   scratch        n_queries * (last - first) floats
  //   cap            as in QueryBlock
  void (*attend_part)(KvFormat format, const float* q, size_t n_queries, const uint8_t* keys,
                      const uint8_t* values, size_t stride, size_t size, size_t first, size_t last,
                      float* top, float* total, float* out, float* scratch, float cap);

  // The same for tokens that follow each other: adds positions [first, last), as far as a token
  // sees them, to what it has found so far. Fastest where the number of rows, n_tokens * n_queries,
  // is a multiple of kBlockRows.
  //   keys, values   of position `first`; positions are `stride` bytes apart; all must be finite,
  //                  also those that some token does not see
  //   top, total     [n_tokens][n_queries]: as attend_part leaves them; at first -infinity and 0
  //   out            [n_tokens][n_queries][size]: likewise; at first 0
  //   scratch        block_scratch_floats
  void (*attend_block)(KvFormat format, const QueryBlock& queries, const uint8_t* keys,
                       const uint8_t* values, size_t stride, size_t size, size_t first, size_t last,
                       float* top, float* total, float* out, float* scratch);

  // to = remains * from + key^T added, added = correction * value, or, where it corrects,
  // correction * (value - remains * key from);  out = query to.
  //   from, to  [n_rows][n_columns], `to` may be `from`;  out  [n_columns]
  void (*step_state)(const StateStep& token, const float* from, float* to, float* out);
};

struct EncoderKernels;  // encoder.h

// An instruction set that this build has code for.
struct Isa {
  const char* name;  // as LOWMOE_ISA spells it
  bool (*runs_here)();
  const TrellisKernels* trellis;
  const VectorKernels* vector;
  const EncoderKernels* encoder;
};

// Every set of this build, the best first; "scalar" is the last.
const Isa* const* all_isas(size_t* count);

// The best that this processor runs.
const Isa& best_isa();

}  // namespace lowmoe
