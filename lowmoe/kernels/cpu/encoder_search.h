// The search of quant/viterbi.py, on as many words at once as there are lanes.
//
// Time runs from weight 31 down to 0; state, window and old symbol are viterbi.py's. The cost of
// value v of a weight x at scale s, x^2 left out, is  s^2 (v^2 - 2 v x / s). All costs of a word
// are multiplied by one factor and rounded so that a step is one dot product of two int16:
//
//   4 * a * (v^2 - 2 v y)  =  a * 4 v^2 + b * 8 v        a = round(factor s^2), b = round(-a x / s)
//
// The factor is the largest for which |b| fits 16 bits and a is at most kMostWeight, so with scales
// alike a is some 400, off by 1/800 at most: that says how rows of one word are weighed against
// each other, while x / s is exact to 1/a of a table step. A row more than 15 times quieter than
// its word's loudest counts as if it were 15 times quieter: float32 would leave it to the others.
//
// Costs are multiples of 4. Their two low bits carry the old symbol they came by, so that the
// minimum of four is a decision too.
//
// V, the lanes of an instruction set: see encoder_portable.h. Everything is a template of V, which
// each file has in a namespace of its own: no code of one instruction set may be shared with
// another.
#pragma once

#include "lowmoe/kernels/cpu/encoder.h"

namespace lowmoe {

inline constexpr int kStates = 16;
inline constexpr int kSteps = layout::kWordWeights;
inline constexpr int kRowsOfWord = 8;
// Two ways of 32 steps at 4 a v^2 + 8 |b v|, |v| up to 63, add up to less than 2^31.
inline constexpr float kMostWeight = 1000, kMostSlope = 32767;
inline constexpr float kLeastWeight = 2;  // of a row that is not silent
// Of a state that is not to be begun in: no two steps win this back, and after two all are reached.
inline constexpr int32_t kBlocked = 1 << 28;

// Scales of 64 rows and what the search wants of them.  In table units.
struct BlockScales {
  alignas(64) float scale[64];
  alignas(64) float inverse[64];  // 0 where the scale is
  alignas(64) float square[64];
  alignas(64) float least[64];   // kLeastWeight, 0 where the scale is
  alignas(64) float loudest[8];  // of a word's rows: their largest square
};

// V::low_pairs where nothing better is to be had: neighbours, then their neighbours, are merged.
// Inlined by order: GCC 12 calls it otherwise, which costs the AVX2 encoder 8 %.
template <class V>
[[gnu::always_inline]] inline typename V::I low_pairs_by_merging(const typename V::I* from) {
  typename V::I pairs[8], fours[4];
#pragma GCC unroll 8
  for (int n = 0; n < 8; n++) {
    pairs[n] = V::template merge<2>(from[2 * n], from[2 * n + 1]);
  }
#pragma GCC unroll 4
  for (int n = 0; n < 4; n++) {
    fours[n] = V::template merge<4>(pairs[2 * n], pairs[2 * n + 1]);
  }
  return V::template merge<16>(V::template merge<8>(fours[0], fours[1]),
                               V::template merge<8>(fours[2], fours[3]));
}

template <class V>
class Search {
 public:
  using I = typename V::I;
  using F = typename V::F;
  static constexpr int kSlices = V::kLanes / layout::kWords;  // slices searched at once

  // What to aim at: for each slice the 4 columns of 64 rows, rows in slots, see encoder_fit.h,
  // and the scales of its block.
  struct Aim {
    const float* x[kSlices];
    const BlockScales* scales[kSlices];
    F at(int j, int c) const { return V::floats(x, 64 * c + 8 * j); }
    // One of the scales' numbers for each word's row j.
    template <size_t n>
    F of_row(float (BlockScales::*numbers)[n], int j) const {
      const float* from[kSlices];
      for (int k = 0; k < kSlices; k++) from[k] = scales[k]->*numbers;
      return V::floats(from, 8 * j);
    }
  };

  // The chosen codes, lane by lane: symbols of weights 0 to 15 and 16 to 31, and all table values.
  struct Choice {
    I low, high;
    I values[kSteps];
  };

  explicit Search(const int8_t* table) : table_(V::table(table)) {
    for (int w = 0; w < kTableSize; w++) {
      const int v = table[w];
      steps_[w] = V::all((8 * v & 0xffff) | 4 * v * v << 16);
    }
  }

