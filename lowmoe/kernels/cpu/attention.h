// x += attention(norm(x)), for one layer of grouped-query attention, on all threads.
// Source: arXiv 2305.13245; rotary positions as in arXiv 2104.09864, halves of a head turn
// together.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowmoe/kernels/cpu/engine.h"
#include "lowmoe/kernels/cpu/kv_pages.h"

namespace lowmoe {

// Of which queries and keys the RMS norm is taken: of none, of each head before or after it is
// turned, or of all heads together.
enum class HeadNorm : int { kNone = 0, kBeforeRope = 1, kAfterRope = 2, kAllHeads = 3 };

struct AttentionLayer {
  const float* norm;  // [n_hidden]
  float norm_epsilon;
  Linear qkv;                // rows: all heads of q, then of k, then of v, then of gates
  Linear out;                // [n_hidden, q_size]
  const float* frequencies;  // [rope_size / 2], of rotary positions, radians a token
  size_t n_hidden, n_heads, n_kv_heads, head_size;
  size_t window;  // the latest tokens that a token sees, itself included; 0 for all

  size_t rope_size;       // channels that turn, the first of each head
  float rope_length;      // what those that turn are multiplied by
  float score_scale;      // what scores are multiplied by
  const float* qkv_bias;  // [q_size + 2 * kv_size], or null
  const float* out_bias;  // [n_hidden], or null
  HeadNorm head_norm;
  const float* q_norm;  // [head_size], of all heads [q_size]; null without a norm
  const float* k_norm;  // [head_size], of all heads [kv_size]
  float head_norm_epsilon;
  float clamp;         // queries, keys and values are kept within +-clamp; infinity for none
  const float* sinks;  // [n_heads], each head's score of nothing; or null
  bool gated;          // what heads put out is multiplied by the sigmoid of gates [q_size]
  float kept;          // x becomes kept * norm(x) before anything is added; 0 if it stays as it is

  size_t q_size() const { return n_heads * head_size; }
  size_t kv_size() const { return n_kv_heads * head_size; }
  size_t n_qkv() const { return q_size() + 2 * kv_size() + (gated ? q_size() : 0); }
  size_t group() const { return n_heads / n_kv_heads; }
};

// The operation and its scratch; layers of one model share it, one after the other.
class Attention {
 public:
  // like: any layer; all must have its sizes.  max_context: the most positions of any cache.
  Attention(Engine& engine, const AttentionLayer& like, size_t max_context);

  // n tokens x [n][n_hidden] at positions first on, n <= max_tokens. Their keys and values enter
  // the cache, which has room for them.
  void run(const AttentionLayer& layer, size_t layer_id, KvPages& cache, size_t first, float* x,
           size_t n);

 private:
  // Positions that one thread attends to before another may take over, for a single token.
  static constexpr size_t kPartTokens = 4 * KvPages::kPageTokens;
  // Query heads, of some tokens, that one thread attends with at a time in a prompt.
  static constexpr size_t kTileRows = 2 * kBlockRows;

  // Rows of query heads over some positions, to be merged with others, see attend_part.
  struct Part {
    float* top;    // [rows]
    float* total;  // [rows]
    float* out;    // [rows][head_size]
  };

  Part part_at(float* floats, size_t n_rows) const;
  Part part_of(size_t index) const;
  size_t tile_tokens() const;
  void adjust(Team& team, const AttentionLayer& layer, size_t n);
  void set_angles(const AttentionLayer& layer, size_t first, size_t n);
  void place(Team& team, const AttentionLayer& layer, size_t layer_id, const KvPages& cache,
             size_t first, size_t n);
  void attend_one(Team& team, const AttentionLayer& layer, size_t layer_id, const KvPages& cache,
                  size_t position);
  void attend_many(Team& team, const AttentionLayer& layer, size_t layer_id, const KvPages& cache,
                   size_t first, size_t n);
  void gate(Team& team, const AttentionLayer& layer, size_t n);
  const float* sinks_of(const AttentionLayer& layer, size_t head) const;
  void attend_pages(int thread, size_t layer_id, const KvPages& cache, size_t head, size_t begin,
                    size_t end, const Part& to);
  void attend_tile(int thread, const AttentionLayer& layer, size_t layer_id, const KvPages& cache,
                   size_t head, size_t first, size_t token, size_t count);
  void merge(const Part& from, const Part& to) const;
  void divide(const Part& from, const float* sinks, float* to) const;

  Engine& engine_;
  size_t n_qkv_, q_size_, head_size_, group_;
  Buffer<float> normed_, qkv_, attended_, angles_;
  RoundedBuffer rounded_in_, rounded_out_;
  Buffer<float> parts_;          // of a single token
  Buffer<float> thread_floats_;  // each thread's own
  size_t floats_of_thread_;
  const float* angles_of_ = nullptr;  // whose frequencies the angles are of
  size_t angles_first_ = 0, angles_count_ = 0;
};

}  // namespace lowmoe
