// One row block from weights to planes.
//
// In scratch, columns follow each other and each holds its 64 rows in slots (encoder_fit.h), so
// that everything but the search adds up rows side by side, in the same order in every instruction
// set.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "lowmoe/kernels/cpu/encoder.h"
#include "lowmoe/kernels/cpu/encoder_feedback.h"
#include "lowmoe/kernels/cpu/encoder_fit.h"
#include "lowmoe/kernels/cpu/encoder_search.h"

namespace lowmoe {

template <class V>
class Rows {
 public:
  static size_t scratch_bytes(const EncoderTask& task) {
    Rows rows(task, 0);
    return rows.carve(nullptr);
  }

  static Coded encode(const EncoderTask& task, size_t row_block, uint8_t* scratch) {
    Rows rows(task, row_block);
    rows.carve(scratch);
    rows.load();
    for (int p = 0; p < task.n_planes; p++) {
      if (!rows.plane(p)) return rows.is_finite() ? Coded::kTooLarge : Coded::kNotFinite;
    }
    if (task.metric != nullptr) {
      Feedback<V> feedback(task, row_block, rows.fits_, rows.for_feedback_, rows.products_);
      feedback.run(rows.target_);
    }
    rows.store_products();
    return Coded::kFine;
  }

 private:
  using Column = float[64];
  static constexpr int kSlices = Search<V>::kSlices;
  static constexpr int kBlockSlices = layout::kSlices;

  // Sums over the columns of a group. Even and odd slices are summed apart, whatever the lanes.
  struct Sums {
    alignas(64) float products[kRowsOfWord][2][8] = {};
    alignas(64) float energies[kRowsOfWord][2][8] = {};
  };

  Rows(const EncoderTask& task, size_t row_block)
      : task_(task), row_block_(row_block), search_(task.table) {}

  // Cuts the scratch into pieces; returns how much that is.
  size_t carve(uint8_t* scratch) {
    size_t used = 0;
    const auto take = [&](auto*& piece, size_t count) {
      piece = reinterpret_cast<std::remove_reference_t<decltype(piece)>>(scratch + used);
      used += layout::round_up(count * sizeof *piece, 64);
    };
    const size_t columns = task_.columns(), groups = task_.groups();
    take(target_, columns);
    take(residual_, columns);
    take(values_, columns * 64);
    take(sums_, groups);
    take(energies_, groups);
    for (int p = 0; p < task_.n_planes; p++) take(fits_[p].nibble, groups);
    take(for_feedback_, task_.metric == nullptr ? 0 : Feedback<V>::kScratchBytes);
    return used;
  }

  // --- weights to target

  void load() {
    const size_t n_in = task_.shape.n_in;
    for (size_t first = 0; first < n_in; first += kMostBlockColumns) {
      const size_t n = std::min<size_t>(kMostBlockColumns, n_in - first);
      load_columns(first, n);
      for (size_t k = 0; k < n; k += task_.h) hadamard(target_ + first + k);
    }
    std::memset(target_ + n_in, 0, (task_.columns() - n_in) * sizeof *target_);
  }

  // Asked only where scales were refused: what is not finite never has scales that are.
  bool is_finite() const {
    uint32_t worst = 0;
    for (size_t k = 0; k < task_.shape.n_in; k++) {
      for (int r = 0; r < 64; r++) {
        worst = std::max(worst, std::bit_cast<uint32_t>(target_[k][r]) & 0x7fffffff);
      }
    }
    return worst < 0x7f800000;
  }

  // W / d.
  void load_columns(size_t first, size_t n) {
    for (int row = 0; row < 64; row++) {
      const size_t whole_row = row_block_ * 64 + row;
      float* to = &target_[first][slot_of_row(row)];
      if (whole_row >= task_.shape.n_out) {
        for (size_t k = 0; k < n; k++) to[64 * k] = 0;
        continue;
      }
      const float* from = task_.weights + whole_row * task_.shape.n_in + first;
      for (size_t k = 0; k < n; k++) to[64 * k] = from[k] / task_.d[first + k];
    }
  }

  void hadamard(Column* x) const {
    const size_t h = task_.h;
    for (size_t apart = 1; apart < h; apart *= 2) {
      for (size_t k = 0; k < h; k++) {
        if (k & apart) continue;
        for (int r = 0; r < 64; r++) {
          const float a = x[k][r], b = x[k + apart][r];
          x[k][r] = a + b;
          x[k + apart][r] = a - b;
        }
      }
    }
    const float norm = 1 / std::sqrt(static_cast<float>(h));
    for (size_t k = 0; k < h; k++) {
      for (int r = 0; r < 64; r++) x[k][r] *= norm;
    }
  }

  // --- target to planes

  bool plane(int p) {
    const Column* x = p == 0 ? target_ : residual_;
    FittedScales& fit = fits_[p];
    root_mean_squares(x);
    if (!fit_nearest(sums_, task_.groups(), &fit)) return false;
    for (size_t g = 0; g < task_.groups(); g++) open_block(x, g, fit);
    if (!fit_least_squares(sums_, energies_, task_.groups(), task_.unit, &fit)) return false;
    for (size_t g = 0; g < task_.groups(); g++) closed_block(x, g, fit, task_.planes[p]);
    if (!fit_least_squares(sums_, energies_, task_.groups(), task_.unit, &fit)) return false;
    store_scales(fit, task_.shape, row_block_, task_.planes[p]);
    const bool is_last = p + 1 == task_.n_planes;
    if (is_last && task_.metric != nullptr) return true;  // nobody asks what is left
    for (size_t g = 0; g < task_.groups(); g++) subtract_block(x, g, fit, p);
    return true;
  }

