// x += attention(norm(x)), for one layer of grouped-query attention, on all threads.
// Source: arXiv 2305.13245; rotary positions as in arXiv 2104.09864, halves of a head turn
// together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "lowmoe/kernels/cpu/engine.h"
#include "lowmoe/kernels/cpu/kv_pages.h"
#include "lowmoe/kernels/cpu/latent.h"

namespace lowmoe {

// Of which queries and keys the RMS norm is taken: of none, of each head before or after it is
// turned, or of all heads together.
enum class HeadNorm : int { kNone = 0, kBeforeRope = 1, kAfterRope = 2, kAllHeads = 3 };

// Query heads of a latent that one thread attends with at a time, at most.
inline constexpr size_t kMostLatentHeads = 8;

struct AttentionLayer {
  Norm norm;
  Linear qkv;                // rows: all heads of q, then of k, then of v, then of gates
  Linear out;                // [n_hidden, q_size]
  const float* frequencies;  // [rope_size / 2], of rotary positions, radians a token
  size_t n_hidden, n_heads, n_kv_heads, head_size;
  size_t window;  // the latest tokens that a token sees, itself included; 0 for all
  size_t chunk;   // it sees those of its own chunk of so many; 0 for all

  size_t rope_size;       // channels that turn, the first of each head; 0 for none
  float rope_length;      // what those that turn are multiplied by
  float score_scale;      // what scores are multiplied by
  float score_cap;        // scores are then cap * tanh(score / cap); 0 for as they are
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

  // Queries at position p times 1 + temperature_scale * log(1 + floor((p + 1) / temperature_step));
  // 0 for none.
  size_t temperature_step;
  float temperature_scale;

  std::optional<Norm> out_norm;  // of what is added to x

  // Null for the above; else what takes the place of qkv: a single key-value head of what is kept,
  // keys and values at once, and neither norms, biases, clamp nor sinks.
  std::shared_ptr<const LatentProjection> latent;

  size_t q_size() const { return n_heads * head_size; }
  size_t kv_size() const { return n_kv_heads * head_size; }
  // Channels of a token that come of x, or of its latent for queries.
  size_t n_qkv() const {
    return latent ? q_size() : q_size() + 2 * kv_size() + (gated ? q_size() : 0);
  }
  float query_scale(size_t position) const;
  // Query heads that one thread attends with at a time; they share a key-value head.
  size_t group() const;
};

// Where a token is.  cache: its conversation's, with room for its position.
struct Place {
  KvPages* cache;
  size_t position;
};

// The operation and its scratch; layers of one model share it, one after the other.
class Attention {
 public:
  // like: any layer; all must have its sizes.  max_context: the most positions of any cache.
  // max_sequences: the most tokens of step().
  Attention(Engine& engine, const AttentionLayer& like, size_t max_context, size_t max_sequences);

  // n tokens x [n][n_hidden] at positions first on, n <= max_tokens. Their keys and values enter
  // the cache, which has room for them.
  void run(const AttentionLayer& layer, size_t layer_id, KvPages& cache, size_t first, float* x,
           size_t n);

  // One token x [n_hidden] of each of several conversations, all at once, each as run() does it
  // alone, bit for bit.
  void step(const AttentionLayer& layer, size_t layer_id, std::span<const Place> places, float* x);

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

  // The positions that a token of a step sees, shared out in parts.
  struct Cut {
    size_t begin, end;           // positions
    size_t first_part, n_parts;  // which parts they are in
    size_t first_unit;           // where units of it begin: one for each head and part
  };

  template <class Attend>
  void compute(const AttentionLayer& layer, size_t layer_id, float* x, const Attend& attend);
  Part part_at(float* floats, size_t n_rows) const;
  Part part_of(size_t index) const;
  size_t tile_tokens() const;
  void adjust(Team& team, const AttentionLayer& layer, size_t n);
  void set_angles(const AttentionLayer& layer);
  void place(Team& team, const AttentionLayer& layer, size_t layer_id);
  size_t cut(const AttentionLayer& layer);
  void attend_each(Team& team, const AttentionLayer& layer, size_t layer_id, size_t n_units);
  void attend_many(Team& team, const AttentionLayer& layer, size_t layer_id, const KvPages& cache,
                   size_t first, size_t n);
  void gate(Team& team, const AttentionLayer& layer, size_t n);
  const float* sinks_of(const AttentionLayer& layer, size_t head) const;
  void add_output(Team& team, const AttentionLayer& layer, const RoundedTokens& found, float* x,
                  size_t n);
  void attend_pages(int thread, const AttentionLayer& layer, size_t layer_id, size_t token,
                    size_t head, size_t begin, size_t end, const Part& to);
  void attend_tile(int thread, const AttentionLayer& layer, size_t layer_id, const KvPages& cache,
                   size_t head, size_t first, size_t token, size_t count);
  void merge(const Part& from, const Part& to) const;
  void divide(const Part& from, const float* sinks, float* to) const;
  float* attended_of(size_t token, size_t head) const;

  Engine& engine_;
  size_t n_qkv_, q_size_, head_size_, group_, n_groups_, groups_of_kv_head_;
  std::vector<Place> places_;  // of this pass's tokens
  std::vector<Cut> cuts_;      // of this layer's
  Buffer<float> normed_, qkv_, attended_, angles_;
  RoundedBuffer rounded_in_, rounded_out_;
  std::optional<Latents> latents_;
  Buffer<float> parts_;          // of the tokens of a step
  Buffer<float> thread_floats_;  // each thread's own
  size_t floats_of_thread_;
  const float* angles_of_ = nullptr;      // whose frequencies the angles are of
  std::vector<size_t> angles_positions_;  // which positions
};

}  // namespace lowmoe
