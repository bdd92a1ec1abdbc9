// What the comparisons of instruction sets share: inputs, and lines of a report.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <random>
#include <string>

#include "lowmoe/kernels/cpu/isa.h"

namespace lowmoe::agreement {

// Relative error of one rounding to float32.
inline constexpr double kRounding = 0x1p-24;

// n values that end where their memory ends, so that a sanitizer sees the first byte read or
// written beyond; aligned to 64 bytes, or, as contracts mostly ask for no more, to what T needs and
// no more.
template <class T>
class Array {
 public:
  // lead: bytes in front of the first value, which make its address an odd one.
  explicit Array(size_t n, T value = T{}, size_t lead = sizeof(T))
      : size_(n),
        lead_(lead),
        memory_(static_cast<uint8_t*>(::operator new(lead + n * sizeof(T), kAlignment))) {
    std::fill(begin(), end(), value);
  }
  static Array aligned(size_t n) { return Array(n, T{}, 0); }
  Array(const Array& other) : Array(other.size_, T{}, other.lead_) {
    std::memcpy(data(), other.data(), size_ * sizeof(T));
  }
  ~Array() { ::operator delete(memory_, kAlignment); }

  T* data() const { return reinterpret_cast<T*>(memory_ + lead_); }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + size_; }

 private:
  static constexpr std::align_val_t kAlignment{64};

  size_t size_, lead_;
  uint8_t* memory_;
};

// The same numbers on every machine, which std's distributions are not.
class Random {
 public:
  explicit Random(uint32_t seed) : bits_(seed) {}
  uint32_t bits() { return static_cast<uint32_t>(bits_()); }
  size_t below(size_t n) { return bits() % n; }
  float uniform(float low, float high) {
    return low + (high - low) * (static_cast<float>(bits() >> 8) * 0x1p-24f);
  }
  void fill(const Array<float>& to, float low = -1, float high = 1) {
    for (float& value : to) value = uniform(low, high);
  }

 private:
  std::mt19937 bits_;
};

inline std::string text(double value) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.9g", value);
  return digits;
}

// One line of the report: what was compared, in how many cases, and where it first differed.
class Check {
 public:
  Check(const Isa& isa, const char* what) : isa_(isa), what_(what) {}
  Check(const Check&) = delete;
  ~Check() {
    const bool passed = difference_.empty() && cases_ > 0;
    std::printf("%-6s  %-8s %-40s %6zu cases%s%s\n", passed ? "same" : "DIFFER", isa_.name, what_,
                cases_, passed ? "" : ": ", difference_.c_str());
    failures += !passed;
  }

  // The bits are the same, or both are NaN, whose bits nobody promises.
  template <class T, class IsNan>
  void same(const T* found, const T* wanted, size_t n, IsNan is_nan, const std::string& of) {
    cases_++;
    for (size_t i = 0; i < n; i++) {
      if (std::memcmp(found + i, wanted + i, sizeof(T)) == 0) continue;
      if (is_nan(found[i]) && is_nan(wanted[i])) continue;
      return note(of, i, static_cast<double>(found[i]), static_cast<double>(wanted[i]));
    }
  }
  void same(const Array<float>& found, const Array<float>& wanted, const std::string& of) {
    same(found.data(), wanted.data(), wanted.size(), [](float x) { return std::isnan(x); }, of);
  }
  template <class T>
  void same(const Array<T>& found, const Array<T>& wanted, const std::string& of) {
    same(found.data(), wanted.data(), wanted.size(), [](T) { return false; }, of);
  }

  // |found[i] - wanted[i]| <= allowed(i); NaN where NaN is wanted.
  template <class Allowed>
  void near(const Array<float>& found, const Array<float>& wanted, Allowed allowed,
            const std::string& of) {
    cases_++;
    for (size_t i = 0; i < wanted.size(); i++) {
      if (std::isnan(wanted[i]) ? std::isnan(found[i]) : found[i] == wanted[i]) continue;
      const double difference = std::abs(double{found[i]} - double{wanted[i]});
      if (!(difference <= allowed(i))) return note(of, i, found[i], wanted[i]);
    }
  }

  inline static int failures = 0;

 private:
  void note(const std::string& of, size_t i, double found, double wanted) {
    if (!difference_.empty()) return;
    difference_ = of + ", number " + std::to_string(i) + " is " + text(found) +
                  ", but scalar has " + text(wanted);
  }

  const Isa& isa_;
  const char* what_;
  size_t cases_ = 0;
  std::string difference_;
};

// Each compares some kernels of a set with those of the scalar set, and reports.
void compare_trellis(const Isa& isa, const Isa& scalar);
void compare_vector(const Isa& isa, const Isa& scalar);
void compare_attention(const Isa& isa, const Isa& scalar);
void compare_encoder(const Isa& isa, const Isa& scalar);

}  // namespace lowmoe::agreement