  // The plain rms is the best start for a stack, see quant/encode.py.
  void root_mean_squares(const Column* x) {
    for (size_t g = 0; g < task_.groups(); g++) {
      float sum[64] = {};
      for (int k = 0; k < 64; k++) {
        for (int r = 0; r < 64; r++) sum[r] += x[64 * g + k][r] * x[64 * g + k][r];
      }
      for (int r = 0; r < 64; r++) sums_[g][r] = std::sqrt(sum[r] / 64);
    }
  }

  void open_block(const Column* x, size_t group, const FittedScales& fit) {
    BlockScales scales;
    fit.of_group(group, task_.unit, &scales);
    Sums sums;
    for (int s = 0; s < kBlockSlices; s += kSlices) {
      const auto aim = aim_at(x + 64 * group, s, scales);
      typename Search<V>::Choice choice;
      search_.open(aim, &choice);
      add_up(aim, choice, s, &sums);
    }
    keep(sums, group);
  }

  void closed_block(const Column* x, size_t group, const FittedScales& fit, uint8_t* plane) {
    BlockScales scales;
    fit.of_group(group, task_.unit, &scales);
    Sums sums;
    uint8_t* words = plane + (row_block_ * task_.groups() + group) * layout::kBlockCodeBytes;
    int8_t* values = values_ + 64 * 64 * group;
    for (int s = 0; s < kBlockSlices; s += kSlices) {
      const auto aim = aim_at(x + 64 * group, s, scales);
      typename Search<V>::Choice choice;
      search_.closed(aim, &choice);
      add_up(aim, choice, s, &sums);
      uint8_t* to[kSlices];
      for (int k = 0; k < kSlices; k++) to[k] = words + 64 * (s + k);
      V::put_words(to, choice.low, choice.high);
      for (int i = 0; i < kSteps; i++, values += V::kLanes) V::put_bytes(values, choice.values[i]);
    }
    keep(sums, group);
  }

  typename Search<V>::Aim aim_at(const Column* block, int slice, const BlockScales& scales) const {
    typename Search<V>::Aim aim;
    for (int k = 0; k < kSlices; k++) {
      aim.x[k] = block[4 * (slice + k)];
      aim.scales[k] = &scales;
    }
    return aim;
  }

  static void add_up(const typename Search<V>::Aim& aim, const typename Search<V>::Choice& choice,
                     int slice, Sums* sums) {
    for (int j = 0; j < kRowsOfWord; j++) {
      auto product = V::all_floats(0), energy = V::all_floats(0);
      for (int c = 0; c < 4; c++) {
        const auto value = V::to_floats(choice.values[4 * j + c]);
        product = V::add(product, V::multiply(aim.at(j, c), value));
        energy = V::add(energy, V::multiply(value, value));
      }
      float* products = sums->products[j][slice % 2];
      float* energies = sums->energies[j][slice % 2];
      V::put(products, V::add(V::floats(products), product));
      V::put(energies, V::add(V::floats(energies), energy));
    }
  }

  void keep(const Sums& sums, size_t group) {
    for (int j = 0; j < kRowsOfWord; j++) {
      for (int w = 0; w < 8; w++) {
        sums_[group][8 * j + w] = sums.products[j][0][w] + sums.products[j][1][w];
        energies_[group][8 * j + w] = sums.energies[j][0][w] + sums.energies[j][1][w];
      }
    }
  }

  // What this plane leaves to the next; without a metric, what the gain needs.
  void subtract_block(const Column* x, size_t group, const FittedScales& fit, int p) {
    BlockScales scales;
    fit.of_group(group, task_.unit, &scales);
    const int8_t* values = values_ + 64 * 64 * group;
    for (int s = 0; s < kBlockSlices; s += kSlices) {
      const auto aim = aim_at(x + 64 * group, s, scales);
      float* to[kSlices];
      for (int k = 0; k < kSlices; k++) to[k] = residual_[64 * group + 4 * (s + k)];
      for (int i = 0; i < kSteps; i++, values += V::kLanes) {
        const int j = i / 4, c = i % 4;
        const auto scale = aim.of_row(&BlockScales::scale, j);
        const auto coded = V::multiply(V::to_floats(V::bytes(values)), scale);
        V::put(to, 64 * c + 8 * j, V::subtract(aim.at(j, c), coded));
      }
    }
    if (task_.metric != nullptr) return;
    for (size_t k = 64 * group; k < 64 * (group + 1); k++) {
      for (int r = 0; r < 64; r++) {
        const float exact = target_[k][r];
        if (p == 0) products_.sum[0][r] += exact * exact;
        products_.sum[1 + p][r] += exact * (exact - residual_[k][r]);
      }
    }
  }

  void store_products() const {
    double* to = task_.products + row_block_ * (1 + task_.n_planes);
    for (int n = 0; n < 1 + task_.n_planes; n++) {
      double total = 0;
      for (int r = 0; r < 64; r++) total += products_.sum[n][r];
      to[n] = total;
    }
  }

  const EncoderTask& task_;
  const size_t row_block_;
  const Search<V> search_;
  Products products_;
  FittedScales fits_[layout::kMaxPlanes];
  Column* target_;    // [columns]
  Column* residual_;  // [columns]
  int8_t* values_;    // [columns * 64], the latest plane's in the order they are found
  Column* sums_;      // [groups]
  Column* energies_;  // [groups]
  uint8_t* for_feedback_;
};

template <class V>
constexpr EncoderKernels encoder_kernels() {
  return {Rows<V>::scratch_bytes, Rows<V>::encode};
}

}  // namespace lowmoe