  // The cheapest path whose two ends need not meet.
  void open(const Aim& aim, Choice* choice) const {
    I weights[kSteps], decisions[kSteps], cost[kStates];
    price(aim, weights);
#pragma GCC unroll 16
    for (int n = 0; n < kStates; n++) cost[n] = V::all(oldest(n));
    for (int t = 0; t < kSteps; t++) {
      forward(cost, weights[kSteps - 1 - t]);
      decisions[t] = decide(cost);
    }
    I best = tagged_state(cost, 0);
#pragma GCC unroll 16
    for (int n = 1; n < kStates; n++) best = V::min(best, tagged_state(cost, n));
    trace(decisions, V::both(best, V::all(15)), choice);
  }

  // The cheaper of the two paths that begin and end in the two states that look cheapest.
  void closed(const Aim& aim, Choice* choice) const {
    I weights[kSteps], seam[2], cost[2], decisions[2][kSteps];
    price(aim, weights);
    seams(weights, seam);
    for (int k = 0; k < 2; k++) cost[k] = through(seam[k], weights, decisions[k]);
    const auto second = V::less(cost[1], cost[0]);
    for (int t = 0; t < kSteps; t++) {
      decisions[0][t] = V::choose(second, decisions[1][t], decisions[0][t]);
    }
    trace(decisions[0], V::choose(second, seam[1], seam[0]), choice);
  }

 private:
  // The oldest symbol of a state, the one that is forgotten at the next step.
  static constexpr int oldest(int state) { return state / 4; }

  // b and a of every weight, b in the low half.
  static void price(const Aim& aim, I* weights) {
    F reach = V::all_floats(0), loudest = aim.of_row(&BlockScales::loudest, 0);
    for (int j = 0; j < kRowsOfWord; j++) {
      F most = V::magnitude(aim.at(j, 0));
      for (int c = 1; c < 4; c++) most = V::max(most, V::magnitude(aim.at(j, c)));
      reach = V::max(reach, V::multiply(most, aim.of_row(&BlockScales::scale, j)));
    }
    // Both quotients are infinite for words of nothing: then a and b are 0, whatever the factor.
    const F factor = V::min(V::divide(V::all_floats(kMostWeight), loudest),
                            V::divide(V::all_floats(kMostSlope), reach));
    for (int j = 0; j < kRowsOfWord; j++) {
      const F square = aim.of_row(&BlockScales::square, j);
      const F least = aim.of_row(&BlockScales::least, j);
      // In this order a NaN of 0 times infinity is replaced by `least`, which is 0 there.
      const I a = V::round(V::max(V::multiply(square, factor), least));
      const F turn = V::multiply(V::to_floats(a), aim.of_row(&BlockScales::inverse, j));
      for (int c = 0; c < 4; c++) {
        weights[4 * j + c] = V::template merge<16>(slope(V::multiply(aim.at(j, c), turn)), a);
      }
    }
  }

  static I slope(F product) {
    const F limited =
        V::max(V::min(product, V::all_floats(kMostSlope)), V::all_floats(-kMostSlope));
    return V::round(V::subtract(V::all_floats(0), limited));
  }

  // The cheapest path from a state back to it: its decisions and its cost.
  I through(I seam, const I* weights, I* decisions) const {
    I cost[kStates];
#pragma GCC unroll 16
    for (int n = 0; n < kStates; n++) {
      cost[n] =
          V::choose(V::equal(seam, V::all(n)), V::all(oldest(n)), V::all(kBlocked + oldest(n)));
    }
    for (int t = 0; t < kSteps; t++) {
      forward(cost, weights[kSteps - 1 - t]);
      decisions[t] = decide(cost);
    }
    return cost_of(cost, seam);
  }

  // Costs before a step to costs after it, the low two bits of each its decision.
  void forward(I* cost, I weight) const {
    keep_in_memory();
    I after[kStates];
#pragma GCC unroll 16
    for (int g = 0; g < 4; g++) {
      const I from[4] = {cost[g], cost[4 + g], cost[8 + g], cost[12 + g]};
#pragma GCC unroll 16
      for (int n = 4 * g; n < 4 * g + 4; n++) after[n] = cheapest(from, weight, n, 16);
    }
#pragma GCC unroll 16
    for (int n = 0; n < kStates; n++) cost[n] = after[n];
  }

