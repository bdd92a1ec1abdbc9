// What every operation on a layer shares: the instruction set, the threads, scratch of each thread,
// and the two things that all of them do, norm and multiply.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lowmoe/kernels/cpu/buffer.h"
#include "lowmoe/kernels/cpu/isa.h"
#include "lowmoe/kernels/cpu/matrix.h"
#include "lowmoe/kernels/cpu/pool.h"

namespace lowmoe {

// A matrix with its input transform.  d: float16 [n_in].
struct Linear {
  TrellisMatrix w;
  const uint16_t* d;
};

// What tokens pass before a matrix.
struct Norm {
  const float* weight;  // [n_hidden]
  float epsilon;
  const float* bias;  // [n_hidden], or null
  bool centred;       // whether the mean is taken off before: a layer norm, else an RMS norm
};

// Row blocks of gate, up, gate, up: what one unit of an expert's inner channels needs at once.
inline constexpr size_t kInnerChannels = kScaleColumns;
inline constexpr size_t kUnitRows = 2 * kInnerChannels;

class Engine {
 public:
  // max_tokens: the most tokens of any call.  Throws std::bad_alloc.
  Engine(const Isa& isa, Pool& pool, const Code& code, size_t max_tokens);

  const Isa& isa() const { return isa_; }
  const Code& code() const { return code_; }
  Pool& pool() const { return pool_; }
  size_t max_tokens() const { return max_tokens_; }

  // [max_tokens][kUnitRows] floats of one thread's own.
  float* rows_of(int thread) const { return rows_.data() + thread * max_tokens_ * kUnitRows; }

  // y[t][r] = row 64 * row_block + r of w times token t, for the rows that there are, at most 64.
  //   y  [n][stride]
  void multiply_block(int thread, const TrellisMatrix& w, size_t row_block, const RoundedTokens& x,
                      size_t n, float* y, size_t stride) const;

  // y [n][stride] = w times n tokens, all threads.
  void multiply(Team& team, const char* phase, const TrellisMatrix& w, const RoundedTokens& x,
                size_t n, float* y, size_t stride) const;

  // y += w times n tokens, all threads.
  void multiply_add(Team& team, const char* phase, const TrellisMatrix& w, const RoundedTokens& x,
                    size_t n, float* y, size_t stride) const;

  // y = norm(x) of one token, n_in floats; y may be x.
  void norm(const Norm& norm, const float* x, size_t n_in, float* y) const;

  // Norms n tokens x [n][n_hidden] into normed, and rounds them into out, in the basis of d.
  void norm_and_round(Team& team, const float* x, size_t n, const Norm& norm, const uint16_t* d,
                      float* normed, const RoundedTokens& out) const;

  // x [n][n_hidden] = kept * normed, but where kept is 0: then x stays as it is.
  void keep_normed(Team& team, const float* normed, float kept, size_t n, size_t n_hidden,
                   float* x) const;

  // Rounds n tokens x [n][x.n_in], in the basis of d.
  void round(Team& team, const float* x, size_t n, const uint16_t* d,
             const RoundedTokens& out) const;

 private:
  uint8_t* tile_of(int thread) const { return tiles_.data() + thread * kTileScratchBytes; }

  const Isa& isa_;
  Pool& pool_;
  Code code_;
  size_t max_tokens_;
  Buffer<float> rows_;
  Buffer<uint8_t> tiles_;
};

}  // namespace lowmoe
