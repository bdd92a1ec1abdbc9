// All active experts of a layer for few tokens: gate, up and what becomes of them in one launch,
// down and the weighted sum in another.
//
// Which experts, how many and where their bytes are is read on the card, so that a CUDA graph may
// be replayed while experts come and go; sizes alone decide the grid.
#include "activation.cuh"
#include "experts.cuh"
#include "round.cuh"
#include "strips.cuh"

namespace lowmoe {

// What gate|up and down have in common. Strips are those of the first present expert, then of the
// second, ...
template <int kTokens>
struct ExpertStrips {
  RoundedTokens tokens;
  float scale_unit;
  const PresentExperts& present;
  int strips_of_expert, most_tokens, n_planes, n_strips, n_column_blocks;

  __device__ __forceinline__ ExpertStrips(const RoundedTokens& tokens, float scale_unit,
                                          const ExpertSizes& sizes, const PresentExperts& present)
      : tokens(tokens),
        scale_unit(scale_unit),
        present(present),
        strips_of_expert(present.regions.n_strips()),
        most_tokens(sizes.n_tokens),
        n_planes(sizes.n_planes),
        n_strips(strips_of_expert * present.count),
        n_column_blocks(present.regions.n_column_blocks) {}

  __device__ __forceinline__ const PresentExpert& expert_of(int strip) const {
    return present.list[strip / strips_of_expert];
  }
  __device__ __forceinline__ const uint8_t* plane_of(int strip, int plane) const {
    return expert_of(strip).planes[plane];
  }
  __device__ __forceinline__ int tokens_of(int strip) const { return expert_of(strip).n_tokens; }
  __device__ __forceinline__ const uint8_t* row_scales(int strip, int plane, int eighth) const {
    const int of_expert = strip % strips_of_expert;
    return present.regions.row_scales_of(plane_of(strip, plane), of_expert, eighth);
  }
  __device__ __forceinline__ const uint8_t* gain(int strip) const {
    return plane_of(strip, n_planes - 1) + present.regions.gain;
  }
  // row_of(place): where the token of a place is among `tokens`.
  template <class F>
  __device__ __forceinline__ Run<kTokens> open(int strip, int plane, const Part& part,
                                               F row_of) const {
    const PresentExpert& expert = expert_of(strip);
    Run<kTokens> run;
    present.regions.open(plane_of(strip, plane), strip % strips_of_expert, part, run);
    give_tokens(
        tokens, expert.n_tokens, part, [&](int i) { return row_of(expert.first + i); }, run);
    return run;
  }
};

// Gate and up: a strip has one row block of either, so 64 inner channels, and a unit of two strips
// the 128 that share a scale.
template <int kTokens>
struct Inner : ExpertStrips<kTokens> {
  static constexpr int kUnitStrips = 2;
  using Strips = ExpertStrips<kTokens>;

  const __half* d_inner;  // [E, n_inner]
  Biases bias;            // [E, 2 * n_inner], gate's first
  Activation activation;
  int8_t* codes;  // of rounded tokens to be written, a row for each place
  float* scales;

  __device__ __forceinline__ int first_of_unit(int strip) const {
    return strip - strip % this->strips_of_expert % kUnitStrips;
  }
  __device__ __forceinline__ int end_of_unit(int strip) const {
    const int end_of_expert = (strip / this->strips_of_expert + 1) * this->strips_of_expert;
    return min(first_of_unit(strip) + kUnitStrips, end_of_expert);
  }
  __device__ __forceinline__ Run<kTokens> open(int strip, int plane, const Part& part) const {
    return Strips::open(strip, plane, part, [this](int place) {
      return this->present.order[place] / this->present.sizes.n_active;
    });
  }

