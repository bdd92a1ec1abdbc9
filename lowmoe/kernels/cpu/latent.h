// Attention whose cache keeps latent vectors, as tokens are decoded: in the latents' own channels.
// Source: arXiv 2405.04434, section 2.1 and appendix C.
//
// A head's key of a cached token is K latent, its value V latent, and the key that all heads share
// and that alone turns. So q . (K latent) is (K^T q) . latent, and a weighted sum of V latent is V
// times that of the latents: what is cached of a token is read once for all heads, and never
// unfolded. K^T and V are applied to each new token alone.
//
// K^T needs rows of what are columns of the checkpoint's matrix, so planes, whose rows are coded
// together with a transform along them, do not serve. Both are kept as int8, one scale a row,
// decoded from the planes once: 8 bits a weight where three planes have 6.2 and bfloat16 16, and an
// error of 5e-5 of a weight's energy beside the planes' 4.6e-4.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "lowmoe/kernels/cpu/engine.h"
#include "lowmoe/kernels/cpu/kv_pages.h"

namespace lowmoe {

struct AttentionLayer;

// A matrix of each head, [n_rows][size], as int8 heads of kv_cache.h.
class HeadRows {
 public:
  HeadRows(size_t n_heads, size_t n_rows, size_t size);

  uint8_t* row(size_t head, size_t r) const {
    return bytes_.data() + (head * n_rows_ + r) * stride_;
  }
  // y[t][r] = row r of a head times x[t].
  //   x  [n][size]    y  [n][y_stride]
  void multiply(const Isa& isa, size_t head, const float* x, size_t n, float* y,
                size_t y_stride) const;
  size_t n_rows() const { return n_rows_; }
  size_t size() const { return size_; }

 private:
  size_t n_rows_, size_, stride_;
  Buffer<uint8_t> bytes_;
};

// What queries, latents and heads are made with; one layer's.
struct LatentProjection {
  std::optional<Linear> q_down;  // [q_rank, n_hidden]; none where queries come of x itself
  const float* q_norm;           // [q_rank], or null
  Linear q_up;                   // [n_heads * key_size, q_rank or n_hidden]
  Linear kv_down;                // [kv_rank + rope_size, n_hidden]
  const float* kv_norm;          // [kv_rank]
  float norm_epsilon;
  HeadRows keys_up;    // K^T, [kv_rank][plain_size] of each head
  HeadRows values_up;  // V, [value_size][kv_rank] of each head
  size_t n_heads, rope_size;

  size_t plain_size() const { return keys_up.size(); }
  size_t key_size() const { return plain_size() + rope_size; }
  size_t kv_rank() const { return values_up.size(); }
  size_t value_size() const { return values_up.n_rows(); }
  size_t kept_size() const { return kv_rank() + rope_size; }
};

// K^T and V out of kv_up [n_heads * (plain_size + value_size), kv_rank].
void split_heads(Engine& engine, const Linear& kv_up, size_t n_heads, const HeadRows& keys_up,
                 const HeadRows& values_up);

// The scratch of one operation; layers of one model share it, one after the other.
class Latents {
 public:
  Latents(Engine& engine, const LatentProjection& like);

  // n tokens, normed and as they are, become queries of the kept channels, scaled; and what is kept
  // of them enters the cache.
  //   normed   [n][n_hidden]; rounded: memory for n tokens of as many
  //   angles   cos, then sin, [rope_size / 2] each; those of the next token angle_stride floats on
  //   queries  [n][query_stride], of which [n_heads][kept_size]
  void fold(Team& team, const AttentionLayer& layer, const float* x, size_t n, float* normed,
            const RoundedTokens& rounded, const float* angles, size_t angle_stride,
            const KvPages& cache, size_t layer_id, size_t first, float* queries,
            size_t query_stride);

  // Weighted sums of what is kept become heads' values.
  //   sums  [n][n_heads][kept_size]
  // Returns [n][n_heads * value_size].
  const float* unfold(Team& team, const LatentProjection& of, const float* sums, size_t n);

 private:
  static constexpr size_t kTokensAtOnce = 4;

  void keep(Team& team, const LatentProjection& of, size_t n, const float* angles,
            size_t angle_stride, const KvPages& cache, size_t layer_id, size_t first);
  float* gathered(int thread) const { return gathered_.data() + thread * floats_of_thread_; }

  Engine& engine_;
  size_t q_rank_, floats_of_thread_;
  Buffer<float> q_latent_, full_, kept_, values_, gathered_;
  RoundedBuffer rounded_q_;
};

}  // namespace lowmoe