  // Costs after a step to costs before it, of the cheapest way to the end.
  void backward(I* cost, I weight) const {
    keep_in_memory();
    I before[kStates];
#pragma GCC unroll 16
    for (int g = 0; g < 4; g++) {
#pragma GCC unroll 16
      for (int o = 0; o < 4; o++) {
        before[4 * o + g] = cheapest(cost + 4 * g, weight, 16 * o + 4 * g, 1);
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < kStates; n++) cost[n] = before[n];
  }

  // Makes the compiler read steps_ anew at every step. Else it takes their 64 vectors out of the
  // loop, finds no registers for them, and copies them to the stack at the beginning of every
  // search.
  static void keep_in_memory() { asm volatile("" ::: "memory"); }

  // The least of from[k] plus the cost of window first + k * apart.
  I cheapest(const I* from, I weight, int first, int apart) const {
    const I zero = V::dot(from[0], weight, steps_[first]);
    const I one = V::dot(from[1], weight, steps_[first + apart]);
    const I two = V::dot(from[2], weight, steps_[first + 2 * apart]);
    const I three = V::dot(from[3], weight, steps_[first + 3 * apart]);
    return V::min(V::min(zero, one), V::min(two, three));
  }

  // Takes the decisions out of the costs, state n's at bit 2 n, and leaves there what the next step
  // will want to know: the symbol of each state that is the oldest then.
  static I decide(I* cost) {
    const I decisions = V::low_pairs(cost);
#pragma GCC unroll 16
    for (int n = 0; n < kStates; n++) cost[n] = V::template low_bits<3>(cost[n], oldest(n));
    return decisions;
  }

  // The two states that the cheapest paths pass where the ends meet, each end free.
  void seams(const I* weights, I* seam) const {
    // One after the other: 16 costs fit the registers, 32 do not.
    I ahead[kStates], behind[kStates];
#pragma GCC unroll 16
    for (int n = 0; n < kStates; n++) ahead[n] = behind[n] = V::all(0);
    for (int t = 0; t < kSteps; t++) forward(ahead, weights[kSteps - 1 - t]);
    for (int t = 0; t < kSteps; t++) backward(behind, weights[t]);
    I first = tagged_state(V::add(ahead[0], behind[0]), 0);
    I second = V::all(INT32_MAX);
#pragma GCC unroll 16
    for (int n = 1; n < kStates; n++) {
      const I price = tagged_state(V::add(ahead[n], behind[n]), n);
      second = V::min(second, V::max(first, price));
      first = V::min(first, price);
    }
    seam[0] = V::both(first, V::all(15));
    seam[1] = V::both(second, V::all(15));
  }

  // A price and whose it is, in the low 4 bits; of equal ones the first state's is less.
  static I tagged_state(I price, int state) { return V::template low_bits<15>(price, state); }
  static I tagged_state(const I* cost, int state) { return tagged_state(cost[state], state); }

  static I cost_of(const I* cost, I state) {
    I found = cost[0];
#pragma GCC unroll 16
    for (int n = 1; n < kStates; n++) {
      found = V::choose(V::equal(state, V::all(n)), cost[n], found);
    }
    return V::template low_bits<3>(found, 0);
  }

  // From the end of time, weight 0, back.
  void trace(const I* decisions, I state, Choice* choice) const {
    I halves[2];
    for (int half = 0; half < 2; half++) {
      I symbols = V::all(0);
      for (int i = 0; i < 16; i++) {
        const int weight = 16 * half + i;
        const I old = V::both(
            V::shift_right_by(decisions[kSteps - 1 - weight], V::add(state, state)), V::all(3));
        choice->values[weight] =
            V::look_up(table_, V::either(V::template shift_left<4>(old), state));
        // The symbols come in from the top: after 16 of them the first has arrived at the bottom.
        symbols = V::either(V::template shift_right<2>(symbols), V::template shift_left<30>(state));
        state = V::either(V::template shift_left<2>(old), V::template shift_right<2>(state));
      }
      halves[half] = symbols;
    }
    choice->low = halves[0];
    choice->high = halves[1];
  }

  typename V::Table table_;
  I steps_[kTableSize];  // in every lane 8 v in the low half, 4 v^2 in the high one
};

}  // namespace lowmoe