  // A warp for each token, four channels a lane.
  __device__ __forceinline__ void finish(int strip,
                                         const UnitSums<Inner, 4 * kTokens>& sums) const {
    static_assert(kWarps >= 4 * kTokens);
    const PresentExpert& expert = this->expert_of(strip);
    const int thread = thread_now(), lane = thread % kLanes, token = thread / kLanes;
    if (token >= expert.n_tokens) return;
    const int n_inner = this->present.sizes.n_inner;
    const RoundedTokens inner(codes, scales, n_inner);
    const int group = strip % this->strips_of_expert / kUnitStrips;
    const int channel = group * kScaleColumns + lane * kLaneColumns;
    const __half* d = d_inner + static_cast<size_t>(expert.id) * n_inner;
    const Biases of_gate = bias.from(static_cast<size_t>(expert.id) * 2 * n_inner + channel);
    const Biases of_up = of_gate.from(n_inner);
    float x[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; i++) {
      const int row = (lane * kLaneColumns + i) % layout::kBlockRows;
      const int which = lane * kLaneColumns / layout::kBlockRows;
      x[i] = 0;
      if (channel + i < n_inner) {
        const float gate = sums[which][token][row] + of_gate[i];
        const float up = sums[which][token][layout::kBlockRows + row] + of_up[i];
        x[i] = activation(gate, up) * __half2float(d[channel + i]);
      }
    }
    float scale;
    const unsigned four = round_group(x, hadamard_size(n_inner), &scale);
    const size_t place = expert.first + token;
    if (channel < inner.n_columns) {
      *reinterpret_cast<unsigned*>(codes + place * inner.n_columns + channel) = four;
    }
    if (lane == 0) scales[place * inner.n_groups + group] = scale;
  }
};

// Down: outputs of each place go to memory; whoever completes a strip of the last expert adds them
// up for every token.
template <int kTokens>
struct Down : ExpertStrips<kTokens> {
  static constexpr int kUnitStrips = 1;
  using Strips = ExpertStrips<kTokens>;

  Biases bias;           // [E, n_hidden]
  const float* weights;  // [T, K]
  float* x;              // [T, n_hidden]
  float* outputs;        // [T * K, n_hidden]
  int* n_arrived;        // of each strip of an expert

  __device__ __forceinline__ int first_of_unit(int strip) const { return strip; }
  __device__ __forceinline__ int end_of_unit(int strip) const { return strip + 1; }
  __device__ __forceinline__ Run<kTokens> open(int strip, int plane, const Part& part) const {
    return Strips::open(strip, plane, part, [](int place) { return place; });
  }

  __device__ __forceinline__ void finish(int strip, const UnitSums<Down, 4 * kTokens>& sums) const {
    const PresentExpert& expert = this->expert_of(strip);
    const int n_hidden = this->present.sizes.n_hidden;
    const int of_expert = strip % this->strips_of_expert;
    const int row = thread_now() % kStripRows;
    const int o = of_expert * kStripRows + row, first = thread_now() / kStripRows;
    constexpr int kStep = kThreads / kStripRows;
    const Biases own = bias.from(static_cast<size_t>(expert.id) * n_hidden);
    for (int i = first; i < expert.n_tokens && o < n_hidden; i += kStep) {
      outputs[static_cast<size_t>(expert.first + i) * n_hidden + o] = sums[0][i][row] + own[o];
    }
    if (!is_last_block(n_arrived + of_expert, this->present.count)) return;
    for (int t = first; t < this->present.sizes.n_tokens && o < n_hidden; t += kStep) add(t, o);
  }

  // Heaviest first, as routed.
  __device__ __forceinline__ void add(int token, int o) const {
    const int n_hidden = this->present.sizes.n_hidden, n_active = this->present.sizes.n_active;
    float sum = 0;
    for (int a = token * n_active; a < (token + 1) * n_active; a++) {
      const int place = this->present.place_of[a];
      if (place < 0) continue;
      sum = fmaf(weights[a], __ldcg(outputs + static_cast<size_t>(place) * n_hidden + o), sum);
    }
    x[static_cast<size_t>(token) * n_hidden + o] += sum;
  }
};

__device__ __forceinline__ int padded_inner(int n_inner) {
  return (n_inner + layout::kBlockRows - 1) / layout::kBlockRows * layout::kBlockRows;
}

// As experts_inner of cuda_ext/ops.py. Places of an expert that is not here are left as they are.
//   counters, partials  as for linear.cu, of two strips each: [blocks][2][2][T][128]
#define INNER(name, tokens_of_lane)                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads, 2)                                      \
      name(const int8_t* codes, const float* scales, int n_tokens, const int64_t* parts,         \
           int n_experts, int n_planes, const int8_t* table, float scale_unit, const int* first, \
           const int* order, const int* active, const __half* d_inner, const float* bias,        \
           float steepness, float shift, float limit, int n_hidden, int n_inner, int n_active,   \
           int8_t* inner_codes, float* inner_scales, int* counters, float* partials) {           \
    DYNAMIC_SHARED(unsigned, pairs);                                                             \
    __shared__ StripMemory<Inner<tokens_of_lane>, 4 * tokens_of_lane> memory;                    \
    __shared__ PresentExperts present;                                                           \
    const ExpertSizes sizes{n_hidden, n_inner, n_experts, n_active, n_planes, n_tokens};         \
    const PartOfExperts gate_up{Regions(2 * padded_inner(n_inner), n_hidden), 0};                \
    find_experts({parts, first, order, active}, sizes, gate_up, present);                        \
    const Inner<tokens_of_lane> job{                                                             \
        {RoundedTokens(codes, scales, n_hidden), scale_unit, sizes, present},                    \
        d_inner,                                                                                 \
        {bias},                                                                                  \
        {steepness, shift, limit},                                                               \
        inner_codes,                                                                             \
        inner_scales};                                                                           \
    Strips<tokens_of_lane, Inner<tokens_of_lane>>(job, pairs, memory, counters, partials)        \
        .run(table);                                                                             \
  }                                                                                              \
  EXPORT_KERNEL(name, name)

// As experts_down of cuda_ext/ops.py. An expert that is not here adds nothing.
//   counters  for blocks, kMostBlocks, then one for each 128 of n_hidden; partials as for linear.cu
//   outputs   [T * K, n_hidden], any
#define DOWN(name, tokens_of_lane)                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) name(                                \
      const int8_t* inner_codes, const float* inner_scales, const int64_t* parts, int n_experts, \
      int n_planes, const int8_t* table, float scale_unit, const int* first, const int* order,   \
      const int* active, const float* bias, const float* weights, int n_tokens, int n_hidden,    \
      int n_inner, int n_active, float* x, int* counters, float* partials, float* outputs) {     \
    DYNAMIC_SHARED(unsigned, pairs);                                                             \
    __shared__ StripMemory<Down<tokens_of_lane>, 4 * tokens_of_lane> memory;                     \
    __shared__ PresentExperts present;                                                           \
    const ExpertSizes sizes{n_hidden, n_inner, n_experts, n_active, n_planes, n_tokens};         \
    const PartOfExperts down{Regions(n_hidden, n_inner),                                         \
                             Regions(2 * padded_inner(n_inner), n_hidden).plane_bytes()};        \
    find_experts({parts, first, order, active}, sizes, down, present);                           \
    const Down<tokens_of_lane> job{                                                              \
        {RoundedTokens(inner_codes, inner_scales, n_inner), scale_unit, sizes, present},         \
        {bias},                                                                                  \
        weights,                                                                                 \
        x,                                                                                       \
        outputs,                                                                                 \
        counters + kMostBlocks};                                                                 \
    Strips<tokens_of_lane, Down<tokens_of_lane>>(job, pairs, memory, counters, partials)         \
        .run(table);                                                                             \
  }                                                                                              \
  EXPORT_KERNEL(name, name)

INNER(inner_4, 1)  // up to 4 tokens
INNER(inner_8, 2)  // up to 8
DOWN(down_4, 1)
DOWN(down_8, 2)

}  // namespace lowmoe
